"""Layers whose weights a file stores in 8 bits, behind a dequantize, and multiplies as floats."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute
from nnfuze_tvm.graph.evaluate import call_of_constants
from nnfuze_tvm.graph.integers.context import along


@dataclass(frozen=True)
class Stored:
    """Weights as a file has them.

    Attributes
    ----------
    codes : numpy.ndarray
        Integers, zero points subtracted.
    scale : numpy.ndarray
        Of as many dimensions, broadcastable to them.
    """

    codes: np.ndarray
    scale: np.ndarray

    def per_row(self, axis: int) -> tuple[np.ndarray, np.ndarray] | None:
        """Return codes that int8 holds and a scale per index of ``axis``; None where that is not what they are."""
        count = self.codes.shape[axis]
        if self.codes.min(initial=0) < -128 or self.codes.max(initial=0) > 127:
            return None
        if self.scale.size not in (1, self.scale.shape[axis]):
            return None
        return self.codes, np.broadcast_to(self.scale.reshape(-1), (count,)).astype("float32")


def with_constants(func: relax.Function, names: Container[str]) -> tuple[relax.Function, dict[str, Stored]]:
    """Return the function with constants in the place of weights that are stored in 8 bits.

    Parameters
    ----------
    func : tvm.relax.Function
        A straight-line function.
    names : container of str
        The layers.

    Returns
    -------
    function, stored
        The function, and what the file has for the weights of each layer that changed.
    """
    made_by = {binding.var: binding.value for binding in bindings(func)}
    found: dict[str, Stored] = {}
    emitter = Emitter()
    values: dict[Value, Value] = {}
    layers: set[Value] = set()
    for binding in bindings(func):
        value = binding.value
        if binding.var.name in names and ops.is_layer(value):
            stored = _stored(value.args[1], made_by)
            if stored is not None:
                found[binding.var.name] = stored
                real = constant((stored.codes * stored.scale).astype("float32"))
                value = Call(value.op, [value.args[0], real, *value.args[2:]], value.attrs, value.ty_args, value.span)
                layers.add(binding.var)
        elif op_name(value) == "add" and any(arg in layers for arg in value.args):
            value = Call(value.op, [_bias(arg, made_by) for arg in value.args], value.attrs, value.ty_args, value.span)
        values[binding.var] = emitter.emit(substitute(value, values), binding.var.name)
    if not found:
        return func, found
    outputs = [substitute(out, values) for out in output_fields(func)]
    return emitter.finish(func.params, outputs, func.attrs), found


def _stored(value: Value, made_by: dict[Var, Value]) -> Stored | None:
    """Return what a tensor is made of that a dequantize of constants made, and moves after it."""
    call = made_by.get(value)
    if call is None:
        return None
    if op_name(call) == "dequantize":
        if not all(isinstance(arg, GenericConst) for arg in call.args):
            return None
        codes, scale, zero = map(array, call.args)
        axis, rank = int(call.attrs.axis), codes.ndim
        return Stored(codes.astype("int64") - along(zero.astype("int64"), axis, rank), along(scale, axis, rank))
    operator = ops.of(call)
    before = _stored(call.args[0], made_by) if operator is not None and operator.effect == "moves" else None
    if before is None:
        return None
    codes = _moved(call, before.codes)
    scale = _moved(call, np.broadcast_to(before.scale, before.codes.shape))
    return None if codes is None or scale is None else Stored(codes.astype("int64"), _narrowed(scale))


def _moved(call: Value, values: np.ndarray) -> Any:
    """Return other values, in float32, moved as a call moves its operand; None if the call can't say."""
    operand = constant(values.astype("float32"))
    return call_of_constants(Call(call.op, [operand, *call.args[1:]], call.attrs, call.ty_args, call.span, call.ty))


def _narrowed(scale: np.ndarray) -> np.ndarray:
    """Return scales without the axes along which they are the same."""
    for axis in range(scale.ndim):
        first = scale.take([0], axis)
        scale = first if np.array_equal(np.broadcast_to(first, scale.shape), scale) else scale
    return scale


def _bias(value: Value, made_by: dict[Var, Value]) -> Value:
    stored = _stored(value, made_by)
    return value if stored is None else constant((stored.codes * stored.scale).astype("float32"))
