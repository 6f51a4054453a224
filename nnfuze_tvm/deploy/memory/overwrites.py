"""Whether a kernel may write its result over one of its operands.

It may if, element by element, all that reads the operand comes before what writes the result. Loops of static extents
tell when that is: every access is enumerated with the values of the loops around it. Of iterations of a parallel or a
vectorized loop none comes before another. Conditions are taken to hold where indices are within their bounds, so that
more counts as read and written than may be.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import Call, TensorLoad

# Accesses that are worth enumerating.
_MOST = 1 << 22
_UNORDERED = (tirx.ForKind.PARALLEL, tirx.ForKind.VECTORIZED)
_ARITHMETIC = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
    tirx.Min: np.minimum,
    tirx.Max: np.maximum,
}


class _UnknownError(Exception):
    """What an index is can't be told before the kernel runs."""


@dataclass(frozen=True)
class _Access:
    """A load or a store: its indices, and the loops and the places in sequences on the way to it."""

    indices: Sequence[Any]
    path: tuple[tirx.For | int, ...]


@dataclass
class _Accesses:
    """All loads of one buffer and all stores to another in a kernel."""

    source: tirx.Var
    result: tirx.Var
    loads: list[_Access] = field(default_factory=list)
    stores: list[_Access] = field(default_factory=list)
    bound: dict[tirx.Var, Any] = field(default_factory=dict)

    def visit(self, stmt: tirx.Stmt, path: tuple[tirx.For | int, ...]) -> None:
        """Collect the accesses of a statement."""
        if isinstance(stmt, tirx.SeqStmt):
            for place, part in enumerate(stmt.seq):
                self.visit(part, (*path, place))
        elif isinstance(stmt, tirx.For):
            self._read(stmt.extent, (*path, 0))
            self.visit(stmt.body, (*path, 1, stmt))
        elif isinstance(stmt, tirx.IfThenElse):
            self._read(stmt.condition, (*path, 0))
            for place, part in enumerate((stmt.then_case, stmt.else_case), 1):
                if part is not None:
                    self.visit(part, (*path, place))
        elif isinstance(stmt, tirx.BufferStore):
            for part in (stmt.value, *stmt.indices):
                self._read(part, (*path, 0))
            if stmt.buffer.same_as(self.result):
                self.stores.append(_Access(stmt.indices, (*path, 1)))
        elif isinstance(stmt, tirx.Bind):
            self._read(stmt.value, path)
            self.bound[stmt.var] = stmt.value
        elif isinstance(stmt, tirx.AttrStmt):
            self.visit(stmt.body, path)
        elif isinstance(stmt, tirx.Evaluate):
            self._read(stmt.value, path)
        elif not isinstance(stmt, tirx.AllocBuffer):
            raise _UnknownError

    def _read(self, expr: Any, path: tuple[tirx.For | int, ...]) -> None:
        for load in _loads(expr, self.source):
            self.loads.append(_Access(load.indices, path))


def may_overwrite(func: tirx.PrimFunc, result: tirx.Var, source: tirx.Var) -> bool:
    """Tell whether a kernel computes the same with one buffer for an operand and its result.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        A kernel of loops, without blocks.
    result, source : tvm.tirx.Var
        Two of its parameters, of one shape and of numbers of one size: one that it writes and one that it reads.
    """
    found = _Accesses(source, result)
    try:
        found.visit(func.body, ())
        if not found.stores or _mentions(func, source) != len(found.loads):
            return False
        if _mentions(func, result) != len(found.stores) + len(_loads(func.body, result)):
            return False
        shape = [int(extent) for extent in source.ty.shape]
        return all(_before(load, store, shape, found.bound) for load in found.loads for store in found.stores)
    except _UnknownError:
        return False


def _loads(node: Any, buffer: tirx.Var) -> list[TensorLoad]:
    found: list[TensorLoad] = []

    def collect(load: TensorLoad) -> None:
        if load.source.same_as(buffer):
            found.append(load)

    tvm_ffi.structural_walk(node, (TensorLoad, collect))
    return found


def _mentions(func: tirx.PrimFunc, buffer: tirx.Var) -> int:
    """Return how often a buffer is read, written or meant in any other way; an address counts twice."""
    found: list[int] = []

    def address(call: Call) -> None:
        if isinstance(call.op, tvm.ir.Op) and call.op.name == "tirx.address_of":
            found.extend(1 for _ in _loads(call, buffer))

    def mention(var: tirx.Var) -> None:
        if var.same_as(buffer):
            found.append(1)

    tvm_ffi.structural_walk(func.body, [(tirx.Var, mention), (Call, address)])
    return len(found)


