"""First and last iterations of a loop over tiles with code of their own.

Tiles at the rim of an image meet its padding, and where their size does not divide the extent the last one is smaller.
Conditions on every iteration would cost the inner loops their unrolling. A rule marks the loop over the tiles, and the
loops in it that are shorter in the last tile; ``peel_loops`` then takes the first tile and the last one out of the
loop, and the simplifier decides the conditions in all three. Unlike ``overlap``'s, such tiles compute nothing twice and
may stand in any nest, but their code comes up to three times.
"""

from __future__ import annotations

from collections.abc import Sequence

import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.blocks import with_buffers

_TILES = "nnfuze.peel"
_FIRST = "nnfuze.peel_first"
_REST = "nnfuze.peel_rest"
_INSIDE = "nnfuze.peel_inside"
_KEEPS = "nnfuze.peel_keeps"


def mark(
    sch: s_tir.Schedule,
    tiles: LoopRV,
    name: str,
    inside: Sequence[LoopRV] = (),
    rest: int = 0,
    first: bool = False,
    keeps: bool = False,
) -> None:
    """Mark the loop over the tiles of an axis, which ``name`` tells from other axes.

    Of the loops ``inside``, the last tile has ``rest`` iterations, or all of them if that is 0. The ``first`` tile
    stays in the loop if it is not said to be different. A loop ``keeps`` what the next tile goes on with: sums.
    """
    sch.annotate(tiles, _TILES, name)
    sch.annotate(tiles, _FIRST, int(first))
    sch.annotate(tiles, _REST, rest)
    sch.annotate(tiles, _KEEPS, int(keeps))
    for loop in inside:
        sch.annotate(loop, _INSIDE, name)


def peel_loops(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel in which the first and the last iterations of marked loops are separate."""
    added: list[tirx.Var] = []

    def visit(loop: tirx.For) -> tirx.Stmt:
        return _peel(loop, added) if _TILES in loop.annotations else loop

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    if body.same_as(func.body):
        return func
    return with_buffers(func, body, added)


def _peel(loop: tirx.For, added: list[tirx.Var]) -> tirx.Stmt:
    """Return the loop in up to three parts; new buffers go to ``added``."""
    name, first, rest = str(loop.annotations[_TILES]), int(loop.annotations[_FIRST]), int(loop.annotations[_REST])
    dtype, count = loop.loop_var.ty.dtype, int(loop.extent)
    marks = (_TILES, _FIRST, _REST, _KEEPS)
    annotations = {key: value for key, value in loop.annotations.items() if key not in marks}
    if count == 1:
        return _copy(loop, name, rest, tirx.IntImm(dtype, 0), added)
    start = 1 if first else 0
    var = tirx.Var(loop.loop_var.name, loop.loop_var.ty)
    parallel = loop.kind == tirx.ForKind.PARALLEL
    place = var if parallel else var + start
    parts = [_copy(loop, name, 0, tirx.IntImm(dtype, 0), added)] if first else []
    last = _copy(loop, name, rest, tirx.IntImm(dtype, count - 1), added)
    if parallel:
        body = _copy(loop, name, 0, place, added)
        body = tirx.IfThenElse(place >= count - 1, last, body)
        body = tirx.IfThenElse(place < 1, parts[0], body) if first else body
        return tirx.For(var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, annotations)
    if count - 1 - start > 0:
        middle = _copy(loop, name, 0, place, added)
        extent = tirx.IntImm(dtype, count - 1 - start)
        parts.append(tirx.For(var, loop.min, extent, loop.kind, middle, loop.thread_binding, annotations))
    return tirx.SeqStmt([*parts, last])


def _copy(loop: tirx.For, name: str, rest: int, place: tirx.Expr, added: list[tirx.Var]) -> tirx.Stmt:
    """Return the loop's body at one place, with loops and buffers of its own."""
    values: dict[tirx.Var, tirx.Expr] = {loop.loop_var: place}
    # What holds the tile's results until they are finished.
    read: list[tirx.Var] = []
    written: list[tirx.Var] = []
    tvm_ffi.structural_walk(
        loop.body,
        [
            (TensorLoad, lambda load: read.append(load.source)),
            (tirx.BufferStore, lambda store: written.append(store.buffer)),
        ],
    )
    for buffer in written if not int(loop.annotations[_KEEPS]) else ():
        if buffer in read and buffer not in values:
            values[buffer] = tirx.Var(buffer.name, buffer.ty)
            added.append(values[buffer])

    def renewed(inner: tirx.For) -> tirx.For:
        values[inner.loop_var] = var = tirx.Var(inner.loop_var.name, inner.loop_var.ty)
        annotations = dict(inner.annotations.items())
        extent = inner.extent
        if str(annotations.get(_INSIDE, "")) == name:
            del annotations[_INSIDE]
            extent = tirx.IntImm(extent.ty.dtype, rest) if rest else extent
        return tirx.For(var, inner.min, extent, inner.kind, inner.body, inner.thread_binding, annotations)

    body = tvm_ffi.structural_map(loop.body, (tirx.For, renewed))
    return tvm_ffi.structural_map(body, (tirx.Var, lambda var: values.get(var, var)))
