"""The last channels of a layer, where it has fewer than its tiles.

A tile computes whole vectors of channels, and what follows is done for those that the layer has. A loop over vectors
that guards every channel with a condition would store them one by one. A rule marks the loop over the vectors of a
tile; ``cut_tails`` stores what is whole in whole vectors, and of the last block of channels what is left in a shorter
one.
"""

from __future__ import annotations

import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV

_KEY = "nnfuze.tail"
_BLOCK = "nnfuze.tail_block"


def mark(sch: s_tir.Schedule, block: LoopRV, vectors: LoopRV, lanes: int, channels: int) -> None:
    """Mark the loop over blocks of channels and, in it, the loop over the vectors of a tile.

    A vector has so many ``lanes``, or fewer where there are only fewer ``channels``.
    """
    sch.annotate(block, _BLOCK, channels)
    sch.annotate(vectors, _KEY, lanes)


def cut_tails(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked loops run over a layer's own channels."""

    def visit(loop: tirx.For) -> tirx.For:
        if _BLOCK not in loop.annotations:
            return loop

        def cut(inner: tirx.For) -> tirx.Stmt:
            return _cut(inner, loop) if _KEY in inner.annotations else inner

        rest = {key: value for key, value in loop.annotations.items() if key != _BLOCK}
        body = tvm_ffi.structural_map(loop.body, (tirx.For, cut))
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, rest)

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, visit)))


def _cut(vectors: tirx.For, block: tirx.For) -> tirx.Stmt:
    """Return the loop over the vectors of a tile, one for all blocks of channels but the last, and one for that."""
    lanes, count, blocks = int(vectors.annotations[_KEY]), int(vectors.extent), int(block.extent)
    rest = int(block.annotations[_BLOCK]) - (blocks - 1) * count * lanes
    if rest <= 0:
        raise ValueError("a block of channels holds none")
    parts = [_stores(vectors, 0, rest // lanes, lanes)] if rest >= lanes else []
    # LLVM computes vectors whose lanes are no power of two one by one.
    done = rest // lanes * lanes
    while done < rest:
        size = 1 << ((rest - done).bit_length() - 1)
        parts.append(_stores(vectors, done, 1, size))
        done += size
    last = tirx.SeqStmt(parts) if len(parts) > 1 else parts[0]
    if blocks == 1:
        return last
    return tirx.IfThenElse(block.loop_var < blocks - 1, _stores(vectors, 0, count, lanes), last)


def _stores(vectors: tirx.For, first: int, count: int, lanes: int) -> tirx.Stmt:
    """Return ``count`` vectors of so many lanes, from channel ``first`` of a tile on."""
    inner = vectors.body
    assert isinstance(inner, tirx.For)
    vector, lane = (tirx.Var(loop.loop_var.name, loop.loop_var.ty) for loop in (vectors, inner))
    width = int(vectors.annotations[_KEY])
    values = {vectors.loop_var: vector + first // width, inner.loop_var: lane + first % width}

    def unguarded(realize: s_tir.SBlockRealize) -> s_tir.SBlockRealize:
        return s_tir.SBlockRealize(realize.iter_values, True, realize.block)

    body = tvm_ffi.structural_map(inner.body, (s_tir.SBlockRealize, unguarded))
    body = tvm_ffi.structural_map(body, (tirx.Var, lambda var: values.get(var, var)))
    extents = [tirx.IntImm(loop.loop_var.ty.dtype, size) for loop, size in ((vectors, count), (inner, lanes))]
    body = tirx.For(
        lane, inner.min, extents[1], inner.kind, body, inner.thread_binding, dict(inner.annotations.items())
    )
    rest = {key: value for key, value in vectors.annotations.items() if key != _KEY}
    return tirx.For(vector, vectors.min, extents[0], vectors.kind, body, vectors.thread_binding, rest)