def _before(load: _Access, store: _Access, shape: Sequence[int], bound: dict[tirx.Var, Any]) -> bool:
    """Tell whether a load reads every element before a store writes it."""
    common, first = _parting(load.path, store.path)
    if not common:
        return first
    read, written = _instances(load, common, shape, bound), _instances(store, common, shape, bound)
    sentinel = np.iinfo(np.int64).max
    earliest = np.full(int(np.prod(shape)), sentinel)
    np.minimum.at(earliest, written.elements, written.times)
    meets = earliest[read.elements] != sentinel
    times, limit = read.times[meets], earliest[read.elements][meets]
    if not (np.all(times <= limit) if first else np.all(times < limit)):
        return False
    # Of each element all accesses are in one iteration of the loops whose iterations have no order.
    lowest = np.full(len(earliest), sentinel)
    highest = np.full(len(earliest), -1)
    np.minimum.at(lowest, written.elements, written.iterations)
    np.maximum.at(highest, written.elements, written.iterations)
    own, where = read.iterations[meets], read.elements[meets]
    return bool(np.all(own == lowest[where]) and np.all(own == highest[where]))


def _parting(one: tuple[tirx.For | int, ...], other: tuple[tirx.For | int, ...]) -> tuple[list[tirx.For], bool]:
    """Return the loops around both of two accesses, and whether the first comes first in their bodies."""
    loops: list[tirx.For] = []
    for mine, theirs in zip(one, other, strict=False):
        if isinstance(mine, int) and isinstance(theirs, int):
            if mine != theirs:
                return loops, mine < theirs
        elif isinstance(mine, tirx.For) and isinstance(theirs, tirx.For):
            loops.append(mine)
    return loops, False


@dataclass(frozen=True)
class _Instances:
    """Every time that an access happens: to which element, when, and in which iterations of unordered loops."""

    elements: np.ndarray
    times: np.ndarray
    iterations: np.ndarray


def _instances(
    access: _Access, common: Sequence[tirx.For], shape: Sequence[int], bound: dict[tirx.Var, Any]
) -> _Instances:
    loops = [part for part in access.path if isinstance(part, tirx.For)]
    used = _variables(access.indices, bound)
    loops = [loop for loop in loops if loop in common or loop.loop_var in used]
    extents = [_constant(loop.extent) for loop in loops]
    axes = np.meshgrid(*(np.arange(extent) for extent in extents), indexing="ij", sparse=True)
    lanes = max((index.lanes for index in access.indices if isinstance(index, tirx.Ramp | tirx.Broadcast)), default=1)
    if int(np.prod(extents)) * int(lanes) > _MOST:
        raise _UnknownError
    values = {loop.loop_var: (axis + _constant(loop.min))[..., None] for loop, axis in zip(loops, axes, strict=True)}
    full = (*extents, int(lanes))
    places = [np.broadcast_to(_value(index, values, bound), full).ravel() for index in access.indices]
    inside = np.ones(int(np.prod(full)), bool)
    for place, extent in zip(places, shape, strict=True):
        inside &= (place >= 0) & (place < extent)
    elements = np.ravel_multi_index([place[inside] for place in places], shape) if places else np.zeros(1, np.int64)
    codes = []
    for unordered in (False, True):
        code = np.zeros(full, np.int64)
        for loop, extent, axis in zip(loops, extents, axes, strict=True):
            if loop in common and (loop.kind in _UNORDERED) == unordered:
                code = code * extent + axis[..., None]
        codes.append(code.ravel()[inside])
    return _Instances(elements, *codes)


def _variables(indices: Sequence[Any], bound: dict[tirx.Var, Any]) -> set[tirx.Var]:
    found: set[tirx.Var] = set()

    def collect(var: tirx.Var) -> None:
        if var not in found:
            found.add(var)
            if var in bound:
                tvm_ffi.structural_walk(bound[var], (tirx.Var, collect))

    for index in indices:
        tvm_ffi.structural_walk(index, (tirx.Var, collect))
    return found


def _constant(expr: Any) -> int:
    if not isinstance(expr, tirx.IntImm):
        raise _UnknownError
    return int(expr.value)


def _value(expr: Any, values: dict[tirx.Var, np.ndarray], bound: dict[tirx.Var, Any]) -> Any:
    """Return an index for all values of the loops, the lanes of a vector along the last axis."""
    if isinstance(expr, tirx.IntImm):
        return int(expr.value)
    if isinstance(expr, tirx.Var) and expr in values:
        return values[expr]
    if isinstance(expr, tirx.Var) and expr in bound:
        return _value(bound[expr], values, bound)
    if isinstance(expr, tirx.Cast):
        return _value(expr.value, values, bound)
    if isinstance(expr, tirx.Broadcast):
        return _value(expr.value, values, bound)
    if isinstance(expr, tirx.Ramp):
        steps = np.arange(int(expr.lanes)) * _constant(expr.stride)
        return np.asarray(_value(expr.base, values, bound)) + steps
    for kind, function in _ARITHMETIC.items():
        if isinstance(expr, kind):
            return function(_value(expr.a, values, bound), _value(expr.b, values, bound))
    raise _UnknownError
