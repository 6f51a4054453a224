"""Operators become fused functions, and it stays known which layers each call of one computes."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import (
    Emitter,
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    substitute,
    with_main,
)
from nnfuze_tvm.passes.lower.recomputed import is_stop, with_stops


@module_pass(opt_level=0, name="FuseLayers")
class FuseLayers:
    """Fuse operators as TVM's ``FuseOps`` does, and name the Var of every call after the layers that it computes.

    Layers with equal shapes share one fused function, so the names inside of it are one call's only. Each call's
    operands tell which bindings of the unfused ``main`` its function stands for, and those have the layers' names.
    Several layers in one call are joined by ``+``; where there is none, the Var keeps the name that TVM gave it.
    Chains of operators that would compute values again and again end where `recomputed` says.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with fused functions, ``main`` calling them."""
        mod = with_stops(mod)
        # What is computed twice counts as its first Var.
        unfused: dict[tuple[Any, ...], Value] = {}
        first: dict[Value, Value] = {}
        for binding in bindings(mod["main"]):
            key = _key(binding.value, [first.get(v, v) for v in operands(binding.value)])
            first[binding.var] = unfused.setdefault(key, binding.var)
        fused = relax.transform.FuseOps()(mod)
        main = fused["main"]
        emitter = Emitter()
        for param in main.params:
            emitter.unique(param.name)
        # What the Vars of the fused module stand for in the unfused one, and as what they are emitted again.
        origins: dict[Value, Any] = dict(zip(main.params, mod["main"].params, strict=True))
        values: dict[Value, Value] = {}
        for binding in bindings(main):
            callee = getattr(binding.value, "op", None)
            func = fused[callee] if isinstance(callee, tvm.ir.GlobalVar) else None
            layers: list[str] = []
            if isinstance(func, relax.Function):
                inner = {
                    param: origins.get(argument, argument)
                    for param, argument in zip(func.params, binding.value.args, strict=True)
                }
                for step in bindings(func):
                    inner[step.var] = unfused.get(_key(step.value, [inner.get(v, v) for v in operands(step.value)]))
                    if inner[step.var] is not None:
                        layers += _names(inner[step.var])
                results = [inner.get(field, field) for field in output_fields(func)]
                origins[binding.var] = results[0] if len(results) == 1 else results
            elif isinstance(binding.value, relax.TupleGetItem) and isinstance(
                source := origins.get(binding.value.tuple_value), list
            ):
                origins[binding.var] = source[binding.value.index]
            else:
                key = _key(binding.value, [origins.get(v, v) for v in operands(binding.value)])
                origins[binding.var] = unfused.get(key)
                if origins[binding.var] is not None:
                    layers += _names(origins[binding.var])
            if is_stop(binding.value):
                values[binding.var] = substitute(binding.value.args[0], values)
                continue
            name = ir.JOINED.join(dict.fromkeys(layers)) or binding.var.name
            values[binding.var] = emitter.emit(substitute(binding.value, values), name)
        outputs = [values.get(field, field) for field in output_fields(main)]
        return with_main(fused, emitter.finish(main.params, outputs, main.attrs))


def _names(var: Value) -> list[str]:
    """Return the parts of a Var's name, if it is that of layers; of a layer in several kernels each has a number."""
    return str(var.name).split(ir.JOINED) if ir.layers_of(var) else []


def _key(value: Value, read: list[Value]) -> tuple[Any, ...]:
    """Return what tells a bound value from the others: what computes it, and from what."""
    if isinstance(value, relax.TupleGetItem):
        return "field", value.index, *read
    callee = value.args[0] if op_name(value) in ("call_tir", "call_tir_inplace") else ""
    return op_name(value), getattr(callee, "name_hint", ""), *read
