"""Put the functions of all tasks into one."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
from tvm import relax
from tvm_ffi import structural_equal

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ir


@tvm.transform.module_pass(opt_level=0, name="MergeTasks")
class MergeTasks:
    """Merge one function per task into ``main``, which returns the outputs of all tasks in one flat tuple.

    Parameters
    ----------
    shared_inputs
        Names of inputs that are one and the same in all tasks that have them. By default what the module says
        (see :func:`nnfuze_tvm.load`); where it says nothing, inputs of equal name, shape and dtype.
        Inputs of equal name that are not shared become ``<task>.<input>``.

    Raises
    ------
    InputError
        When run, if a shared input differs in shape or dtype between tasks, or no task has it.
    """

    def __init__(self, shared_inputs: Sequence[str] | None = None) -> None:
        self.shared_inputs = shared_inputs

    def transform_module(self, mod: tvm.IRModule, _ctx: tvm.transform.PassContext) -> tvm.IRModule:
        """Return ``mod`` with one Relax function, ``main``."""
        shared = self.shared_inputs
        if shared is None and mod.attrs is not None and ir.SHARED_INPUTS_ATTR in mod.attrs:
            shared = [str(name) for name in mod.attrs[ir.SHARED_INPUTS_ATTR]]
        return _Merger(mod, shared).merge()


class _Merger:
    def __init__(self, mod: tvm.IRModule, shared: Sequence[str] | None) -> None:
        self.mod = mod
        self.shared = shared
        self.tasks = ir.tasks(mod)
        self.emitter = dataflow.Emitter()

    def merge(self) -> tvm.IRModule:
        params = self._params()
        outputs: list[dataflow.Value] = []
        for task in self.tasks:
            func = self.mod[task]
            new = dict(zip(func.params, (params[task, param.name] for param in func.params), strict=True))
            for binding in dataflow.bindings(func):
                # A binding's Var may keep its name: layers are called after their task already.
                value = dataflow.substitute(binding.value, new)
                new[binding.var] = self.emitter.emit(value, binding.var.name)
            outputs.extend(dataflow.substitute(field, new) for field in dataflow.output_fields(func))
        main = self.emitter.finish(list(dict.fromkeys(params.values())), outputs)
        functions = {var: func for var, func in self.mod.functions.items() if not isinstance(func, relax.Function)}
        return dataflow.with_functions(self.mod, {**functions, "main": main.with_attr("global_symbol", "main")})

    def _params(self) -> dict[tuple[str, str], tvm.ir.Var]:
        """Return the parameter of ``main`` that stands for each (task, input)."""
        owners: dict[str, list[tuple[str, tvm.ir.Var]]] = {}
        for task in self.tasks:
            for param in self.mod[task].params:
                owners.setdefault(param.name, []).append((task, param))
        for name in self.shared or ():
            if name not in owners:
                raise InputError(f"shared input {name!r}: no task has it (there are: {', '.join(owners)})")
        result: dict[tuple[str, str], tvm.ir.Var] = {}
        for task in self.tasks:
            for param in self.mod[task].params:
                group = owners[param.name]
                first_task, first = group[0]
                equal = all(structural_equal(other.ty, first.ty) for _, other in group)
                if self.shared is not None and param.name in self.shared and not equal:
                    text = ", ".join(f"{other.ty} in {owner}" for owner, other in group)
                    raise InputError(f"shared input {param.name!r} differs: {text}")
                is_shared = equal if self.shared is None else param.name in self.shared
                if is_shared and task != first_task:
                    result[task, param.name] = result[first_task, param.name]
                    continue
                name = param.name if is_shared or len(group) == 1 else f"{task}.{param.name}"
                result[task, param.name] = tvm.ir.Var(self.emitter.unique(name), param.ty)
        return result
