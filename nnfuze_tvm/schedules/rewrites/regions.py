"""What replaces the tensor intrinsics that a tile was written for: blocks that read and write where these do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import tvm_ffi
from tvm import s_tir, tirx

Rows = Sequence[Sequence[tirx.BufferRegion]]
"""Of each row of a tile that is taken at once, the sums, the data and the weights."""


def over_rows(loop: tirx.For, count: int, body: Callable[[Rows], tirx.Stmt], mark: str) -> tirx.For:
    """Return a copy of a tile's loop over its rows that takes several at once.

    Parameters
    ----------
    loop : tvm.tirx.For
        The loop, with more loops and one block in it.
    count : int
        How many rows are taken at once.
    body : callable
        From their regions to what replaces the block.
    mark : str
        The annotation that the copy doesn't have.
    """
    taken = tirx.Var(loop.loop_var.name, loop.loop_var.ty)

    def block(realize: s_tir.SBlockRealize) -> tirx.Stmt:
        return body([_regions(realize, {loop.loop_var: taken * count + row}) for row in range(count)])

    def renewed(inner: tirx.For) -> tirx.For:
        # The loops inside come several times, each time with variables of their own.
        var = tirx.Var(inner.loop_var.name, inner.loop_var.ty)
        own = tvm_ffi.structural_map(inner.body, (tirx.Var, lambda used: var if used.same_as(inner.loop_var) else used))
        return _with_var(inner, var, inner.extent, own)

    inside = tvm_ffi.structural_map(loop.body, [(s_tir.SBlockRealize, block), (tirx.For, renewed)])
    return _with_var(loop, taken, tirx.IntImm(loop.extent.ty.dtype, int(loop.extent) // count), inside, mark)


def without(loop: tirx.For, mark: str, body: tirx.Stmt) -> tirx.For:
    """Return a loop with another body, and without an annotation."""
    return _with_var(loop, loop.loop_var, loop.extent, body, mark)


def load(region: tirx.BufferRegion, lanes: int, further: Mapping[int, int] | None = None) -> tirx.Expr:
    """Load so many numbers from the begin of a region, or from ``further`` along some of its axes."""
    index = [r.min for r in region.region]
    for axis, offset in (further or {}).items():
        index[axis] = index[axis] + offset
    index[-1] = tirx.Ramp(index[-1], 1, lanes)
    return tirx.BufferLoad(region.source, index)


def block(
    reads: Sequence[tirx.BufferRegion], writes: Sequence[tirx.BufferRegion], values: Sequence[tirx.Expr], name: str
) -> s_tir.SBlockRealize:
    """Return a block that stores vectors; all of them are computed first."""
    names = [tirx.Var(f"sums_{i}", value.ty) for i, value in enumerate(values)]
    stores: tirx.Stmt = tirx.SeqStmt(
        [
            *(tirx.Bind(name, value) for name, value in zip(names, values, strict=True)),
            *(_store(region, name) for region, name in zip(writes, names, strict=True)),
        ]
    )
    return s_tir.SBlockRealize([], True, s_tir.SBlock([], list(reads), list(writes), name, stores))


def _store(region: tirx.BufferRegion, value: tirx.Expr) -> tirx.Stmt:
    index = [r.min for r in region.region]
    index[-1] = tirx.Ramp(index[-1], 1, value.ty.dtype.lanes)
    return tirx.BufferStore(region.source, value, index)


def _with_var(loop: tirx.For, var: tirx.Var, extent: tirx.Expr, body: tirx.Stmt, *dropped: str) -> tirx.For:
    rest = {key: value for key, value in loop.annotations.items() if key not in dropped}
    return tirx.For(var, loop.min, extent, loop.kind, body, loop.thread_binding, rest)


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
