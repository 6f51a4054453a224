"""Put the functions of all tasks into one."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax

from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.graph.views import View
from nnfuze_tvm.graph.wiring import Result, Source, Window, Wiring


@tvm.transform.module_pass(opt_level=0, name="MergeTasks")
class MergeTasks:
    """Merge one function per task into ``main``, which returns the outputs of all tasks in one flat tuple.

    Parameters
    ----------
    shared_inputs
        Names of inputs that are one and the same in all tasks that have them. By default what the module says
        (see :func:`nnfuze_tvm.load`); where it says nothing, inputs of equal name, shape and dtype.
        Inputs of equal name that are not shared become ``<task>.<input>``. ``input=task.input,other.input`` are inputs
        of several names and forms, see `graph.views.views_of`.
    chains, states
        Inputs that are outputs of other tasks, or of the same task at the call before; see `graph.links.wire`.
        What feeds an input is no output any more. ``main`` takes states behind the inputs and returns their next
        values behind the outputs; `ir.states` names them.

    Raises
    ------
    InputError
        When run, if what is shared, chained or kept doesn't fit.
    """

    def __init__(
        self, shared_inputs: Sequence[str] | None = None, chains: Sequence[str] = (), states: Sequence[str] = ()
    ) -> None:
        self.shared_inputs = shared_inputs
        self.chains, self.states = chains, states

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return ``mod`` with one Relax function, ``main``."""
        shared = self.shared_inputs
        if shared is None and mod.attrs is not None and ir.SHARED_INPUTS_ATTR in mod.attrs:
            shared = [str(name) for name in mod.attrs[ir.SHARED_INPUTS_ATTR]]
        return _Merger(mod, wire(mod, shared, self.chains, self.states)).merge()


class _Merger:
    def __init__(self, mod: tvm.IRModule, wiring: Wiring) -> None:
        self.mod = mod
        self.wiring = wiring
        self.emitter = dataflow.Emitter()
        types = {**wiring.inputs, **{state.name: state.type for state in wiring.states}}
        self.params = {name: tvm.ir.Var(self.emitter.unique(name), ty) for name, ty in types.items()}
        self.results: dict[str, list[dataflow.Value]] = {}
        # What tasks take of an input, those alike once.
        self.forms: dict[View, dataflow.Value] = {}
        # By the state's name: the rows of earlier calls and of this one.
        self.windows: dict[str, dataflow.Value] = {}

    def merge(self) -> tvm.IRModule:
        for task in self.wiring.order:
            func = self.mod[task]
            new = {
                param: self._shaped(self._value(self.wiring.sources[task, param.name]), ir.static_shape(param))
                for param in func.params
            }
            for binding in dataflow.bindings(func):
                # A binding's Var may keep its name: layers are called after their task already.
                value = dataflow.substitute(binding.value, new)
                new[binding.var] = self.emitter.emit(value, binding.var.name)
            self.results[task] = [dataflow.substitute(field, new) for field in dataflow.output_fields(func)]
        outputs = [*map(self._value, self.wiring.outputs), *(self._next(s.following) for s in self.wiring.states)]
        main = self.emitter.finish(list(self.params.values()), outputs)
        functions = {var: func for var, func in self.mod.functions.items() if not isinstance(func, relax.Function)}
        merged = dataflow.with_functions(self.mod, {**functions, "main": main.with_attr("global_symbol", "main")})
        return self._described(merged)

    def _described(self, merged: tvm.IRModule) -> tvm.IRModule:
        """Say whose the outputs are, and which are for the next call."""
        if not self.wiring.connected:
            return merged
        names: dict[str, list[str]] = {}
        for output in ir.task_outputs(self.mod):
            names.setdefault(output.task, []).append(output.name)
        states = self.wiring.states
        owners = [ir.TaskOutput(result.task, names[result.task][result.place]) for result in self.wiring.outputs]
        owners += [ir.TaskOutput(state.task, state.output) for state in states]
        return ir.with_task_outputs(merged, owners).with_attr(ir.STATES_ATTR, [state.name for state in states])

    def _value(self, source: Source) -> dataflow.Value:
        if isinstance(source, str):
            return self.params[source]
        if isinstance(source, View):
            if source not in self.forms:
                self.forms[source] = source.emit(self.emitter, self.params[source.name])
            return self.forms[source]
        if isinstance(source, Result):
            return self.results[source.task][source.place]
        if source.state not in self.windows:
            newest = self._shaped(self._value(source.result), source.view)
            whole = relax.op.concat([self.params[source.state], newest], source.axis)
            self.windows[source.state] = self.emitter.emit(whole)
        return self.windows[source.state]

    def _next(self, following: Result | Window) -> dataflow.Value:
        value = self._value(following)
        if isinstance(following, Result):
            return value
        rows = following.view[following.axis]
        return self.emitter.emit(relax.op.strided_slice(value, [following.axis], [rows], [following.length]))

    def _shaped(self, value: dataflow.Value, shape: tuple[int, ...]) -> dataflow.Value:
        return value if ir.static_shape(value) == shape else self.emitter.emit(relax.op.reshape(value, shape))
