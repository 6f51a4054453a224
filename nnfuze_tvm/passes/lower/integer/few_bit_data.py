"""Floats that are few numbers, and that layers of few-bit weights read."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.evaluate import call_of_constants
from nnfuze_tvm.graph.integers.context import few_codes
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.levels import Levels


def few_bit_data(func: relax.Function) -> dict[tvm.ir.Var, np.ndarray]:
    """Return the float Vars that layers of few-bit weights read, directly or moved, and the numbers each can hold.

    Such a layer was trained for it: its data are signs, or bounded and rounded, its weights few numbers per channel.
    """
    levels = Levels()
    bound: dict[Value, Value] = {}
    found: dict[tvm.ir.Var, np.ndarray] = {}
    for binding in bindings(func):
        levels.see(binding.var, binding.value)
        bound[binding.var] = binding.value
        operator = ops.of(binding.value)
        own = operator.layer(binding.value) if operator is not None and operator.layer is not None else None
        if own is None:
            continue
        data = moved_from(binding.value.args[0], bound)
        numbers = levels.of(data)
        if numbers is None or data not in bound or str(data.ty.dtype) != "float32":
            continue
        if _has_few_weights(binding.value.args[1], own.filters.outer, bound):
            found[data] = numbers.astype("float64")
    return found


def moved_from(value: Value, bound: Mapping[Value, Value]) -> Value:
    """Return the value whose numbers another one holds at other places; itself if it is nothing that was moved."""
    while ops.effect_of(bound.get(value)) == "moves":
        value = bound[value].args[0]
    return value


def _has_few_weights(weights: Value, axis: int, bound: Mapping[Value, Value]) -> bool:
    if 0 in static_shape(weights):
        return False
    values = _numbers(weights, bound)
    return values is not None and values.dtype == np.float32 and few_codes(values.astype("float64"), axis) is not None


def _numbers(weights: Value, bound: Mapping[Value, Value]) -> np.ndarray | None:
    """Return weights that are constant, or dequantized and moved; None of others."""
    if isinstance(weights, GenericConst):
        return array(weights)
    call = bound.get(weights)
    if not isinstance(call, Call) or (op_name(call) != "dequantize" and ops.effect_of(call) != "moves"):
        return None
    source = _numbers(call.args[0], bound)
    if source is None:
        return None
    operands = [constant(source), *call.args[1:]]
    return call_of_constants(Call(call.op, operands, call.attrs, call.ty_args, call.span, call.ty))
