"""A scheduled kernel as stages: nests of loops that make what they write row by row."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad
from tvm.target import Target

from nnfuze_tvm.schedules.bands.progress import Reach
from nnfuze_tvm.schedules.loops import plain

# Rows are along this axis, of images and of sequences alike.
ROWS = 1

_PLAIN = (tirx.ForKind.SERIAL, tirx.ForKind.PARALLEL)


@dataclass(frozen=True)
class Stage:
    """One nest of loops.

    Attributes
    ----------
    blocks : tuple of tirx.Var and int
        The loops around the rows, with their extents.
    row : tirx.Var
        The loop over tiles of rows.
    body : tirx.Stmt
        What one iteration does.
    writes : tirx.Var
        The buffer that it fills.
    tile, iterations : int
        Rows per iteration, and the number of these.
    reads : dict of tirx.Var to Reach
        What one iteration reads of buffers, by rows.
    work : float
        Elements that all iterations store, sums that go on included.
    """

    blocks: tuple[tuple[Any, int], ...]
    row: Any
    body: Any
    writes: Any
    tile: int
    iterations: int
    reads: dict[Any, Reach]
    work: float


@dataclass(frozen=True)
class Kernel:
    """A scheduled kernel: its parameters, the last of them its result, the buffers between its stages, and these."""

    params: tuple[Any, ...]
    buffers: tuple[Any, ...]
    stages: tuple[Stage, ...]


@dataclass
class _Access:
    """A load or a store: of which row, and in which iteration over rows if there is only one."""

    buffer: Any
    row: Any
    stored: bool
    only: int | None


@dataclass
class _Found:
    """What a nest does to the buffers that are looked at; not clear if anything else might be done to them."""

    buffers: set[Any]
    row: Any
    last: int
    extents: dict[Any, int] = field(default_factory=dict)
    accesses: list[_Access] = field(default_factory=list)
    work: float = 0.0
    clear: bool = True


def kernel(func: tirx.PrimFunc, target: Target) -> Kernel | None:
    """Return a scheduled kernel's stages, or None where one of its nests does not make rows one after the other."""
    if any(not hasattr(param, "shape") for param in func.params) or len(func.params[-1].shape) <= ROWS:
        return None
    func = plain(func, target)
    parts = list(func.body.seq) if isinstance(func.body, tirx.SeqStmt) else [func.body]
    inner = [part.buffer for part in parts if isinstance(part, tirx.AllocBuffer)]
    looked_at = {*inner, *(param for param in func.params if len(param.shape) > ROWS)}
    stages: list[Stage] = []
    for nest in (part for part in parts if not isinstance(part, tirx.AllocBuffer)):
        found = _stage(nest, looked_at)
        if found is None or found.writes in {stage.writes for stage in stages}:
            return None
        stages.append(found)
    written = {stage.writes for stage in stages}
    if written != {*inner, func.params[-1]} or stages[-1].writes not in func.params[-1:]:
        return None
    return Kernel(tuple(func.params), tuple(inner), tuple(stages))


def _stage(nest: Any, looked_at: set[Any]) -> Stage | None:
    """Return a nest as a stage, or None if it isn't one."""
    loops: list[Any] = []
    while (
        isinstance(nest, tirx.For) and nest.kind in _PLAIN and _is(nest.min, 0) and isinstance(nest.extent, tirx.IntImm)
    ):
        loops.append(nest)
        nest = nest.body
    stores = [store for store in find(loops[0], tirx.BufferStore) if store.buffer in looked_at] if loops else []
    if len({store.buffer for store in stores}) != 1 or len(stores[0].indices) <= ROWS:
        return None
    rows = int(stores[0].buffer.shape[ROWS])
    for depth, loop in enumerate(loops):
        if any(uses(store.indices[ROWS], loop.loop_var) for store in stores):
            around = [(each.loop_var, int(each.extent)) for each in loops[:depth]]
            for block, body in _rows_of(loop, rows):
                stage = _checked([*around, *block], body, stores[0].buffer, looked_at)
                if stage is not None:
                    return stage
            return None
    return None


