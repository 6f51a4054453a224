"""Where a scheduled kernel reads or writes outside of its buffers: every access is enumerated with its loops.

What is beside a buffer is another one, most often, so that values alone tell too late, or never. Of loops that are too
long to be enumerated the first, middle and last iterations are taken. Accesses whose place or condition depends on data
are left out.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Call, TensorLoad
from tvm.target import Target

from nnfuze_tvm.deploy.memory.overwrites import _variables
from nnfuze_tvm.schedules.loops import plain

_MOST = 1 << 20
_BINARY = {
    tirx.Add: np.add,
    tirx.Sub: np.subtract,
    tirx.Mul: np.multiply,
    tirx.FloorDiv: np.floor_divide,
    tirx.FloorMod: np.mod,
    tirx.Div: lambda a, b: np.trunc(np.divide(a, b)).astype("int64"),
    tirx.Mod: np.fmod,
    tirx.Min: np.minimum,
    tirx.Max: np.maximum,
    tirx.LT: np.less,
    tirx.LE: np.less_equal,
    tirx.GT: np.greater,
    tirx.GE: np.greater_equal,
    tirx.EQ: np.equal,
    tirx.NE: np.not_equal,
    tirx.And: np.logical_and,
    tirx.Or: np.logical_or,
}


class _UnknownError(Exception):
    """It depends on data."""


@dataclass
class _Kernel:
    """What is around a place in a kernel, and what was found so far."""

    loops: list[tirx.For] = field(default_factory=list)
    conditions: list[Any] = field(default_factory=list)
    bound: dict[Any, Any] = field(default_factory=dict)
    found: list[str] = field(default_factory=list)

    def visit(self, stmt: Any) -> None:
        if isinstance(stmt, tirx.SeqStmt):
            for part in stmt.seq:
                self.visit(part)
        elif isinstance(stmt, tirx.For):
            self.loops.append(stmt)
            self.visit(stmt.body)
            self.loops.pop()
        elif isinstance(stmt, tirx.IfThenElse):
            self.read(stmt.condition)
            self._under(stmt.condition, self.visit, stmt.then_case)
            if stmt.else_case is not None:
                self._under(tirx.Not(stmt.condition), self.visit, stmt.else_case)
        elif isinstance(stmt, tirx.BufferStore):
            self.read(stmt.value)
            self._check("writes", stmt.buffer, stmt.indices)
        elif isinstance(stmt, tirx.Bind):
            self.read(stmt.value)
            self.bound[stmt.var] = stmt.value
        elif isinstance(stmt, tirx.AttrStmt):
            self.visit(stmt.body)
        elif isinstance(stmt, tirx.Evaluate):
            self.read(stmt.value)

    def read(self, expr: Any) -> None:
        if isinstance(expr, TensorLoad):
            self._check("reads", expr.source, expr.indices)
            for index in expr.indices:
                self.read(index)
        elif isinstance(expr, Call):
            name = expr.op.name if isinstance(expr.op, tvm.ir.Op) else ""
            if name == "prim.if_then_else":
                condition, then, other = expr.args
                self.read(condition)
                self._under(condition, self.read, then)
                self._under(tirx.Not(condition), self.read, other)
            elif name != "tirx.address_of":
                for arg in expr.args:
                    self.read(arg)
        else:
            for part in _parts(expr):
                self.read(part)

    def _under(self, condition: Any, visit: Any, part: Any) -> None:
        self.conditions.append(condition)
        visit(part)
        self.conditions.pop()

    def _check(self, verb: str, buffer: Any, indices: Sequence[Any]) -> None:
        try:
            values = self._values([*indices, *self.conditions])
            holds = np.ones((), bool)
            for condition in self.conditions:
                holds = holds & np.asarray(self._value(condition, values), bool)
            shape = [int(extent) for extent in buffer.ty.shape]
            places = [np.asarray(self._value(index, values)) for index in indices]
            if any(isinstance(index, tirx.Ramp) for index in indices):
                # A vector may go on in the next row.
                places, shape = [sum(n * int(np.prod(shape[k + 1 :])) for k, n in enumerate(places))], [np.prod(shape)]
            for place, extent in zip(places, shape, strict=True):
                if np.any(((place < 0) | (place >= extent)) & holds):
                    self.found.append(f"{verb} {buffer.name}{list(indices)}: from {place.min()} to {place.max()}")
        except _UnknownError:
            pass

    def _values(self, exprs: Sequence[Any]) -> dict[Any, np.ndarray]:
        used = _variables(exprs, self.bound)
        loops = [loop for loop in self.loops if loop.loop_var in used]
        steps = []
        for loop in loops:
            if not isinstance(loop.extent, tirx.IntImm) or not isinstance(loop.min, tirx.IntImm):
                raise _UnknownError
            steps.append(np.arange(int(loop.extent)))
        while steps and np.prod([float(len(each)) for each in steps]) > _MOST:
            longest = max(range(len(steps)), key=lambda n: len(steps[n]))
            count = len(steps[longest])
            steps[longest] = np.unique([0, 1, count // 2, count // 2 + 1, count - 2, count - 1])
            if len(steps[longest]) == count:
                raise _UnknownError
        axes = np.meshgrid(*steps, indexing="ij", sparse=True)
        return {loop.loop_var: (axis + int(loop.min))[..., None] for loop, axis in zip(loops, axes, strict=True)}

    def _value(self, expr: Any, values: dict[Any, np.ndarray]) -> Any:
        if isinstance(expr, tirx.IntImm):
            return int(expr.value)
        if isinstance(expr, tirx.Var):
            if expr in values:
                return values[expr]
            if expr in self.bound:
                return self._value(self.bound[expr], values)
        if isinstance(expr, tirx.Not):
            return np.logical_not(self._value(expr.a, values))
        if isinstance(expr, tirx.Cast | tirx.Broadcast):
            return self._value(expr.value, values)
        if isinstance(expr, tirx.Ramp):
            return np.asarray(self._value(expr.base, values)) + np.arange(int(expr.lanes)) * int(expr.stride)
        if isinstance(expr, Call) and isinstance(expr.op, tvm.ir.Op) and expr.op.name.endswith(".likely"):
            return self._value(expr.args[0], values)
        for kind, function in _BINARY.items():
            if isinstance(expr, kind):
                return function(self._value(expr.a, values), self._value(expr.b, values))
        raise _UnknownError


def _parts(expr: Any) -> Iterator[Any]:
    if isinstance(expr, tirx.Var | tirx.IntImm | tirx.FloatImm):
        return
    for name in ("a", "b", "value", "base", "condition", "true_value", "false_value", "body"):
        if hasattr(expr, name):
            yield getattr(expr, name)
    if isinstance(expr, tirx.Shuffle):
        yield from expr.vectors


def outside(func: tirx.PrimFunc, target: Target) -> list[str]:
    """Return what a scheduled kernel reads and writes outside of its buffers, if anything."""
    kernel = _Kernel()
    kernel.visit(plain(func, target).body)
    return kernel.found


def outside_of(mod: tvm.IRModule, target: Target) -> dict[str, list[str]]:
    """Return what the kernels of a lowered module read and write outside of their buffers, by kernel."""
    kernels = {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, tirx.PrimFunc)}
    return {name: found for name, func in kernels.items() if (found := outside(func, target))}
