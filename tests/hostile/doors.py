"""Compression, wiring, policies, exported networks, programs of PyTorch, and merges that can't be."""

from __future__ import annotations

import io
import json
import os
import zipfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from tests.hostile.arrays import archive, saved
from tests.hostile.documents import texts
from tests.hostile.harness import Case
from tests.hostile.networks import network, node
from tests.tiny_networks import samples

Words = Sequence[str | Path]
DIGITS = "9" * 5000


def _compression(folder: Path, model: Path) -> Iterator[Words]:
    good = folder / "good.npz"
    np.savez(good, x=samples(3))
    export = ["export", model, "-o", "out.onnx"]
    for option in ("--sparsity", "--rank", "--macs", "--bytes"):
        for share in ("nan", "inf", "-inf", "-1", "2", "1e300", "²", DIGITS):
            yield [*export, option, share]
    for option, value in (
        ("--sparsity", "1"),
        ("--rank", "0"),
        ("--macs", "0"),
        ("--macs", "1e-300"),
        ("--bytes", "1e-9"),
    ):
        yield [*export, option, value]
    for error in ("nan", "-1", "-inf", "²"):
        yield [*export, "--quantize", "auto", "--calibration", good, "--max-error", error]
    for count in ("0", "-1", "nan", DIGITS):
        yield [*export, "--quantize", "int8", "--calibration", good, "--finetune", good, "--epochs", count]
    for how in ("w4a8", "auto", "int8"):
        yield [*export, "--quantize", how]
    yield [*export, "--quantize", "int4"]
    yield [*export, "--criterion", "\x1b[31m", "--prune", "0.5"]
    yield [*export, "--calibration-method", "[/red]", "--quantize", "int8", "--calibration", good]


def _arrays() -> Iterator[tuple[str, bytes]]:
    """Give archives whose arrays are no samples of the network."""
    for name, array in {
        "text": np.array(["a"] * 3), "bytes": np.array([b"a"] * 3), "dates": np.array(["2020-01-01"] * 3, "M8[D]"),
        "records": np.zeros(3, "i4,f4"), "complex": samples(3).astype("complex64"),
        "none": samples(1)[:0], "number": np.float32(1), "flat": samples(3).ravel(), "deep": samples(3)[(None,) * 9],
        "NaN": np.full_like(samples(3), np.nan), "infinite": np.full_like(samples(3), np.inf),
        "largest": np.full_like(samples(3), 3e38), "whole numbers": np.full(samples(3).shape, 2**63 - 1),
        "truth": np.zeros(samples(3).shape, bool),
    }.items():  # fmt: skip
        yield name, archive({"x.npy": saved(array)})
    yield "another name", archive({"y.npy": saved(samples(3))})
    yield "one too many", archive({"x.npy": saved(samples(3)), "\x1b[31m.npy": saved(samples(3))})


def _samples(folder: Path, model: Path) -> Iterator[tuple[str, Words]]:
    for n, (name, data) in enumerate(_arrays()):
        path = folder / f"samples {name}.npz"
        path.write_bytes(data)
        how = ("w4a8", "auto", "int8")[n % 3]
        yield f"samples of {name}", ["export", model, "-o", "out.onnx", "--quantize", how, "--calibration", path]
        if n % 2:
            prune = ["--prune", "0.5", "--criterion", "repair", "--calibration", path]
            yield f"repair on {name}", ["export", model, "-o", "out.onnx", *prune]


def _wiring(folder: Path, model: Path) -> Iterator[Words]:
    loop = network([node("Relu")], {"x": (1, 4)})
    onnx.save(loop, folder / "loop.onnx")
    other = network([node("Relu", "u", "v")], {"u": (1, 4)}, outputs=("v",))
    onnx.save(other, folder / "other.onnx")
    pair: list[str | Path] = ["export", folder / "loop.onnx", folder / "other.onnx", "-o", "out.onnx"]
    yield [*pair, "--chain", "u=loop:y", "--chain", "x=other:v"]
    yield [*pair, "--chain", "u=loop:y", "--state", "u=v", "--state", "x=y"]
    yield [*pair, "--chain", "u=loop:y", "--chain", "u=loop:y"]
    yield [*pair, "--state", "x=y", "--state", "u=v"]
    yield [*pair, "--state", "x=y", "--state", "loop.x=y"]
    yield [*pair, "--chain", "x=loop:y"]
    for link in (
        f"u=loop:y[{DIGITS}]", f"u=loop:{DIGITS}", "u=loop:y[0]", "u=loop:y[1000000000000]", "u=loop:y[٣]", "u=loop:٣",
        "u=loop:", "u=:y", "=loop:y", "u=loop:y\n", "u=\ud800:y", "[/red]=loop:y", "\x1b[31m=loop:y", "u=loop:[/red]",
        "u==loop:y",
    ):  # fmt: skip
        yield [*pair, "--chain", link]
    for link in (f"x={DIGITS}", "x=-1", "x=٣", "x=", "=y", "x=\ud800", "x=v", "[/red]=y", ".x=y", "other.x=y"):
        yield [*pair, "--state", link]
    yield ["export", model, "-o", "out.onnx", "--state", "x=scores"]


