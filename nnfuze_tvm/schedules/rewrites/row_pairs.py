"""Matrix instructions multiply two rows of data (two pixels) by two of weights; TVM's tensor intrinsics take one row.

A rule writes its tile for an intrinsic of one row, and marks the loop over the rows and the outermost loop of the
reduction. ``pair_rows`` then puts two rows at a time through the instruction. What it accumulates are blocks of
2 rows × 2 lanes; two of them take the place of two rows × 4 lanes until the reduction is done.
"""

from __future__ import annotations

from collections.abc import Callable

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.intrinsics import Dot, arm

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
        order.append(_over_pairs(inner, _separate))
        return _over_pairs(inner, _multiply)

    body = tvm_ffi.structural_map(loop.body, (tirx.For, visit))
    return tirx.SeqStmt([_loop(loop, loop.loop_var, loop.extent, body, _REDUCTION), order[0]])


def _loop(loop: tirx.For, var: tirx.Var, extent: tirx.Expr, body: tirx.Stmt, *dropped: str) -> tirx.For:
    rest = {key: value for key, value in loop.annotations.items() if key not in dropped}
    return tirx.For(var, loop.min, extent, loop.kind, body, loop.thread_binding, rest)


def _over_pairs(loop: tirx.For, body: Callable[[list[list[tirx.BufferRegion]], int], tirx.Stmt]) -> tirx.For:
    """Return the loop over pairs of rows, with ``body`` of both rows' regions and the steps at once in it."""
    pair = tirx.Var("pair", loop.loop_var.ty.dtype)
    steps = int(loop.annotations[_ROWS])

    def block(realize: s_tir.SBlockRealize) -> s_tir.SBlockRealize:
        rows = [_regions(realize, {loop.loop_var: pair * 2 + row}) for row in range(2)]
        return body(rows, steps)

    def renewed(inner: tirx.For) -> tirx.For:
        var = tirx.Var(inner.loop_var.name, inner.loop_var.ty)
        body = tvm_ffi.structural_map(
            inner.body, (tirx.Var, lambda used: var if used.same_as(inner.loop_var) else used)
        )
        return _loop(inner, var, inner.extent, body)

    # The loops inside come twice, each time with variables of their own.
    inside = tvm_ffi.structural_map(loop.body, [(s_tir.SBlockRealize, block), (tirx.For, renewed)])
    return _loop(loop, pair, tirx.IntImm(loop.extent.ty.dtype, int(loop.extent) // 2), inside, _ROWS)


def _regions(realize: s_tir.SBlockRealize, row: dict[tirx.Var, tirx.Expr]) -> list[tirx.BufferRegion]:
    """Return where one row's sums, data and weights are."""
    bound = dict(zip((it.var for it in realize.block.iter_vars), realize.iter_values, strict=True))

    def place(expr: tirx.Expr) -> tirx.Expr:
        inner = tvm_ffi.structural_map(expr, (tirx.Var, lambda var: bound.get(var, var)))
        return tvm_ffi.structural_map(inner, (tirx.Var, lambda var: row.get(var, var)))

    return [
        tirx.BufferRegion(region.source, [type(r).from_min_extent(place(r.min), r.extent) for r in region.region])
        for region in realize.block.reads
    ]


def _load(region: tirx.BufferRegion, lanes: int, step: int = 0, lane: int = 0) -> tirx.Expr:
    """Load ``lanes`` numbers from the begin of a region, or from a step's and a lane's weights."""
    index = [r.min for r in region.region]
    if step or lane:
        index[-3], index[-2] = index[-3] + step, index[-2] + lane
    index[-1] = tirx.Ramp(index[-1], 1, lanes)
    return tirx.BufferLoad(region.source, index)


def _store(region: tirx.BufferRegion, value: tirx.Expr) -> tirx.Stmt:
    index = [r.min for r in region.region]
    index[-1] = tirx.Ramp(index[-1], 1, value.ty.dtype.lanes)
    return tirx.BufferStore(region.source, value, index)


def _block(
    reads: list[tirx.BufferRegion], writes: list[tirx.BufferRegion], values: list[tirx.Expr]
) -> s_tir.SBlockRealize:
    """Return a block that stores values; all of them are computed first."""
    names = [tirx.Var(f"sums_{i}", value.ty) for i, value in enumerate(values)]
    stores: tirx.Stmt = tirx.SeqStmt(
        [
            *(tirx.Bind(name, value) for name, value in zip(names, values, strict=True)),
            *(_store(region, name) for region, name in zip(writes, names, strict=True)),
        ]
    )
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], reads, writes, "row_pair", stores))


def _multiply(rows: list[list[tirx.BufferRegion]], steps: int) -> s_tir.SBlockRealize:
    (first, data, weights), (second, other, _) = rows
    numbers = 8 * steps
    both = [_signed(_load(region, numbers)) for region in (data, other)]
    totals = [_load(first, 4), _load(second, 4)]
    for step in range(steps):
        own = list(range(8 * step, 8 * step + 8))
        pair = tirx.Shuffle(both, own + [numbers + n for n in own])
        totals = [
            arm.matrix_product(total, pair, _load(weights, 16, step, lane))
            for total, lane in zip(totals, (0, 2), strict=True)
        ]
    return _block([first, second, data, other, weights], [first, second], totals)


def _signed(data: tirx.Expr) -> tirx.Expr:
    return tirx.reinterpret(f"int8x{data.ty.dtype.lanes}", data)


def _separate(rows: list[list[tirx.BufferRegion]], _: int) -> s_tir.SBlockRealize:
    first, second = rows[0][0], rows[1][0]
    blocks = [_load(first, 4), _load(second, 4)]
    values = [tirx.Shuffle(blocks, lanes) for lanes in ([0, 1, 4, 5], [2, 3, 6, 7])]
    return _block([first, second], [first, second], values)
