"""Linking for this machine and for another one, with and without a system compiler."""

from __future__ import annotations

import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.devices import targets, toolchain
from nnfuze_tvm.errors import DeviceError


def graph() -> tvm.IRModule:
    """Return exp(x) + 1 as a Relax module: it needs libm."""
    x = relax.Var("x", relax.TensorType((4, 8), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            y = builder.emit(relax.op.add(relax.op.exp(x), relax.const(1.0, "float32")))
            out = builder.emit_output(y)
        builder.emit_func_output(out)
    return builder.get()


def elf_machine(path: Path) -> int:
    return struct.unpack_from("<H", path.read_bytes(), 18)[0]


def check_runs(path: Path) -> None:
    x = np.linspace(-1, 1, 32, dtype=np.float32).reshape(4, 8)
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), np.exp(x) + 1, rtol=1e-5)


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no system compiler")
def test_system_compiler(tmp_path: Path) -> None:
    target = targets.resolve("host")
    assert "zig" not in toolchain.linker_for(target).command[0]
    path = toolchain.export_library(tvm.compile(graph(), target), tmp_path / "lib.so", target)
    check_runs(path)
    assert path.stat().st_size < 40_000
    assert [p.name for p in tmp_path.iterdir()] == ["lib.so"]
    assert b".symtab" not in path.read_bytes()


def test_zig_where_there_is_no_compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.resolve("host")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert "zig" in toolchain.linker_for(target).command[0]
    path = toolchain.export_library(tvm.compile(graph(), target), tmp_path / "lib.so", target)
    check_runs(path)
    assert [p.name for p in tmp_path.iterdir()] == ["lib.so"], "no cache in the working directory"


@pytest.mark.parametrize("without_cross_gcc", [False, True])
def test_aarch64(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, without_cross_gcc: bool) -> None:
    target = targets.resolve("aarch64")
    assert not toolchain.runs_here(target) or elf_machine(Path("/proc/self/exe")) == 183
    if without_cross_gcc:
        monkeypatch.setenv("PATH", str(tmp_path))
    path = toolchain.export_library(tvm.compile(graph(), target), tmp_path / "lib.so", target)
    assert elf_machine(path) == 183


@pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="there is no system compiler")
def test_linking_without_the_compiler_in_front(tmp_path: Path) -> None:
    target = targets.resolve("host")
    linker = toolchain.quick_linker_for(target)
    assert Path(linker.command[0]).name.endswith("ld")
    x = tvm.te.placeholder((4,), name="x")
    roots = tvm.te.compute((4,), lambda i: tvm.tirx.call_pure_extern("float32", "cbrtf", x[i]))
    path = tmp_path / "lib.so"
    built = tvm.tirx.build(tvm.te.create_prim_func([x, roots]), target)
    built.export_library(str(path), fcompile=linker)
    # The C library's functions are found, also in a process that has no libm yet.
    assert b"libm.so.6" in path.read_bytes() and b".symtab" not in path.read_bytes()
    found = tvm.runtime.tensor(np.zeros(4, np.float32))
    tvm.runtime.load_module(str(path))["main"](tvm.runtime.tensor(np.array([0, 1, 8, 27], np.float32)), found)
    np.testing.assert_allclose(found.numpy(), [0, 1, 2, 3], rtol=1e-6)


def test_quick_linking_for_another_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = targets.resolve("aarch64")
    path = tmp_path / "lib.so"
    tvm.compile(graph(), target).export_library(str(path), fcompile=toolchain.quick_linker_for(target))
    assert elf_machine(path) == 183
    # zig is all in one.
    monkeypatch.setenv("PATH", str(tmp_path))
    assert toolchain.quick_linker_for(target) == toolchain.linker_for(target)


def test_no_linker_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(toolchain, "_zig", lambda: None)
    with pytest.raises(DeviceError, match="gcc-aarch64-linux-gnu or run 'pip install ziglang'"):
        toolchain.linker_for(targets.resolve("aarch64"))
    with pytest.raises(DeviceError, match="no linker"):
        toolchain.linker_for(targets.resolve("host"))


def test_unknown_processor() -> None:
    with pytest.raises(DeviceError, match="hexagon"):
        toolchain.linker_for(tvm.target.Target({"kind": "llvm", "mtriple": "hexagon-unknown-elf"}))


def test_failures_leave_no_library(tmp_path: Path) -> None:
    linker = toolchain.linker_for(targets.resolve("host"))
    broken = tmp_path / "broken.o"
    broken.write_text("no object file")
    with pytest.raises(DeviceError, match=r"linking .* failed"):
        linker(str(tmp_path / "lib.so"), [str(broken)])
    target = targets.resolve("host")
    with pytest.raises(DeviceError, match="can't write"):
        toolchain.export_library(tvm.compile(graph(), target), tmp_path / "missing" / "lib.so", target)


def test_the_exported_functions_stay(tmp_path: Path) -> None:
    target = targets.resolve("host")
    path = toolchain.export_library(tvm.compile(graph(), target), tmp_path / "lib.so", target)
    # Stripped, so that what is left of names is the dynamic symbols.
    library = path.read_bytes()
    assert b".symtab" not in library
    assert b"\0__tvm_ffi_" in library
