"""Tiles of one size where the size does not divide the extent: the last one is moved back, over the one before it.

A loop that was split into tiles that don't fill its extent guards every access with a condition, which costs the
inner loops their unrolling and their vectors. A rule marks the loop over the tiles; ``overlap_tiles`` then starts the
last tile early, so that it ends with the extent, and drops the conditions on it. What lies in both tiles is computed
twice, to the same values: only tiles that hold whole reductions may be marked.
"""

from __future__ import annotations

import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.blocks import uses

_KEY = "nnfuze.overlap"


def mark(sch: s_tir.Schedule, tiles: LoopRV, extent: int) -> None:
    """Mark the loop over the tiles of an axis of ``extent`` elements."""
    sch.annotate(tiles, _KEY, extent)


def overlap_tiles(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked loops run over whole tiles, the last one moved back."""

    def visit(loop: tirx.For) -> tirx.For:
        if _KEY not in loop.annotations:
            return loop
        extent = int(loop.annotations[_KEY])
        rest = {key: value for key, value in loop.annotations.items() if key != _KEY}
        body = tvm_ffi.structural_map(
            loop.body, (s_tir.SBlockRealize, lambda realize: _moved(realize, loop.loop_var, extent))
        )
        return tirx.For(loop.loop_var, loop.min, loop.extent, loop.kind, body, loop.thread_binding, rest)

    return func.with_body(tvm_ffi.structural_map(func.body, (tirx.For, visit)))


def _moved(realize: s_tir.SBlockRealize, tile: tirx.Var, extent: int) -> s_tir.SBlockRealize:
    """Return a block's realization with ``tile · size`` replaced by where the tile starts."""
    values = list(realize.iter_values)
    inside = False
    for position, value in enumerate(values):
        linear = sym.detect_linear_equation(value, [tile])
        if len(linear) != 2 or not isinstance(linear[0], tirx.IntImm):
            raise ValueError(f"{value} does not grow with the tile")
        if int(linear[0]) != 0:
            inside = True
            values[position] = tirx.Min(tile * linear[0], extent - linear[0]) + linear[1]
    if not inside:
        return realize
    return s_tir.SBlockRealize(values, _but_of(realize.predicate, tile), realize.block)


def _but_of(predicate: tirx.PrimExpr, tile: tirx.Var) -> tirx.PrimExpr:
    """Return what is left of a condition without what it says of the tiles: other axes may have tiles, too."""
    if isinstance(predicate, tirx.And):
        parts = [_but_of(part, tile) for part in (predicate.a, predicate.b)]
        left = [part for part in parts if not isinstance(part, tirx.IntImm)]
        return tirx.And(*left) if len(left) == 2 else left[0] if left else parts[0]
    return tirx.const(True, "bool") if uses(predicate, tile) else predicate
