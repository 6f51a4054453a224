"""Bundles that are taken only if a key signed them."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.deploy import bundle, signing
from nnfuze_tvm.deploy.bundle import Bundle
from nnfuze_tvm.errors import BundleError, InputError
from nnfuze_tvm.jobs import bundles
from tests.bundles import rewrite, write_tiny_bundle

serialization = pytest.importorskip("cryptography.hazmat.primitives.serialization")


@pytest.fixture
def keys(tmp_path: Path) -> dict[str, str]:
    """Files with the private and the public key of two owners, and a key of another kind."""
    from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    found = {}
    made = {
        "own": Ed25519PrivateKey.generate(),
        "other": Ed25519PrivateKey.generate(),
        "ec": generate_private_key(SECP256R1()),
    }
    for name, key in made.items():
        pem, form = serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8
        private = key.private_bytes(pem, form, serialization.NoEncryption())
        public = key.public_key().public_bytes(pem, serialization.PublicFormat.SubjectPublicKeyInfo)
        for kind, data in {name: private, f"{name}.pub": public}.items():
            (tmp_path / kind).write_bytes(data)
            found[kind] = str(tmp_path / kind)
    return found


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tiny_bundle(tmp_path_factory.mktemp("bundles") / "out")


@pytest.fixture
def out(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / "out"))


def test_signed_bundles_are_loaded(out: Path, keys: dict[str, str]) -> None:
    with pytest.raises(BundleError, match="not signed"):
        Bundle.load(out, trust=keys["own.pub"])
    bundles.sign(out, keys["own"])
    assert Bundle.load(out, trust=keys["own.pub"]).tasks == Bundle.load(out).tasks
    assert bundles.inspect(out, keys["own.pub"])["signed"]
    with pytest.raises(BundleError, match="not signed with the key of"):
        Bundle.load(out, trust=keys["other.pub"])


@pytest.mark.parametrize("change", ["manifest", "library", "weights", "signature", "resealed"])
def test_what_was_changed_since_is_not(
    out: Path, keys: dict[str, str], monkeypatch: pytest.MonkeyPatch, change: str
) -> None:
    bundles.sign(out, keys["own"])
    if change != "weights":  # the library that takes them is the one that was signed
        monkeypatch.setattr(bundle.loading, "_load", lambda *_: pytest.fail("code was loaded"))
    if change == "manifest":
        rewrite(out, threads=2)
    elif change == "signature":
        (out / signing.SIGNATURE).write_bytes(b"\xff no signature")
    else:
        with open(out / (bundle.WEIGHTS if change == "weights" else bundle.LIBRARY), "ab") as file:
            file.write(b"more")
    if change == "resealed":
        # As somebody would who has no key.
        bundle.seal(out, bundle.read_manifest(out), {})
    for read in (Bundle.load, bundles.inspect):
        with pytest.raises(BundleError, match=r"not signed with|damaged"):
            read(out, trust=keys["own.pub"])


def test_keys_that_are_none(out: Path, keys: dict[str, str], tmp_path: Path) -> None:
    for name in ("own.pub", "ec", "nowhere"):
        with pytest.raises(InputError, match=name):
            bundles.sign(out, str(tmp_path / name))
    bundles.sign(out, keys["own"])
    for name in ("own", "ec.pub", "nowhere"):
        with pytest.raises(InputError, match=name):
            Bundle.load(out, trust=tmp_path / name)


def test_commands(out: Path, keys: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["inspect", str(out)]) == 0
    assert "not signed. Loading a bundle runs its code" in capsys.readouterr().out
    np.save(tmp_path / "x.npy", np.zeros((1, 2, 6, 6), "float32"))
    loads = {
        "run": ["--input", f"x={tmp_path / 'x.npy'}"],
        "bench": ["--repeats", "1"],
        "inspect": [],
        # Refused before any board is looked for.
        "deploy": ["--tracker", "127.0.0.1:9", "--key", "board"],
    }
    for verb, options in loads.items():
        assert cli.run([verb, str(out), *options, "--trust", keys["own.pub"]]) == 2
        assert "not signed" in capsys.readouterr().err
    assert cli.run(["bundle", "sign", str(out), "--key", keys["own"]]) == 0
    for verb in ("run", "bench", "inspect"):
        assert cli.run([verb, str(out), *loads[verb], "--trust", keys["own.pub"]]) == 0
