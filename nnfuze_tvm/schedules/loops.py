"""The loops of a kernel: how many there are worth a thread, and what becomes vectors."""

from __future__ import annotations

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV
from tvm.target import Target

from nnfuze_tvm.devices.hardware import Hardware

# A parallel region costs some microseconds to enter and leave; kernels below this many scalar
# operations (about 20 µs on one core) stay on one thread.
PARALLEL_MIN_OPS = 400_000

# TVM puts buffers below 1024 bytes of scope "global" on the stack, whence LLVM takes them into registers. Larger
# ones, and all of scope "local", cost a call of the runtime's allocator wherever they come to life.
STACK_BYTES = 1023

# What a loop of no fixed extent is annotated with: its usual extent.
USUAL = "nnfuze.usual"
# And, where it begins at a number in memory, what that is in the middle of the kernel.
MIDDLE = "nnfuze.middle"


def divisors(n: int, at_most: int) -> list[int]:
    """Return the divisors of ``n`` up to ``at_most``, largest first."""
    return [d for d in range(min(n, at_most), 0, -1) if n % d == 0]


def vectorize_inner(sch: s_tir.Schedule, loop: LoopRV, dtype: str, hw: Hardware, vectors: int = 1) -> LoopRV:
    """Split ``loop`` into chunks of up to ``vectors`` registers, vectorize the lanes, return the outer loop."""
    extent = int(sch.get(loop).extent)
    lanes = hw.lanes(dtype)
    width = next((d for d in divisors(extent, lanes * vectors) if d % lanes == 0), None)
    if width is None:
        width = next(iter(divisors(extent, lanes)))
    if width == 1:
        return loop
    outer, inner = sch.split(loop, [None, width])
    sch.vectorize(inner)
    return outer


def unroll_tile(sch: s_tir.Schedule, loops: list[LoopRV]) -> None:
    """Unroll all loops but the last one, which becomes a vector."""
    *unrolled, lane = loops
    for loop in unrolled:
        sch.unroll(loop)
    sch.vectorize(lane)


def vectorize_copy(sch: s_tir.Schedule, pad: SBlockRV, hw: Hardware) -> None:
    """Schedule the padded or widened copy of the data."""
    node = sch.get(pad)
    lanes = hw.lanes(str(node.writes[0].source.dtype))
    # What was padded by whole segments has the same condition for all numbers of one.
    last = sch.get_loops(pad)[-1]
    width = int(node.annotations.get("nnfuze.segment", sch.get(last).extent))
    _, lane = sch.split(last, [None, divisors(width, lanes)[0]])
    sch.vectorize(lane)


def without_blocks() -> list[tvm.transform.Pass]:
    """Return what makes loops around loads and stores of scheduled kernels, as TVM's way to machine code does first."""
    return [
        s_tir.transform.CanonicalizeLoop(),
        s_tir.transform.LowerInitBlock(),
        s_tir.transform.PlanAndUpdateBufferAllocationLocation(),
        s_tir.transform.ConvertBlocksToOpaque(),
        s_tir.transform.CompactBufferAllocation(),
        s_tir.transform.LowerMatchBuffer(),
        s_tir.transform.StmtSimplify(),
        s_tir.transform.LowerOpaqueBlock(),
    ]


def plain(func: tirx.PrimFunc, target: Target) -> tirx.PrimFunc:
    """Return a scheduled kernel without blocks: loops around loads and stores, buffers as large as what is used."""
    with target:
        return tvm.transform.Sequential(without_blocks())(tvm.IRModule({"main": func.with_attr("target", target)}))[
            "main"
        ]
