"""Networks whose beginnings differ in the values of constants only, and one set of constants for all of them.

The channels of each network are brought to those of a common trunk: a group of coupled channels (`graph.channels`) by
one matrix per network. Behind the trunk each network goes on as it was, with the trunk's channels in its own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np
import tvm
import tvm_ffi
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, evaluate, ir, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.cuts import Cut, cuts
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.folding import folded
from nnfuze_tvm.passes.compress.calibration import batches
from nnfuze_tvm.passes.compress.prune.channel_groups import CoupledFunction
from nnfuze_tvm.passes.merge.rearranged import Rearranged
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm

Place = tuple[int, int]
"""The number of a binding, and that of an operand of its call."""


class Beginnings:
    """The beginnings of all tasks' networks up to one cut.

    Parameters
    ----------
    mod : tvm.IRModule
        One function per task.
    upto : str
        A layer of one of the tasks, with a cut behind it, see `cuts`.

    Attributes
    ----------
    functions : dict of str to relax.Function
        The networks, batch norms and constants folded. Their first ``count`` bindings differ in constants only.
    coupling : CoupledFunction
        Of the first network's beginning, which stands for all; of another, bindings with the same numbers are meant.
    bindings : list
        Of that beginning.

    Raises
    ------
    InputError
        If there are no two tasks, no cut is there, or the networks differ in front of it.
    """

    def __init__(self, mod: tvm.IRModule, upto: str) -> None:
        mod = tvm.transform.Sequential([FoldBatchNorm()])(mod)
        functions = [(gvar.name_hint, func) for gvar, func in mod.functions_items()]
        self.functions = {task: _folded(func) for task, func in functions if isinstance(func, relax.Function)}
        if len(self.functions) < 2:
            raise InputError("networks that are to share a trunk: there must be two of them at least")
        if ir.own_states(mod):
            raise InputError(f"networks that are to share a trunk must have no states: {', '.join(ir.own_states(mod))}")
        told = mod.attrs is not None and ir.SHARED_INPUTS_ATTR in mod.attrs
        self._shared = {str(name) for name in mod.attrs[ir.SHARED_INPUTS_ATTR]} if told else None
        self.count = 1 + self._cut(upto).place
        first, *others = self.functions
        self.coupling = CoupledFunction(self._beginning(first), open_end=True)
        self.bindings = self.coupling.bindings
        for task in others:
            self._check(first, task)

    def _cut(self, upto: str) -> Cut:
        known = [cuts(func) for func in self.functions.values()]
        for cut in (cut for found in known for cut in found):
            if cut.name == upto:
                return cut
        names = ", ".join(cut.name for cut in known[0]) or "none"
        raise InputError(f"layer {upto!r}: no trunk can end behind it; layers where one can: {names}")

    def _beginning(self, task: str) -> relax.Function:
        """Return a task's network up to the cut, which is the last output; others stand in front of it."""
        func = self.functions[task]
        begun = [binding.var for binding in dataflow.bindings(func)[: self.count]]
        early = [field for field in dataflow.output_fields(func) if field in begun[:-1]]
        return dataflow.returning(func, [*early, begun[-1]])

    def _check(self, first: str, task: str) -> None:
        """Refuse a network whose beginning is another one."""
        own, func = self.coupling.func, self.functions[task]
        same: dict[Value, Value] = {}
        for param, other in zip(own.params, func.params, strict=False):
            alone = self._shared is not None and param.name not in self._shared
            if alone or param.name != other.name or not tvm_ffi.structural_equal(param.ty, other.ty):
                raise InputError(f"tasks {first} and {task}: networks that share a trunk must have the same inputs")
            same[other] = param
        theirs = dataflow.bindings(func)
        for number, binding in enumerate(self.bindings):
            if number >= len(theirs) or not _alike(binding, theirs[number], same):
                raise InputError(
                    f"task {task}: in front of the cut, its network differs from {first}'s in more than weights, "
                    f"at {_named(self.bindings[: number + 1])}"
                )
            same[theirs[number].var] = binding.var
        behind = {leaf for binding in theirs[self.count :] for leaf in dataflow.operands(binding.value)}
        if behind & {binding.var for binding in theirs[: self.count - 1]} or behind & set(func.params):
            raise InputError(f"task {task}: what is in front of {first}'s cut is also read behind it")
        for field in dataflow.output_fields(func):
            if field in same:  # its channels have an order that callers know
                self.coupling.fix(self.coupling.of(same[field]))

    @property
    def end(self) -> Value:
        """The Var at the cut."""
        return self.bindings[-1].var

    @cached_property
    def layers(self) -> list[int]:
        """The numbers of the bindings of layers with constant weights."""
        return [n for n, binding in enumerate(self.bindings) if binding.var in self.coupling.layers]

    @cached_property
    def biases(self) -> dict[int, Place]:
        """By layer: where its bias is, if nothing else reads the layer."""
        readers: dict[Value, list[int]] = {}
        for number, binding in enumerate(self.bindings):
            for leaf in dataflow.operands(binding.value):
                readers.setdefault(leaf, []).append(number)
        found = {}
        for number in self.layers:
            var, where = self.bindings[number].var, ops.layer(self.bindings[number].value)
            reader = readers.get(var, [])
            value = self.bindings[reader[0]].value if len(reader) == 1 and not var.same_as(self.end) else None
            if where is None or value is None or dataflow.op_name(value) != "add":
                continue
            for n, arg in enumerate(value.args):
                if isinstance(arg, GenericConst) and _along(arg, len(self.coupling.tensor(var)), where.result):
                    found[number] = (reader[0], n)
        return found

    def constants(self, task: str) -> dict[Place, np.ndarray]:
        """Return the constants of a task's beginning that may differ from the others'."""
        found = {}
        for number, binding in enumerate(dataflow.bindings(self.functions[task])[: self.count]):
            for n in _free(binding.value):
                found[number, n] = array(binding.value.args[n])
        return found

    def observe(
        self, func: relax.Function, wanted: Sequence[Value], samples: Mapping[str, np.ndarray], most: int
    ) -> Iterator[list[np.ndarray]]:
        """Yield, batch by batch, what one of the networks makes of Vars of the first one's beginning."""
        own = dict(zip(self.coupling.func.params, func.params, strict=True))
        own |= {a.var: b.var for a, b in zip(self.bindings, dataflow.bindings(func), strict=False)}
        part = dataflow.returning(func, [own[value] for value in wanted])
        for number, batch in enumerate(batches(samples, func.params)):
            if number == most:
                return
            values = evaluate.evaluate(part, batch)
            if not all(np.isfinite(each).all() for each in values):
                raise InputError("calibration data: the network makes NaN or infinity of it")
            yield values

    def merged(
        self, mod: tvm.IRModule, constants: Mapping[Place, np.ndarray], rest: Mapping[str, Mapping[int, np.ndarray]]
    ) -> tvm.IRModule:
        """Return the module with these constants in all beginnings, see `with_constants`."""
        functions = {
            gvar: self.with_constants(gvar.name_hint, constants, rest[gvar.name_hint])
            if gvar.name_hint in self.functions
            else func
            for gvar, func in mod.functions_items()
        }
        return dataflow.with_functions(mod, functions)

    def with_constants(
        self, task: str, constants: Mapping[Place, np.ndarray], sources: Mapping[int, np.ndarray]
    ) -> relax.Function:
        """Return a task's network with other constants in its beginning.

        Parameters
        ----------
        task : str
            The task.
        constants : mapping
            Those that are to be others.
        sources : mapping
            By axis of the tensor at the cut: which of its channels is each of those that the rest wants.
        """
        func, emitter = self.functions[task], dataflow.Emitter()
        for param in func.params:
            emitter.unique(param.name)
        values: dict[Value, Value] = {}
        old = dataflow.bindings(func)
        for number, binding in enumerate(old[: self.count]):
            value = dataflow.substitute(binding.value, values)
            new = {
                n: constant(constants[number, n], "float32") for n in _free(binding.value) if (number, n) in constants
            }
            if new:
                own = [new.get(n, arg) for n, arg in enumerate(value.args)]
                value = Call(value.op, own, value.attrs, value.ty_args, value.span)
            values[binding.var] = emitter.emit(value, binding.var.name)
        moved = {axis: each for axis, each in sources.items() if not np.array_equal(each, np.arange(len(each)))}
        rest = Rearranged(emitter, values, {old[self.count - 1].var: moved} if moved else {})
        for binding in old[self.count :]:
            rest.emit(binding)
        outputs = [rest.ordered(field) for field in dataflow.output_fields(func)]
        return emitter.finish(func.params, outputs, func.attrs)


