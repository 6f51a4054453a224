"""Matrix instructions multiply two rows of data (two pixels) by two of weights; TVM's tensor intrinsics take one row.

A rule writes its tile for an intrinsic of one row, and marks the loop over the rows and the outermost loop of the
reduction. ``pair_rows`` then puts two rows at a time through the instruction. What it accumulates are blocks of
2 rows × 2 lanes; two of them take the place of two rows × 4 lanes until the reduction is done.
"""

from __future__ import annotations

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.intrinsics import Dot, arm
from nnfuze_tvm.schedules.rewrites.regions import Rows, block, load, over_rows, without

_ROWS = "nnfuze.row_pairs"
_REDUCTION = "nnfuze.row_pairs_reduction"


def mark(sch: s_tir.Schedule, reduction: LoopRV, rows: LoopRV, dot: Dot) -> None:
    """Mark the outermost loop of the reduction and the loop over an even number of rows of ``dot``."""
    sch.annotate(reduction, _REDUCTION, 1)
    sch.annotate(rows, _ROWS, dot.steps)


def pair_rows(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked loops take rows in pairs."""

    def visit(loop: tirx.For) -> tirx.Stmt:
        return _reduction(loop) if _REDUCTION in loop.annotations else loop

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, visit)))


def _reduction(loop: tirx.For) -> tirx.Stmt:
    """Return the reduction with its rows in pairs, and behind it the blocks put back into rows."""
    order: list[tirx.Stmt] = []

    def visit(inner: tirx.For) -> tirx.For:
        if _ROWS not in inner.annotations:
            return inner
        steps = int(inner.annotations[_ROWS])
        order.append(over_rows(inner, 2, _separate, _ROWS))
        return over_rows(inner, 2, lambda rows: _multiply(rows, steps), _ROWS)

    body = tvm_ffi.structural_map(loop.body, (tirx.For, visit))
    return tirx.SeqStmt([without(loop, _REDUCTION, body), order[0]])


def _multiply(rows: Rows, steps: int) -> s_tir.SBlockRealize:
    (first, data, weights), (second, other, _) = rows
    numbers = 8 * steps
    both = [arm.signed(load(region, numbers)) for region in (data, other)]
    totals = [load(first, 4), load(second, 4)]
    for step in range(steps):
        own = list(range(8 * step, 8 * step + 8))
        pair = tirx.Shuffle(both, own + [numbers + n for n in own])
        totals = [
            arm.matrix_product(total, pair, load(weights, 16, {-3: step, -2: lane}))
            for total, lane in zip(totals, (0, 2), strict=True)
        ]
    return block([first, second, data, other, weights], [first, second], totals, "row_pair")


def _separate(rows: Rows) -> s_tir.SBlockRealize:
    first, second = rows[0][0], rows[1][0]
    blocks = [load(first, 4), load(second, 4)]
    values = [tirx.Shuffle(blocks, lanes) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]
    return block([first, second], [first, second], values, "row_pair")
