"""What is loaded is what was checked, and unloaded when it is not needed any more."""

from __future__ import annotations

import gc
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.deploy import build, loading
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.errors import BundleError

WEIGHTS = 64 << 10


def adder(path: Path, value: float) -> Path:
    """Write a library that adds a large constant of one value to its input."""
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((WEIGHTS,), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            added = builder.emit(data + relax.const(np.full(WEIGHTS, value, "float32")))
            result = builder.emit_output(relax.Tuple([added]))
        builder.emit_func_output(result)
    return export_library(build.build(builder.get(), resolve("host")), path, resolve("host"))


@pytest.fixture(scope="module")
def libraries(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("libraries")
    return [adder(folder / f"{n}.so", n) for n in (1, 2)]


def result_of(library: tvm.runtime.Module) -> float:
    zeros = tvm.runtime.tensor(np.zeros(WEIGHTS, "float32"))
    return float(relax.VirtualMachine(library, tvm.cpu())["main"](zeros)[0].numpy().max())


def mapped() -> int:
    gc.collect()
    return Path("/proc/self/maps").read_text().count("memfd:lib.so")


@pytest.mark.parametrize("in_memory", [True, False])
def test_what_is_checked_is_what_is_loaded(
    libraries: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, in_memory: bool
) -> None:
    path = tmp_path / "lib.so"
    shutil.copy(libraries[0], path)
    real = loading._load
    if not in_memory:
        monkeypatch.setattr(loading, "_in_memory", lambda _: None)

    def replaced_meanwhile(name: str, kind: str) -> tvm.runtime.Module:
        path.write_bytes(libraries[1].read_bytes())
        return real(name, kind)

    monkeypatch.setattr(loading, "_load", replaced_meanwhile)
    assert result_of(loading.load_checked(path, loading.sha256(path))) == 1


def test_another_library_is_not_loaded(libraries: list[Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "_load", lambda *_: pytest.fail("code was loaded"))
    with pytest.raises(BundleError, match="damaged"):
        loading.load_checked(libraries[0], loading.sha256(libraries[1]))
    with pytest.raises(BundleError, match="damaged"):
        loading.read_checked(libraries[0], loading.sha256(libraries[1]))


def test_no_library_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    path.write_bytes(b"no library")
    with pytest.raises(BundleError, match=r"lib\.so: can't be loaded") as caught:
        loading.load_checked(path, loading.sha256(path))
    assert "\n" not in str(caught.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of what is mapped")
def test_libraries_are_unloaded(libraries: list[Path], tmp_path: Path) -> None:
    path = tmp_path / "lib.so"
    shutil.copy(libraries[0], path)
    checksum = loading.sha256(path)
    before, files = mapped(), len(os.listdir("/proc/self/fd"))
    kept = loading.load_checked(path, checksum)
    assert mapped() > before
    assert result_of(kept) == result_of(kept) == 1
    for _ in range(20):
        assert result_of(loading.load_checked(path, checksum)) == 1
    del kept
    assert mapped() == before
    assert len(os.listdir("/proc/self/fd")) == files
