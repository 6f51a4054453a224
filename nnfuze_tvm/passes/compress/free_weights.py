"""8 bits in training: weights are floats again, which the graph itself rounds to the codes that they have."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TypeGuard

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.relax import op

from nnfuze_tvm.graph import block_sparsity, ops
from nnfuze_tvm.graph.channels import Filters
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, readers, substitute
from nnfuze_tvm.graph.integers.context import along

# The largest codes of 4 and of 8 bits.
_LEVELS = (7, 127)


def with_free_weights(func: relax.Function) -> relax.Function:
    """Return a function in QDQ form with float32 constants in the place of codes and rounded biases.

    ``dequantize(codes)`` becomes ``dequantize(quantize(weights))`` with the same scales; the biases of such layers are
    rounded to units of their sums. So the values are those of before, bit by bit but for the last one of biases, and
    whatever the constants become, the function computes what the integers will: codes stay in [-127, 127], and those of
    4 bits in [-7, 7], where they are, and blocks that are zero stay so. The scales of activations are as they were.
    """
    emitter, values = Emitter(), dict[Value, Value]()
    biases, layouts = _biases(func), _layouts(func)
    for binding in bindings(func):
        value = substitute(binding.value, values)
        if _are_weights(value):
            value = _freed(value, layouts.get(binding.var))
        elif binding.var in biases:
            value = _rounded(value, biases[binding.var])
        values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _are_weights(value: Value | None) -> TypeGuard[Call]:
    """Tell whether codes that are constants become numbers here."""
    if not isinstance(value, Call) or op_name(value) != "dequantize":
        return False
    if not all(isinstance(arg, GenericConst) for arg in value.args):
        return False
    codes, scale, _ = value.args
    return str(codes.ty.dtype) in ("int8", "uint8") and bool((array(scale) > 0).all())


def with_zero_blocks(func: relax.Function) -> relax.Function:
    """Return a function whose layers multiply blocks of float32 weights that are zero by zero: they stay so."""
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        value, layer = substitute(binding.value, values), ops.layer(binding.value)
        if layer is not None and str(value.args[1].ty.dtype) == "float32":
            weights = emitter.emit(_held(value.args[1], layer.filters))
            value = Call(value.op, [value.args[0], weights, *value.args[2:]], value.attrs, value.ty_args)
        values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _held(weights: GenericConst, filters: Filters) -> Value:
    """Return weights whose blocks that are zero stay so whatever becomes of the constant; itself without any."""
    own = filters.unpack(array(weights))
    if not block_sparsity.has_blocks(own):
        return weights
    used = block_sparsity.in_blocks(own).any((2, 3, 4), keepdims=True)
    if used.all():
        return weights
    mask = np.broadcast_to(used, block_sparsity.in_blocks(own).shape).swapaxes(1, 2).reshape(own.shape)
    return op.multiply(weights, op.astype(constant(filters.pack(mask), "int8"), "float32"))


def _layouts(func: relax.Function) -> dict[Var, Filters]:
    """Return how the weights of layers are laid out that something computes."""
    found = {}
    for binding in bindings(func):
        operator = ops.of(binding.value)
        if operator is not None and operator.layer is not None and isinstance(binding.value.args[1], Var):
            layer = operator.layer(binding.value)
            if layer is not None:
                found[binding.value.args[1]] = layer.filters
    return found


def _freed(call: Call, filters: Filters | None) -> Call:
    codes, scale, zero = call.args
    axis, held = int(call.attrs.axis), array(codes)
    wide, shift = (along(array(each), axis, held.ndim) for each in (scale, zero))
    weights = constant((held.astype("float32") - shift) * wide, "float32")
    free = weights if filters is None else _held(weights, filters)
    rounded = op.quantize(free, scale, zero, axis, str(codes.ty.dtype))
    levels = next((most for most in _LEVELS if np.abs(held.astype("int16")).max(initial=0) <= most), None)
    if held.dtype == np.int8 and levels is not None:
        rounded = op.clip(rounded, -levels, levels)
    return op.dequantize(rounded, scale, zero, axis, "float32")


@dataclass(frozen=True)
class _Bias:
    """A bias of a layer of integers, and the scales of the layer's weights (``[channels]``) and data (a scalar)."""

    bias: GenericConst
    weights: GenericConst
    data: GenericConst


def _biases(func: relax.Function) -> dict[Var, _Bias]:
    """Return what is added behind layers whose operands are integers, by the sum."""
    made_by = {b.var: b.value for b in bindings(func)}
    read_by = readers(func)
    found = {}
    for var, value in made_by.items():
        layer = ops.layer(value)
        if layer is None or not isinstance(weights := made_by.get(value.args[1]), Call) or not _are_weights(weights):
            continue
        data = _scale(value.args[0], made_by)
        own = read_by.get(var, [])
        if data is None or len(own) != 1 or op_name(made_by[own[0]]) != "add":
            continue
        for arg in made_by[own[0]].args:
            if isinstance(arg, GenericConst) and array(arg).size % array(weights.args[1]).size == 0:
                found[own[0]] = _Bias(arg, weights.args[1], data)
    return found


def _scale(value: Value, made_by: Mapping[Value, Value]) -> GenericConst | None:
    """Return the scale of a tensor of integers, moved about since; None if it has none, or several."""
    while (made := made_by.get(value)) is not None:
        if op_name(made) == "dequantize":
            scale = made.args[1]
            return scale if isinstance(scale, GenericConst) and array(scale).size == 1 else None
        if isinstance(made, Call) and ops.effect_of(made) not in ("moves", "joins"):
            return None
        value = next((leaf for leaf in operands(made) if isinstance(leaf, Var)), None)
    return None


def _rounded(sums: Call, bias: _Bias) -> Call:
    held = array(bias.bias)
    unit = op.multiply(bias.weights, bias.data)
    repeats = held.size // array(bias.weights).size
    unit = op.reshape(op.tile(unit, [repeats]) if repeats > 1 else unit, held.shape)
    whole = op.multiply(op.round(op.divide(bias.bias, unit)), unit)
    return Call(sums.op, [whole if arg.same_as(bias.bias) else arg for arg in sums.args], sums.attrs)