def policies() -> Iterator[tuple[str, Any]]:
    """Give policies whose fields of newer methods say what can't be."""
    for field in ("rank", "sparsity", "keep"):
        for name, value in {"NaN": float("nan"), "2": 2, "text": "x", "list": [1], "huge": 10**400}.items():
            yield f"{field} {name}", {"default": {field: value}}
    for weights, activations in ((4, 32), (4, 4), (32, 4), (-8, 8), (10**30, 8), ("4", "8"), (4.5, 8), (True, True)):
        yield f"weights {weights} {activations}", {"default": {"weights": weights, "activations": activations}}
    yield "format", {"default": {"bits": 8, "format": "\x1b[31m[/red]"}}
    yield "nothing kept", {"default": {"keep": 0}}
    yield "all removed", {"default": {"sparsity": 1}}
    yield "no rank", {"default": {"rank": 0}}
    yield "criterion", {"default": {"keep": 0.5, "criterion": "x" * 10**6}}
    yield "contradiction", {"default": {"bits": 8, "weights": 4}, "layers": {"*": {"bits": 32, "activations": 8}}}


def _policies(folder: Path, model: Path) -> Iterator[tuple[str, Words]]:
    for name, document in policies():
        path = folder / f"policy {name}.json"
        path.write_text(json.dumps(document))
        yield name, ["policy", "check" if len(name) % 2 else "show", path, model]
    for n, (name, data) in enumerate(texts()):
        path = folder / f"{name}.json"
        path.write_bytes(b"// a remark\n" * 3 + data)
        yield f"remarks and {name}", ["policy", "check" if n % 2 else "show", path, model]
    (folder / "remarks").write_bytes(b"//\n" * 300_000)
    yield "only remarks", ["policy", "check", folder / "remarks", model]
    for end in ("", ".onnx"):
        os.mkfifo(folder / f"pipe{end}")
        os.symlink("/dev/full", folder / f"full{end}")
        (folder / f"folder{end}").mkdir()
    for place in (
        folder / "pipe",
        folder / "full",
        folder / "folder",
        "/proc/x",
        "a\0b",
        "\ud800",
        "a" * 300,
        "/proc/",
    ):
        yield f"to {place}", ["policy", "init", model, "--no-time", "--force", "-o", place]
        yield f"network to {place}", ["export", model, "--no-check", "--force", "-o", f"{place}.onnx"]


def zips() -> Iterator[tuple[str, bytes]]:
    """Give archives that no exported program is."""

    def packed(files: dict[str, bytes]) -> bytes:
        out = io.BytesIO()
        with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as file:
            for name, data in files.items():
                file.writestr(name, data)
        return out.getvalue()

    program = {"p/archive_format": b"pt2", "p/version": b"0", "p/byteorder": b"little"}
    yield "empty", b""
    yield "text", b"hello"
    yield "no files", packed({})
    yield "an archive of arrays", archive({"x.npy": saved(samples(1))})
    yield "no model", packed(program)
    yield "a model of text", packed({**program, "p/models/model.json": b"hello"})
    yield "a deep model", packed({**program, "p/models/model.json": b"[" * 100_000 + b"]" * 100_000})
    yield "objects", packed({**program, "p/data/constants/custom_obj_0": b"cos\nsystem\n(S'true'\ntR."})
    yield "machine code", packed({**program, "p/data/aotinductor/model/\x1b[31m.so": b"\x7fELF"})
    yield "many files", packed({f"p/{n}": b"" for n in range(20_000)})
    whole = packed({**program, "p/models/model.json": bytes(300_000)})
    yield "cut", whole[:-30]
    yield "a directory elsewhere", whole[:-6] + b"\xff\xff\xff\x7f\0\0"
    yield "a damaged member", whole[:200] + bytes(40) + whole[240:]


def _programs(folder: Path) -> Iterator[tuple[str, Words]]:
    for name, data in zips():
        path = folder / f"program {name}.pt2"
        path.write_bytes(data)
        yield name, ["analyze", path]
    os.mkfifo(folder / "pipe.pt2")
    yield "a pipe", ["analyze", folder / "pipe.pt2"]
    (folder / "folder.pt2").mkdir()
    yield "a folder", ["analyze", folder / "folder.pt2"]
    os.symlink("/dev/zero", folder / "zero.pt2")
    yield "a device", ["analyze", folder / "zero.pt2"]
    with open(folder / "large.pt2", "wb") as file:
        file.truncate(1 << 42)
    yield "4 TB", ["analyze", folder / "large.pt2"]


def cases(folder: Path, bundle: Path, model: Path) -> Iterator[Case]:
    """Give them to the verbs that read them."""
    for kind, found in (("compression", _compression(folder, model)), ("wiring", _wiring(folder, model))):
        for words in found:
            shown = " ".join(str(word) for word in words[1:] if word != model)
            yield Case(f"{kind}: {shown[-90:]!r}", words, (2,))
    for kind, named in (
        ("samples", _samples(folder, model)), ("policies", _policies(folder, model)), ("program", _programs(folder)),
    ):  # fmt: skip
        for name, words in named:
            yield Case(f"{kind}: {name}", words, (2,))
