"""Networks that take one input under several names or in several forms, and the same with one name and form."""

from __future__ import annotations

from collections.abc import Sequence

import tvm

from nnfuze_tvm.graph import dataflow
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.graph.views import View


@tvm.transform.module_pass(opt_level=0, name="CommonInputs")
class CommonInputs:
    """Let each task's network take its inputs as the merged network does; what differs is computed inside.

    Networks that are to learn to share a trunk must have the same inputs.

    Parameters
    ----------
    shared_inputs : sequence of str
        What is one, see `graph.links.wire`.

    Raises
    ------
    InputError
        When run, if what is shared doesn't fit.
    """

    def __init__(self, shared_inputs: Sequence[str]) -> None:
        self.shared_inputs = shared_inputs

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return the module with other parameters of its tasks."""
        wiring = wire(mod, self.shared_inputs)
        types = {**wiring.inputs, **{state.name: state.type for state in wiring.states}}
        functions: dict[str, tvm.ir.BaseFunc] = {}
        for task in wiring.tasks:
            func, emitter = mod[task], dataflow.Emitter()
            params: dict[str, dataflow.Value] = {}
            values: dict[dataflow.Value, dataflow.Value] = {}
            for param in func.params:
                source = wiring.sources[task, param.name]
                name = source.name if isinstance(source, View) else str(source)
                if name not in params:
                    params[name] = tvm.ir.Var(emitter.unique(name), types[name])
                values[param] = source.emit(emitter, params[name]) if isinstance(source, View) else params[name]
            emitter.copy(dataflow.bindings(func), values)
            outputs = [dataflow.substitute(field, values) for field in dataflow.output_fields(func)]
            functions[task] = emitter.finish(list(params.values()), outputs, func.attrs)
        own = {var: functions.get(var.name_hint, func) for var, func in mod.functions_items()}
        return dataflow.with_functions(mod, own)
