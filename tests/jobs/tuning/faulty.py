"""Kernels that nap, crash, loop or kill their board, and a job on them that can be run as a program.

As a program: ``python -m tests.jobs.tuning.faulty WORK_DIR TRACKER KEY SPACE TRIALS TIMEOUT [TARGET]``.
"""

from __future__ import annotations

import sys

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T
from tvm.target import Target

from nnfuze_tvm.devices import targets
from nnfuze_tvm.jobs import tuning
from nnfuze_tvm.schedules.intrinsics.description import with_short_stack
from tests.jobs.tuning.standin import choose, fused

LANES = 16
ROWS = (1, 2)
NAPS = tuple(range(60_000, 60_012))


def kernels() -> tvm.IRModule:
    """Return a fused module with a kernel that adds one, for each number of rows."""
    params = [relax.Var(f"x{rows}", relax.TensorType((rows, LANES), "float32")) for rows in ROWS]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            sums = [builder.emit(relax.op.add(x, relax.const(1.0, "float32"))) for x in params]
            out = builder.emit_output(relax.Tuple(sums))
        builder.emit_func_output(out)
    return fused(builder.get())


def nap(microseconds: int) -> tirx.PrimFunc:
    """Sleep first."""

    @T.prim_func(s_tir=True)
    def implementation(x: T.handle, y: T.handle) -> None:
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            T.evaluate(T.call_extern("int32", "usleep", microseconds))
            for i in range(LANES):
                b[i] = a[i] + T.float32(1.0)

    return implementation


def _register() -> None:
    @T.prim_func(s_tir=True)
    def description(x: T.handle, y: T.handle) -> None:
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            for i in range(LANES):
                with T.sblock("add"):
                    vi = T.axis.remap("S", [i])
                    b[vi] = a[vi] + T.float32(1.0)

    @T.prim_func(s_tir=True)
    def segfault(x: T.handle, y: T.handle) -> None:
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            b[T.int64(1 << 44)] = a[0]

    @T.prim_func(s_tir=True)
    def endless(x: T.handle, y: T.handle) -> None:
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            for _ in range(T.int64(1 << 62)):
                b[0] = b[0] * T.float32(0.5) + a[0]

    @T.prim_func(s_tir=True)
    def murder(x: T.handle, y: T.handle) -> None:
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            T.evaluate(T.call_extern("int32", "kill", T.call_extern("int32", "getppid"), 9))
            T.evaluate(T.call_extern("int32", "usleep", 1_000_000))
            b[0] = a[0]

    # Registered anew where this file is the program and a module, too.
    for length in NAPS:
        TensorIntrin.register(f"faulty.nap{length}", description, nap(length), override=True)
    for name, func in {"segfault": segfault, "endless": endless, "murder": murder}.items():
        TensorIntrin.register(f"faulty.{name}", description, func, override=True)


with_short_stack(_register)


def _intrinsic(sch: s_tir.Schedule, names: tuple[str, ...], tunable: bool) -> str:
    (block,) = sch.get_child_blocks(sch.get_sblock("root", func_name="main"))
    sch.tensorize(sch.get_loops(block)[-1], f"faulty.{choose(sch, names, tunable)}")
    return "faulty"


def napping(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """Every candidate takes some time, so that things can happen while it runs."""
    return _intrinsic(sch, tuple(f"nap{n}" for n in NAPS), tunable)


def bad(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """One candidate crashes, one never ends."""
    return _intrinsic(sch, ("nap60000", "segfault", "nap60001", "endless", "nap60002"), tunable)


def mixed(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """Both: twelve candidates that nap, one that crashes and one that never ends."""
    return _intrinsic(sch, (*(f"nap{n}" for n in NAPS), "segfault", "endless"), tunable)


def deadly(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """One candidate takes the board's server with it."""
    return _intrinsic(sch, ("nap60000", "murder", "nap60001"), tunable)


if __name__ == "__main__":
    from tests.jobs.tuning import faulty

    work_dir, address, key, space, trials, timeout, *rest = sys.argv[1:]
    tuning.tune_kernels(
        kernels(),
        targets.resolve(*rest or ["host"]),
        trials=int(trials),
        work_dir=work_dir,
        tracker=address,
        key=key,
        progress=False,
        timeout=float(timeout),
        wait_for_device=60.0,
        space=getattr(faulty, space),
    )