def _folded(func: relax.Function) -> relax.Function:
    """Return a function with constant subgraphs computed."""
    found, outputs = folded(func)
    emitter = dataflow.Emitter()
    for param in func.params:
        emitter.unique(param.name)
    values: dict[Value, Value] = {}
    emitter.copy(found, values)
    return emitter.finish(func.params, [dataflow.substitute(field, values) for field in outputs], func.attrs)


def _free(value: Value) -> list[int]:
    """Return the operands of a call that may differ: weights, and what is computed with element by element."""
    if ops.layer(value) is not None:
        return [1] if str(value.args[1].ty.dtype) == "float32" else []
    if not isinstance(value, Call) or ops.effect_of(value) != "maps":
        return []
    return [n for n, arg in enumerate(value.args) if isinstance(arg, GenericConst) and str(arg.ty.dtype) == "float32"]


def _alike(binding: relax.VarBinding, other: relax.VarBinding, same: Mapping[Value, Value]) -> bool:
    """Tell whether two bindings differ in the values of constants that are free only."""
    value, theirs = binding.value, other.value
    if not tvm_ffi.structural_equal(binding.var.ty, other.var.ty) or _free(value) != _free(theirs):
        return False
    free = {theirs.args[n]: value.args[n] for n in _free(value)}
    if not all(tvm_ffi.structural_equal(a.ty, b.ty) for a, b in free.items()):
        return False
    return bool(tvm_ffi.structural_equal(value, dataflow.substitute(theirs, {**same, **free})))


def _along(const: GenericConst, rank: int, axis: int) -> bool:
    """Tell whether a constant, broadcast to a tensor of a rank, has a value per index of one axis and no others."""
    shape = array(const).shape
    own = axis - rank + len(shape)
    return own >= 0 and all(size == 1 for n, size in enumerate(shape) if n != own) and shape[own] > 1


def _named(found: Sequence[relax.VarBinding]) -> str:
    """Return the layer that the last of some bindings is, or is behind."""
    names = [binding.var.name for binding in found if ops.is_layer(binding.value)]
    return repr(names[-1]) if names else "its input"
