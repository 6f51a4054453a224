"""Where a chain of fused operators has to end, so that no value is computed again and again.

A kernel's operators are inlined: what reads a value twice computes it twice. One such step after the other doubles the
expression each time, and a hundred of them fit no memory. A value that is worth it is stored instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import tvm
import tvm_ffi
from tvm import relax, s_tir, tirx
from tvm.ir import Call, TensorLoad
from tvm.relax.op import builtin

from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute, with_main

# TVM's operator patterns: up to broadcast, operators go into the kernel of a layer in front of them; up to injective,
# they are inlined into what reads them; up to reductions, they take in what they read.
_BROADCAST, _INJECTIVE, _REDUCTION, _OPAQUE = 1, 2, 3, 8
# How large the inlined expression of one value may be. LLVM computes equal parts of it once, but has to find them: what
# networks chain as a rule (a bias, an activation, a residual, another activation) is below.
_LARGE = 64
# What one function (an exponential, say) counts for beside a load, and from where on a value is worth being stored.
_FUNCTION, _WORTH = 8, 8
# Calls in the expressions of kernels that are none of a function.
_CHOICES = ("tirx.if_then_else", "tirx.likely")
_STOP = "builtin.stop_lift_params"


def is_stop(value: Value) -> bool:
    """Tell whether a bound value is a mark of `with_stops`: the same as its operand."""
    return op_name(value) == _STOP


def with_stops(mod: tvm.IRModule) -> tvm.IRModule:
    """Return a module of unfused kernels in which what must not be inlined any further is read through a mark."""
    main = mod["main"]
    steps, reads = bindings(main), _Reads(mod)
    known = {binding.var: reads.of(binding.value) for binding in steps}
    chain = _Chain(known, set(output_fields(main)))
    for binding in steps:
        chain.add(binding.var)
    if not chain.stops:
        return mod
    emitter = Emitter()
    for param in main.params:
        emitter.unique(param.name)
    values: dict[Value, Value] = {}
    for binding in steps:
        var = emitter.emit(substitute(binding.value, values), binding.var.name)
        values[binding.var] = emitter.emit(builtin.stop_lift_params(var), "stop") if binding.var in chain.stops else var
    outputs = [values.get(field, field) for field in output_fields(main)]
    return with_main(mod, emitter.finish(main.params, outputs, main.attrs))


@dataclass(frozen=True)
class _Step:
    """What one kernel does for an element of its result: its operator pattern, functions that it calls, and loads."""

    pattern: int
    functions: int
    loads: Counter[Value]


class _Chain:
    """How large the expressions of values are, and which values are stored."""

    def __init__(self, steps: Mapping[Value, _Step], outputs: set[Value]) -> None:
        self.stops: set[Value] = set()
        self._steps = steps
        self._place = {var: place for place, var in enumerate(steps)}
        self._size: dict[Value, int] = {}
        # What is in the kernel of a layer, and what is stored because not everything that reads it can take it in.
        self._behind_layer: set[Value] = set()
        self._stored = outputs | {v for step in steps.values() if step.pattern > _REDUCTION for v in step.loads}

    def add(self, var: Value) -> None:
        """Add the next value: where its expression gets too large, stop the nearest that it computes again."""
        step = self._steps[var]
        while step.pattern <= _REDUCTION and self._expanded(var) > _LARGE:
            again = self._computed_again(var)
            if again is None:
                break
            self.stops.add(again)
            for value in [v for v in self._size if self._place[v] > self._place[again]]:
                self._size[value] = self._expanded(value)
        if step.pattern <= _INJECTIVE:
            self._size[var] = self._expanded(var)
        if _REDUCTION < step.pattern < _OPAQUE or (
            step.pattern <= _BROADCAST and any(v in self._behind_layer for v in step.loads)
        ):
            self._behind_layer.add(var)

    def _size_in(self, value: Value, var: Value) -> int:
        """Return how large the expression of ``value`` is where ``var`` reads it: one load if it is stored."""
        layer = value in self._behind_layer and self._steps[var].pattern > _BROADCAST
        return 1 if layer or value in self._stored or value in self.stops else self._size.get(value, 1)

    def _expanded(self, var: Value) -> int:
        step = self._steps[var]
        inside = sum(times * self._size_in(value, var) for value, times in step.loads.items())
        return _FUNCTION * step.functions + inside

    def _computed_again(self, var: Value) -> Value | None:
        """Return the nearest value of some size that ``var`` computes more than once."""
        times: Counter[Value] = Counter({var: 1})
        pending = {var}
        while pending:
            value = max(pending, key=self._place.__getitem__)
            pending.remove(value)
            if value is not var and times[value] > 1:
                return value
            for source, count in self._steps[value].loads.items():
                if self._size_in(source, value) >= _WORTH:
                    times[source] += times[value] * count
                    pending.add(source)
        return None


class _Reads:
    """What kernels do for an element of their result, found once per kernel."""

    def __init__(self, mod: tvm.IRModule) -> None:
        self._mod = mod
        self._known: dict[str, tuple[int, list[int]]] = {}

    def of(self, value: Value) -> _Step:
        """Return what a bound value does; whatever is no kernel with one result stands alone."""
        loads: Counter[Value] = Counter()
        callee = value.args[0] if op_name(value) == "call_tir" else None
        func = self._mod[callee] if isinstance(callee, tvm.ir.GlobalVar) else None
        if not isinstance(func, tirx.PrimFunc) or not isinstance(value.ty, relax.TensorType):
            loads.update(operands(value))
            return _Step(_OPAQUE, 0, loads)
        name = str(value.args[0].name_hint)
        if name not in self._known:
            self._known[name] = _work(func)
        functions, times = self._known[name]
        for operand, count in zip(value.args[1].fields, times, strict=False):
            loads[operand] += count
        return _Step(int(func.attrs.get("op_pattern", _OPAQUE)), functions, loads)


def _work(func: tirx.PrimFunc) -> tuple[int, list[int]]:
    """Return how many functions an element of the result calls and how often it loads from each parameter, with what
    lies between inlined.
    """
    blocks: list[s_tir.SBlock] = []
    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, blocks.append))
    inside: dict[Value, tuple[int, Counter[Value]]] = {}
    for block in blocks:
        if not block.iter_vars or len(block.writes) != 1:
            continue
        loads: list[TensorLoad] = []
        calls: list[Call] = []
        tvm_ffi.structural_walk(block.body, [(TensorLoad, loads.append), (Call, calls.append)])
        functions, total = sum(str(call.op.name) not in _CHOICES for call in calls), Counter[Value]()
        for load in loads:
            more, read = inside.get(load.source, (0, Counter({load.source: 1})))
            functions += more
            total.update(read)
        inside[block.writes[0].source] = functions, total
    functions, final = inside.get(func.params[-1], (0, Counter()))
    return functions, [final.get(param, 0) for param in func.params]
