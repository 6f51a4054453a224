"""Reshapes behind layers come after what is done to each element, so that this is one kernel with the layer."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.deferred import Form, Rewriter

_RESHAPES = frozenset({"reshape", "squeeze", "expand_dims"})


@module_pass(opt_level=0, name="LateReshapes")
class LateReshapes:
    """Put reshapes of layers' results, that keep the channels last, behind biases, activations and quantization.

    A convolution of one axis is often one of two with a squeeze behind it, and its bias comes after that.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and any(op_name(b.value) in _RESHAPES for b in bindings(func)):
                mod.update_func(gvar, Rewriter(_reshaped).rewrite(func))
        return mod


@dataclass(frozen=True)
class _Reshaped:
    """A form: what was of one shape has another one, with the same last axis, that of the channels."""

    before: tuple[int, ...]
    shape: tuple[int, ...]
    axis: int = -1

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        return values

    def restored(self, *sources: Value) -> Value:
        return op.reshape(sources[0], self.shape)


def _reshaped(rewriter: Rewriter, call: Call, _: Var) -> tuple[list[Call], Form] | None:
    """Return what a layer's result is a reshape of."""
    if op_name(call) not in _RESHAPES or not _is_of_layer(call.args[0], rewriter.bound):
        return None
    data = call.args[0]
    before, after = static_shape(data), static_shape(call)
    if not before or not after or before[-1] != after[-1]:
        return None
    sources, form = rewriter.pending.get(data, ([], None))
    if isinstance(form, _Reshaped):
        return sources, _Reshaped(form.before, after)
    return [rewriter.read(data)], _Reshaped(before, after)


def _is_of_layer(value: Value, bound: dict[Value, Value]) -> bool:
    """Tell whether a layer made a value, but for reshapes and what was done to each element."""
    while value in bound:
        value = bound[value]
        if ops.is_layer(value):
            return True
        if isinstance(value, Var):
            continue
        if op_name(value) not in _RESHAPES and ops.effect_of(value) != "maps":
            return False
        value = value.args[0]
    return False
