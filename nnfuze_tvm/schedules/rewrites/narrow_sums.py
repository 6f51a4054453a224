"""Products of weights of few bits: many of them are added in int16, before their sums are added in int32.

A product of weights of 4 bits and data of 8 is at most 896, so a sum of 36 of them fits in int16, and of more where
most weights are smaller. Of the products that an intrinsic adds two by two in int16, each pair's place in the vector
is such a sum. A rule writes its tile for that intrinsic and marks the reduction. ``sum_narrowly`` then has vectors of
int16 in the tile, as many as it has vectors of sums, and adds them to the sums when they may be full.
"""

from __future__ import annotations

from math import prod

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.blocks import with_buffers
from nnfuze_tvm.schedules.intrinsics import Dot, narrow_of
from nnfuze_tvm.schedules.loops import divisors
from nnfuze_tvm.schedules.rewrites.regions import Rows, block, load, over_rows, without

_PARTS = "nnfuze.narrow_sums_parts"
_ROWS = "nnfuze.narrow_sums_rows"


def mark(sch: s_tir.Schedule, reduction: list[LoopRV], rows: LoopRV, iteration: int, dot: Dot) -> list[LoopRV]:
    """Mark a tile's rows, and how much of its reduction an int16 takes; return the reduction's loops, perhaps one more.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        The schedule.
    reduction : list of LoopRV
        The loops of the reduction, outermost first.
    rows : LoopRV
        The loop over the rows of the tile, inside of them.
    iteration : int
        Products per sum in one iteration of the last loop.
    dot : Dot
        The tensor intrinsic.
    """
    extents = [int(sch.get(loop).extent) for loop in reduction]
    lengths = {
        inner * prod(extents[place + 1 :]) * iteration: (place, inner)
        for place, extent in enumerate(extents)
        for inner in divisors(extent, extent)
    }
    place, inner = lengths[max(length for length in lengths if length <= dot.narrow)]
    around, part = sch.split(reduction[place], [None, inner])
    sch.annotate(around, _PARTS, 1)
    sch.annotate(rows, _ROWS, [dot.name, dot.steps])
    return [*reduction[:place], around, part, *reduction[place + 1 :]]


def sum_narrowly(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked reduction is summed in int16 part by part."""
    added: list[tirx.Var] = []

    def visit(loop: tirx.For) -> tirx.Stmt:
        return _parts(loop, added) if _PARTS in loop.annotations else loop

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    return with_buffers(func, body, added) if added else func


def _parts(loop: tirx.For, added: list[tirx.Var]) -> tirx.For:
    """Return the loop over parts of a reduction: clear the narrow sums, add products to them, add them to the sums."""
    before, behind = [], []

    def visit(inner: tirx.For) -> tirx.For:
        if _ROWS not in inner.annotations:
            return inner
        name, steps = str(inner.annotations[_ROWS][0]), int(inner.annotations[_ROWS][1])
        how = narrow_of(name)

        def clear(rows: Rows) -> s_tir.SBlockRealize:
            narrow = _narrow(rows[0][0], how.lanes, added)
            return block([], [narrow], [tirx.Broadcast(tirx.const(0, "int16"), how.lanes)], "narrow_clear")

        def multiply(rows: Rows) -> s_tir.SBlockRealize:
            (sums, data, weights), narrow = rows[0], _narrow(rows[0][0], how.lanes, added)
            numbers, lanes = _numbers(data), _numbers(sums)
            row, total = load(data, numbers), load(narrow, how.lanes)
            for step in range(steps):
                own = load(weights, lanes * numbers // steps, {-5: step} if step else None)
                total = how.multiply(total, row, own, step)
            return block([narrow, data, weights], [narrow], [total], "narrow_products")

        def widen(rows: Rows) -> s_tir.SBlockRealize:
            sums, narrow = rows[0][0], _narrow(rows[0][0], how.lanes, added)
            total = load(sums, _numbers(sums)) + how.widen(load(narrow, how.lanes))
            return block([sums, narrow], [sums], [total], "narrow_widen")

        before.append(over_rows(inner, 1, clear, _ROWS))
        behind.append(over_rows(inner, 1, widen, _ROWS))
        return over_rows(inner, 1, multiply, _ROWS)

    body = tvm_ffi.structural_map(loop.body, (tirx.For, visit))
    return without(loop, _PARTS, tirx.SeqStmt([before[0], body, behind[0]]))


def _numbers(region: tirx.BufferRegion) -> int:
    return prod(int(axis.extent) for axis in region.region)


def _narrow(sums: tirx.BufferRegion, lanes: int, added: list[tirx.Var]) -> tirx.BufferRegion:
    """Return where the narrow sums of a vector of sums are, twice as many, in a buffer that is made once."""
    if not added:
        *outer, last = sums.source.ty.shape
        added.append(tirx.decl_buffer([*outer, last * 2], "int16", f"{sums.source.name}_narrow"))
    *outer, within = sums.region
    return tirx.BufferRegion(added[0], [*outer, type(within).from_min_extent(within.min * 2, lanes)])