def _rows_of(loop: Any, rows: int) -> Iterator[tuple[list[tuple[Any, int]], tuple[Any, int, Any]]]:
    """Yield what a loop may be: one over rows, or over rows in each block, or over blocks in each row."""
    extent, var = int(loop.extent), loop.loop_var
    yield [], (var, extent, loop.body)
    if 1 < rows < extent and extent % rows == 0:
        row, block = tirx.Var("row", var.ty), tirx.Var("block", var.ty)
        yield (
            [(block, extent // rows)],
            (row, rows, _split(loop, block * rows + row, {block: extent // rows, row: rows})),
        )


def _split(loop: Any, place: Any, extents: dict[Any, int]) -> Any:
    """Return a fused loop's body with its variable put together from two."""
    analyzer = sym.Analyzer()
    for var, extent in extents.items():
        analyzer.bind(var, tvm.ir.Range(0, extent))
    body = tvm_ffi.structural_map(loop.body, (tirx.Var, lambda var: place if var.same_as(loop.loop_var) else var))
    return tvm_ffi.structural_map(body, [(tirx.FloorDiv, analyzer.simplify), (tirx.FloorMod, analyzer.simplify)])


def _checked(
    blocks: list[tuple[Any, int]], nest: tuple[Any, int, Any], writes: Any, looked_at: set[Any]
) -> Stage | None:
    """Return a stage if each iteration writes rows of its own, and reads rows at a fixed distance from them."""
    row, iterations, body = nest
    found = _Found(looked_at, row, iterations - 1)
    found.extents.update(dict(blocks))
    _walk(body, found, None, 1.0)
    if not found.clear:
        return None
    reaches: dict[tuple[Any, bool], Reach] = {}
    for access in sorted(found.accesses, key=lambda access: access.only is not None):
        reach = _reach(access, found, reaches.get((access.buffer, access.stored)))
        if reach is None:
            return None
        reaches[access.buffer, access.stored] = reach
    rows = int(writes.shape[ROWS])
    own = reaches[writes, True]
    tile = own.step if iterations > 1 else rows
    again = reaches.pop((writes, False), own)
    if tile < 1 or (own.low, own.high) != (0, tile - 1) or -(-rows // tile) != iterations:
        return None
    if (again.step, again.low >= 0, again.high < tile) != (own.step, True, True):
        return None
    reads = {buffer: reach for (buffer, stored), reach in reaches.items() if not stored}
    work = found.work * iterations * prod(extent for _, extent in blocks)
    return Stage(tuple(blocks), row, body, writes, tile, iterations, reads, work)


def _reach(access: _Access, found: _Found, known: Reach | None) -> Reach | None:
    """Return the rows of all accesses to a buffer so far and of one more, if they move evenly."""
    analyzer = sym.Analyzer()
    for var, extent in found.extents.items():
        analyzer.bind(var, tvm.ir.Range(0, extent))
    parts = sym.detect_linear_equation(access.row, [found.row])
    if len(parts) != 2 or not isinstance(parts[0], tirx.IntImm):
        return None
    bound = analyzer.const_int_bound(analyzer.simplify(parts[1]))
    step, low, high = int(parts[0]), int(bound.min_value), int(bound.max_value)
    if max(-low, high) > 1 << 30:
        return None
    if access.only is not None:
        # Its rows, as if they were those of any iteration.
        moved = (step - (known.step if known else step)) * access.only
        step, low, high = (known.step if known else step), low + moved, high + moved
    if known is not None:
        if known.step != step:
            return None
        low, high = min(low, known.low), max(high, known.high)
    return Reach(step, low, high)


def _walk(stmt: Any, found: _Found, only: int | None, times: float) -> None:
    """Collect what a statement does; anything unknown is not clear."""
    if isinstance(stmt, tirx.SeqStmt):
        for part in stmt.seq:
            _walk(part, found, only, times)
    elif isinstance(stmt, tirx.For):
        if not isinstance(stmt.extent, tirx.IntImm) or int(stmt.min) != 0:
            found.clear = False
            return
        found.extents[stmt.loop_var] = int(stmt.extent)
        _walk(stmt.body, found, only, times * int(stmt.extent))
    elif isinstance(stmt, tirx.IfThenElse):
        _loads(stmt.condition, found, only)
        _walk(stmt.then_case, found, _iteration(stmt.condition, found) if only is None else only, times)
        if stmt.else_case is not None:
            _walk(stmt.else_case, found, only, times)
    elif isinstance(stmt, tirx.BufferStore):
        _loads(stmt, found, only)
        found.work += times * tvm.DataType(str(stmt.value.ty.dtype)).lanes
        if stmt.buffer in found.buffers:
            found.accesses.append(_Access(stmt.buffer, stmt.indices[ROWS], True, only))
    elif isinstance(stmt, tirx.Evaluate | tirx.Bind):
        _loads(stmt, found, only)
    elif not isinstance(stmt, tirx.AllocBuffer):
        found.clear = False


def _loads(node: Any, found: _Found, only: int | None) -> None:
    for load in find(node, TensorLoad):
        if load.source in found.buffers:
            found.accesses.append(_Access(load.source, load.indices[ROWS], False, only))
    loaded = {load.source for load in find(node, TensorLoad)}
    if isinstance(node, tirx.BufferStore):
        loaded.add(node.buffer)
    if any(var in found.buffers and var not in loaded for var in find(node, tirx.Var)):
        found.clear = False


def _iteration(condition: Any, found: _Found) -> int | None:
    """Return the only iteration over rows in which a condition holds, if that is plain: the first one or the last."""
    if isinstance(condition, tirx.LT) and condition.a.same_as(found.row) and _is(condition.b, 1):
        return 0
    if isinstance(condition, tirx.EQ) and condition.a.same_as(found.row) and _is(condition.b, found.last):
        return found.last
    if isinstance(condition, tirx.LE) and condition.b.same_as(found.row) and _is(condition.a, found.last):
        return found.last
    return None


def _is(value: Any, number: int) -> bool:
    return isinstance(value, tirx.IntImm) and int(value) == number


def find(node: Any, kind: Any) -> list[Any]:
    """Return all nodes of a kind."""
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (kind, found.append))
    return found


def uses(node: Any, var: Any) -> bool:
    """Tell whether a node mentions a variable."""
    return any(each.same_as(var) for each in find(node, tirx.Var))


def renewed(stmt: Any, values: dict[Any, Any]) -> Any:
    """Return a statement with loops and buffers of its own, and with ``values`` for some variables."""
    values = dict(values)

    def loop(node: tirx.For) -> tirx.For:
        values[node.loop_var] = var = tirx.Var(node.loop_var.name, node.loop_var.ty)
        annotations = dict(node.annotations.items())
        return tirx.For(var, node.min, node.extent, node.kind, node.body, node.thread_binding, annotations)

    def bound(node: tirx.Bind) -> tirx.Bind:
        values[node.var] = var = tirx.Var(node.var.name, node.var.ty)
        return tirx.Bind(var, node.value)

    def allocation(node: tirx.AllocBuffer) -> tirx.AllocBuffer:
        values[node.buffer] = buffer = tirx.Var(node.buffer.name, node.buffer.ty)
        return tirx.AllocBuffer(buffer, node.annotations)

    stmt = tvm_ffi.structural_map(stmt, [(tirx.For, loop), (tirx.Bind, bound), (tirx.AllocBuffer, allocation)])
    return tvm_ffi.structural_map(stmt, (tirx.Var, lambda var: values.get(var, var)))
