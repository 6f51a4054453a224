"""Long float16 sums: about a hundred products at a time in float16, what they come to in float32.

A float16 has eleven bits: the larger a sum, the more is lost of each product that is added to it. A rule writes its
tile for float16 sums and marks the loops of the reduction. ``sum_in_parts`` then clears the tile for every part of
it, adds the tile to one in float32, and rounds that one to float16 when the reduction is done.
"""

from __future__ import annotations

from collections.abc import Callable
from math import log, prod

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.schedules.blocks import with_buffers
from nnfuze_tvm.schedules.loops import divisors

# About as many products are summed in float16.
_PRODUCTS = 128
_CLEAR = "nnfuze.partial_sums_clear"
_REDUCTION = "nnfuze.partial_sums_reduction"
_PART = "nnfuze.partial_sums_part"


def mark(sch: s_tir.Schedule, init: SBlockRV, reduction: list[LoopRV], products: int) -> list[LoopRV]:
    """Mark a float16 reduction where it is long; return its loops, of which one may have become two.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        The schedule.
    init : SBlockRV
        The block that clears the tile, alone in three loops.
    reduction : list of LoopRV
        The loops of the reduction, outermost first.
    products : int
        Products per sum in one iteration of the last loop.
    """
    extents = [int(sch.get(loop).extent) for loop in reduction]
    lengths = {
        (place, inner): inner * prod(extents[place + 1 :]) * products
        for place, extent in enumerate(extents)
        for inner in divisors(extent, extent)
    }
    place, inner = min(lengths, key=lambda key: abs(log(lengths[key] / _PRODUCTS)))
    if lengths[place, inner] == prod(extents) * products:
        return reduction
    loops = [*reduction[:place], *sch.split(reduction[place], [None, inner]), *reduction[place + 1 :]]
    sch.annotate(sch.get_loops(init)[-3], _CLEAR, 1)
    sch.annotate(loops[0], _REDUCTION, 1)
    sch.annotate(loops[place], _PART, 1)
    return loops


def sum_in_parts(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked reduction is summed in parts."""
    clears: list[tirx.For] = []
    tvm_ffi.structural_walk(
        func.body, (tirx.For, lambda loop: clears.append(loop) if _CLEAR in loop.annotations else None)
    )
    if not clears:
        return func
    clear = clears[0]
    sums = _store(clear).buffer
    total = tirx.decl_buffer(sums.ty.shape, "float32", f"{sums.name}_total")

    def load(buffer: tirx.Var, place: list[tirx.Expr]) -> tirx.Expr:
        return tirx.BufferLoad(buffer, place)

    start = _over_tile(clear, [], total, lambda _: tirx.const(0, "float32"))
    empty = _over_tile(clear, [], sums, lambda _: tirx.const(0, "float16"))
    add = _over_tile(clear, [total, sums], total, lambda at: load(total, at) + tirx.Cast("float32", load(sums, at)))
    finish = _over_tile(clear, [total], sums, lambda at: tirx.Cast("float16", load(total, at)))

    def visit(loop: tirx.For) -> tirx.Stmt:
        if _CLEAR in loop.annotations:
            return start
        body = loop.body
        if _PART in loop.annotations:
            body = tirx.SeqStmt([empty, body, add])
        rest = {key: value for key, value in loop.annotations.items() if key not in (_REDUCTION, _PART)}
        new = tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, rest)
        return tirx.SeqStmt([new, finish]) if _REDUCTION in loop.annotations else new

    return with_buffers(func, tvm_ffi.structural_map(func.body, (tirx.For, visit)), [total])


def _store(nest: tirx.Stmt) -> tirx.BufferStore:
    """Return the only store of a nest of loops, at places in terms of their variables."""
    while isinstance(nest, tirx.For):
        nest = nest.body
    block = nest.block
    bound = dict(zip((it.var for it in block.iter_vars), nest.iter_values, strict=True))
    return tvm_ffi.structural_map(block.body, (tirx.Var, lambda var: bound.get(var, var)))


def _over_tile(
    clear: tirx.For, read: list[tirx.Var], written: tirx.Var, value: Callable[[list[tirx.Expr]], tirx.Expr]
) -> tirx.Stmt:
    """Return a nest like the one that clears the tile, with variables of its own, that stores the value at a place."""
    loops: list[tirx.For] = []
    nest: tirx.Stmt = clear
    while isinstance(nest, tirx.For):
        loops.append(nest)
        nest = nest.body
    own = {loop.loop_var: tirx.Var(loop.loop_var.name, loop.loop_var.ty) for loop in loops}
    store = _store(clear)
    place = [tvm_ffi.structural_map(index, (tirx.Var, lambda var: own.get(var, var))) for index in store.indices]
    reads, writes = (
        [tirx.BufferRegion(buffer, [tvm.ir.Range.from_min_extent(index, 1) for index in place]) for buffer in buffers]
        for buffers in (read, [written])
    )
    inside = tirx.BufferStore(written, value(place), place)
    stmt: tirx.Stmt = s_tir.SBlockRealize([], True, s_tir.SBlock([], reads, writes, f"{written.name}_part", inside))
    for loop in reversed(loops):
        stmt = tirx.For(own[loop.loop_var], loop.min, loop.extent, loop.kind, stmt)
    return stmt
