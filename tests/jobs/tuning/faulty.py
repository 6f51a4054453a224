"""Kernels that nap, crash, loop or kill their board, and a job on them that can be run as a program.

As a program: ``python -m tests.jobs.tuning.faulty WORK_DIR TRACKER KEY SPACE TRIALS TIMEOUT TARGET KERNELS``.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import tvm
from tvm import relax, s_tir, tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.target import Target

from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote.tracker import Place
from nnfuze_tvm.jobs import tuning
from tests.jobs.tuning.standin import choose, fused

LANES = 16
ROWS = (1, 2)
NAPS = tuple(range(60_000, 60_012))


def kernels(count: int = len(ROWS)) -> tvm.IRModule:
    """Return a fused module with kernels that add one, to one row and more."""
    params = [relax.Var(f"x{rows}", relax.TensorType((rows, LANES), "float32")) for rows in range(1, count + 1)]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            sums = [builder.emit(relax.op.add(x, relax.const(1.0, "float32"))) for x in params]
            out = builder.emit_output(relax.Tuple(sums))
        builder.emit_func_output(out)
    return fused(builder.get())


@contextmanager
def _function() -> Iterator[tuple[tirx.Buffer, tirx.Buffer]]:
    """Read and write a row of numbers."""
    with T.prim_func(s_tir=True):
        x, y = T.arg("x", T.handle()), T.arg("y", T.handle())
        a = T.match_buffer(x, (LANES,), "float32", offset_factor=1)
        b = T.match_buffer(y, (LANES,), "float32", offset_factor=1)
        with T.sblock("root"):
            T.reads(a[0:LANES])
            T.writes(b[0:LANES])
            yield a, b


def _kernel(body: Callable[[tirx.Buffer, tirx.Buffer], None]) -> tirx.PrimFunc:
    # Every process of a job reads this file, and TVMScript's parser would take half a second.
    with IRBuilder() as builder:
        with _function() as (a, b):
            body(a, b)
    return builder.get()


def _description(a: tirx.Buffer, b: tirx.Buffer) -> None:
    with T.serial(LANES) as i, T.sblock("add"):
        vi = T.axis.spatial(LANES, i)
        T.buffer_store(b, a[vi] + T.float32(1.0), [vi])


def _call(name: str, *args: object) -> tirx.PrimExpr:
    return T.call_extern("int32", name, *args)


def nap(microseconds: int) -> tirx.PrimFunc:
    """Sleep first."""

    def body(a: tirx.Buffer, b: tirx.Buffer) -> None:
        T.evaluate(_call("usleep", microseconds))
        with T.serial(LANES) as i:
            T.buffer_store(b, a[i] + T.float32(1.0), [i])

    return _kernel(body)


def _segfault(a: tirx.Buffer, b: tirx.Buffer) -> None:
    T.buffer_store(b, a[0], [T.int64(1 << 44)])


def _endless(a: tirx.Buffer, b: tirx.Buffer) -> None:
    with T.serial(T.int64(1 << 62)):
        T.buffer_store(b, b[0] * T.float32(0.5) + a[0], [0])


def _murder(a: tirx.Buffer, b: tirx.Buffer) -> None:
    T.evaluate(_call("kill", _call("getppid"), 9))
    T.evaluate(_call("usleep", 1_000_000))
    T.buffer_store(b, a[0], [0])


def _register() -> None:
    candidates = {f"nap{length}": nap(length) for length in NAPS}
    candidates |= {body.__name__[1:]: _kernel(body) for body in (_segfault, _endless, _murder)}
    # Registered anew where this file is the program and a module, too.
    for name, func in candidates.items():
        TensorIntrin.register(f"faulty.{name}", _kernel(_description), func, override=True)


_register()


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

    work_dir, address, key, space, trials, timeout, target, count = sys.argv[1:]
    tuning.tune_kernels(
        kernels(int(count)),
        targets.resolve(target),
        trials=int(trials),
        work_dir=work_dir,
        tracker=Place.of(address),
        key=key,
        progress=False,
        timeout=float(timeout),
        wait_for_device=60.0,
        space=getattr(faulty, space),
    )
