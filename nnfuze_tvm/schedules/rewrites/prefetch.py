"""Weights of the next channel block are asked for while the tiles of this one are computed.

A layer on a small image has more weights than pixels. Each channel block's weights are read in one stream, and the
first tile that uses them waits for DRAM or L3, while the tiles after it find them in the near caches and leave the
memory idle. A rule marks the loop over the tiles and one loop inside their reduction; ``prefetch_weights`` then puts
into every iteration of the latter the prefetch of a few lines of the next block, so that the stream never stops.
"""

from __future__ import annotations

from math import prod

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.devices.hardware import LINE_BYTES
from nnfuze_tvm.schedules.loops import divisors

_WEIGHTS = "nnfuze.prefetch_weights"
_LINES = "nnfuze.prefetch_lines"
_READ, _TO_L2, _DATA_CACHE = 0, 2, 1


def mark(sch: s_tir.Schedule, tiles: LoopRV, reduction: list[LoopRV], weights: str, block_bytes: int) -> list[LoopRV]:
    """Mark the loop over the tiles of a channel block, and a loop inside whose iterations prefetch the next block.

    Returns the loops of the reduction, of which the last one has become two.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        The schedule.
    tiles : LoopRV
        The loop over the tiles.
    reduction : list of LoopRV
        The loops of the reduction inside of it.
    weights : str
        Name of the packed weights' buffer, whose first axis counts the channel blocks.
    block_bytes : int
        Bytes of one channel block's weights, whose prefetches are spread evenly over the tiles.
    """
    count = int(sch.get(tiles).extent)
    window = prod(int(sch.get(loop).extent) for loop in reduction[:-1])
    steps = int(sch.get(reduction[-1]).extent)
    lines = -(-block_bytes // (LINE_BYTES * count * window))
    # In bursts of a few lines, which the load buffers hold.
    groups = next((n for n in reversed(divisors(steps, steps)) if lines <= 4 * n), steps)
    inside, rest = sch.split(reduction[-1], [groups, None])
    sch.annotate(tiles, _WEIGHTS, weights)
    sch.annotate(inside, _LINES, -(-lines // groups))
    return [*reduction[:-1], inside, rest]


def prefetch_weights(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel with the marked prefetches."""

    def visit(loop: tirx.For) -> tirx.For:
        return _tiles(loop) if _WEIGHTS in loop.annotations else loop

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, visit)))


def _tiles(tiles: tirx.For) -> tirx.For:
    weights, block = _weights(tiles)

    def descend(stmt: tirx.Stmt, nest: list[tirx.For]) -> tirx.Stmt:
        if isinstance(stmt, tirx.SeqStmt):
            return tirx.SeqStmt([descend(part, nest) for part in stmt.seq])
        if not isinstance(stmt, tirx.For):
            return stmt
        nest = [*nest, stmt]
        if _LINES in stmt.annotations:
            fetches = _fetches(weights, block, nest, int(stmt.annotations[_LINES]))
            body: tirx.Stmt = tirx.SeqStmt([*fetches, stmt.body])
        else:
            body = descend(stmt.body, nest)
        rest = {key: value for key, value in stmt.annotations.items() if key not in (_WEIGHTS, _LINES)}
        return tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body, stmt.thread_binding, rest)

    return descend(tiles, [])


def _weights(tiles: tirx.For) -> tuple[tirx.Var, tirx.Expr]:
    """Return the buffer of packed weights, and the channel block that these tiles use."""
    name = str(tiles.annotations[_WEIGHTS])
    inner: dict[tirx.Var, tirx.Expr] = {}
    found: list[tuple[tirx.Var, tirx.Expr]] = []

    def use(realize: s_tir.SBlockRealize) -> None:
        for region in realize.block.reads:
            if region.source.name == name and not found:
                bound = dict(zip((it.var for it in realize.block.iter_vars), realize.iter_values, strict=True))
                found.append((region.source, _with(region.region[0].min, bound)))

    def bind(loop: tirx.For) -> None:
        inner[loop.loop_var] = tirx.IntImm(loop.loop_var.ty.dtype, 0)

    tvm_ffi.structural_walk(tiles.body, [(s_tir.SBlockRealize, use), (tirx.For, bind)])
    (weights, block), *_ = found
    return weights, sym.Analyzer().simplify(_with(block, inner))


def _with(expr: tirx.Expr, values: dict[tirx.Var, tirx.Expr]) -> tirx.Expr:
    return tvm_ffi.structural_map(expr, (tirx.Var, lambda var: values.get(var, var)))


def _fetches(weights: tirx.Var, block: tirx.Expr, nest: list[tirx.For], lines: int) -> list[tirx.Stmt]:
    """Return the prefetches of one iteration of a nest: its share of the channel block after ``block``."""
    blocks, *shape = (int(extent) for extent in weights.ty.shape)
    following = tirx.Min(block + 1, tirx.IntImm(block.ty.dtype, blocks - 1))
    iteration = nest[0].loop_var
    for loop in nest[1:]:
        iteration = iteration * loop.extent + loop.loop_var
    per_line = LINE_BYTES * 8 // tvm.DataType(weights.ty.dtype).bits
    fetches = []
    for line in range(lines):
        # An index of the last axis beyond its extent: buffers are flat, and this spares the divisions.
        index = [following, *[tirx.IntImm(block.ty.dtype, 0)] * (len(shape) - 1), (iteration * lines + line) * per_line]
        address = tirx.address_of(tirx.BufferLoad(weights, index))
        fetches.append(tirx.Evaluate(tirx.call_intrin("void", "tirx.prefetch", address, _READ, _TO_L2, _DATA_CACHE)))
    return fetches
