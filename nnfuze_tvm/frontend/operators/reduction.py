"""Operators that reduce axes, say where extremes are, or accumulate."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.frontend.operators.shapes import cast
from nnfuze_tvm.frontend.operators.values import axis_of, dtype_of, list_of, required, reshaped, scalar
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

Reduce = Callable[[Node, Value, list[int], bool], Value]
"""``(node, data, axes, keepdims) -> result``; without axes only what is computed per element is left."""


def _sum(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return node.emit(op.sum(data, axes, keepdims=keep)) if axes else data


def _mean(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    if not axes:
        return data
    if dtype_of(data).startswith("float"):
        return op.mean(data, axes, keepdims=keep)
    count = int(np.prod([ir.static_shape(data)[axis] for axis in axes]))
    # Cut off towards zero, as C divides.
    return op.divide(_sum(node, data, axes, keep), scalar(count, data))


def _product(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return op.prod(data, axes, keepdims=keep) if axes else data


def _extreme(largest: bool) -> Reduce:
    """Return a maximum or minimum that is NaN where one of the values is."""

    def reduce(_: Node, data: Value, axes: list[int], keep: bool) -> Value:
        if not axes:
            return data
        bound = op.max if largest else op.min
        if dtype_of(data) == "bool":
            return op.astype(bound(op.astype(data, "int8"), axes, keepdims=keep), "bool")
        return bound(data, axes, keepdims=keep)

    return reduce


def _absolute(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return _sum(node, op.abs(data), axes, keep)


def _squares(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return _sum(node, op.multiply(data, data), axes, keep)


def _norm(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return _in_floats(node, op.sqrt, _squares(node, data, axes, keep))


def _log_sum(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    return _in_floats(node, op.log, _sum(node, data, axes, keep))


def _log_sum_exp(node: Node, data: Value, axes: list[int], keep: bool) -> Value:
    """Subtract the largest value first, where it is a number."""
    dtype = dtype_of(data)
    wide = node.emit(data if dtype.startswith("float") else op.astype(data, "float64"))
    if not axes:
        return cast(node.emit(op.log(op.exp(wide))), dtype)
    largest = node.emit(op.max(wide, axes, keepdims=True))
    shift = node.emit(op.where(op.isfinite(largest), largest, scalar(0, wide)))
    total = node.emit(op.log(op.sum(op.exp(op.subtract(wide, shift)), axes, keepdims=keep)))
    shape = ir.static_shape(total)
    return cast(node.emit(op.add(total, reshaped(shift, shape))), dtype)


def _in_floats(node: Node, function: Callable[[Value], Value], value: Value) -> Value:
    """Apply a function of floats, to whole numbers, too."""
    value = node.emit(value)
    dtype = dtype_of(value)
    if dtype.startswith("float"):
        return function(value)
    return op.astype(function(op.astype(value, "float64")), dtype)


def _reduction(reduce: Reduce, since: int = 18) -> Converter:
    """Return a converter; the axes are an operand since a version of the operator set."""

    def convert(node: Node, inputs: Operands) -> Any:
        data, shape = inputs[0], ir.static_shape(inputs[0])
        named = list_of(node, inputs, "axes", 1, since)
        axes = sorted({axis_of(axis, len(shape)) for axis in named or []})
        if not named and not (node.opset >= since and node.attributes.get("noop_with_empty_axes", 0)):
            axes = list(range(len(shape)))
        keep = bool(node.attributes.get("keepdims", 1))
        narrow = dtype_of(data) == "float16" and reduce not in _EXACT
        if narrow:
            # Sums of many float16 have no digits left.
            data = op.astype(data, "float32")
        result = reduce(node, node.emit(data), axes, keep)
        return op.astype(result, "float16") if narrow else result

    return convert


def _last_first(largest: bool) -> Converter:
    """Return a converter of ArgMax or ArgMin."""

    def convert(node: Node, inputs: Operands) -> Any:
        shape = ir.static_shape(inputs[0])
        axis = axis_of(int(node.attributes.get("axis", 0)), len(shape))
        return _position(node, inputs[0], axis, largest, bool(node.attributes.get("keepdims", 1)))

    return convert


def _position(node: Node, data: Value, axis: int, largest: bool, keep: bool) -> Value:
    find = op.argmax if largest else op.argmin
    if not node.attributes.get("select_last_index", 0):
        return find(data, axis, keepdims=keep)
    found = node.emit(find(node.emit(op.flip(data, axis)), axis, keepdims=keep))
    return op.subtract(scalar(ir.static_shape(data)[axis] - 1, found), found)


def _hardmax(node: Node, inputs: Operands) -> Any:
    """One where the first largest value is; along the last axes made one before opset 13."""
    data, shape = inputs[0], ir.static_shape(inputs[0])
    axis = axis_of(int(node.attributes.get("axis", -1 if node.opset >= 13 else 1)), len(shape))
    if node.opset < 13:
        data = node.emit(reshaped(data, (int(np.prod(shape[:axis])), int(np.prod(shape[axis:])))))
        axis = 1
    sizes = ir.static_shape(data)
    found = node.emit(op.argmax(data, axis, keepdims=True))
    line = constant(np.arange(sizes[axis]).reshape([-1 if n == axis else 1 for n in range(len(sizes))]))
    return reshaped(node.emit(op.astype(op.equal(found, line), dtype_of(data))), shape)


def _cumulative(function: Callable[..., Value]) -> Converter:
    def convert(node: Node, inputs: Operands) -> Any:
        shape = ir.static_shape(inputs[0])
        axis = axis_of(int(required(inputs[1], "axes").item()), len(shape))
        backwards, exclusive = (bool(node.attributes.get(name, 0)) for name in ("reverse", "exclusive"))
        data = node.emit(op.flip(inputs[0], axis)) if backwards else inputs[0]
        total = node.emit(function(data, axis, dtype_of(data), exclusive))
        return op.flip(total, axis) if backwards else total

    return convert


_MAX, _MIN = _extreme(largest=True), _extreme(largest=False)
_EXACT = (_MAX, _MIN)

CONVERTERS: dict[str, Converter] = {
    "ReduceSum": _reduction(_sum, since=13),
    "ReduceMean": _reduction(_mean),
    "ReduceProd": _reduction(_product),
    "ReduceMax": _reduction(_MAX),
    "ReduceMin": _reduction(_MIN),
    "ReduceL1": _reduction(_absolute),
    "ReduceL2": _reduction(_norm),
    "ReduceSumSquare": _reduction(_squares),
    "ReduceLogSum": _reduction(_log_sum),
    "ReduceLogSumExp": _reduction(_log_sum_exp),
    "ArgMax": _last_first(largest=True),
    "ArgMin": _last_first(largest=False),
    "Hardmax": _hardmax,
    "CumProd": _cumulative(op.cumprod),
    "CumSum": _cumulative(op.cumsum),
}
