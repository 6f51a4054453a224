"""Squares of numbers in whole vectors: transposed copies, and outer products, by element.

TVM's tensor intrinsics would do, but not where the tiles around them overlap. A rule marks the outer one of two loops
over a square, without conditions, of a block that copies one number (the outer loop runs over what stands side by side
in the copy, the inner one over what does in the source), or adds one product to a sum (the inner loop runs over what
stands side by side in the sums).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.schedule import LoopRV

_KEY = "nnfuze.square"


def mark(sch: s_tir.Schedule, rows: LoopRV) -> None:
    """Mark the outer loop of a square."""
    sch.annotate(rows, _KEY, 1)


def vectorize_squares(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel that computes each marked square at once."""

    def visit(loop: tirx.For) -> tirx.Stmt:
        return _square(loop) if _KEY in loop.annotations else loop

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, visit)))


def _square(rows: tirx.For) -> tirx.Stmt:
    columns = rows.body
    height, width = int(rows.extent), int(columns.extent)
    realize = columns.body
    block = realize.block
    bound = dict(zip((it.var for it in block.iter_vars), realize.iter_values, strict=True))

    def place(index: tirx.Expr, row: int, column: int) -> tirx.Expr:
        values = {
            loop.loop_var: tirx.IntImm(loop.loop_var.ty.dtype, value)
            for loop, value in ((rows, row), (columns, column))
        }
        return _with(_with(index, bound), values)

    def vector(indices: Sequence[tirx.Expr], row: int, lanes: int) -> list[tirx.Expr]:
        """Return the indices of ``lanes`` numbers that begin in the first column of a row."""
        *before, last = (place(index, row, 0) for index in indices)
        return [*before, tirx.Ramp(last, 1, lanes)]

    def load(source: TensorLoad, row: int, lanes: int) -> tirx.Expr:
        return tirx.BufferLoad(source.source, vector(source.indices, row, lanes))

    def region(part: tirx.BufferRegion) -> tirx.BufferRegion:
        """Return what the square reads or writes of a buffer, from what one number does."""
        ranges = []
        for index in part.region:
            low, high = place(index.min, 0, 0), place(index.min, height - 1, width - 1)
            ranges.append(tvm.ir.Range.from_min_extent(low, sym.Analyzer().simplify(high - low + 1)))
        return tirx.BufferRegion(part.source, ranges)

    store = block.body
    if isinstance(store.value, TensorLoad):
        # Beyond its end, the last row is copied again; the simplifier knows where that can't be.
        inside = {it.var: tirx.Min(it.var, it.dom.extent - 1) for it in block.iter_vars}
        value = tirx.BufferLoad(store.value.source, [_with(index, inside) for index in store.value.indices])
        source = [load(value, row, width) for row in range(height)]
        # Beyond the extent of the last axis: buffers are flat.
        order = [row * width + column for column in range(width) for row in range(height)]
        square = tirx.Shuffle(source, order)
        body: tirx.Stmt = tirx.BufferStore(store.buffer, square, vector(store.indices, 0, len(order)))
    else:
        sums, (data, weights) = store.value.a, (store.value.b.a, store.value.b.b)
        numbers, factors = load(data, 0, height), load(weights, 0, width)
        totals = [load(sums, row, width) + tirx.Shuffle([numbers], [row] * width) * factors for row in range(height)]
        indices = [vector(store.indices, row, width) for row in range(height)]
        body = tirx.SeqStmt(
            [tirx.BufferStore(store.buffer, total, place) for total, place in zip(totals, indices, strict=True)]
        )
    reads, writes = ([region(part) for part in parts] for parts in (block.reads, block.writes))
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], reads, writes, "square", body))


def _with(expr: tirx.Expr, values: Mapping[tirx.Var, tirx.Expr]) -> tirx.Expr:
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))
