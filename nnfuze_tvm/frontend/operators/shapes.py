"""Operators that give tensors another shape or type, and those that make constants."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.onnx_file import TYPES, type_name
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, refused
from nnfuze_tvm.frontend.operators.values import axis_of, dtype_of, list_of, required, reshaped, scalar
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _reshape(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    wanted = [int(size) for size in required(inputs[1], "shapes")]
    if not node.attributes.get("allowzero", 0):
        if any(size == 0 and axis >= len(shape) for axis, size in enumerate(wanted)):
            raise ValueError(f"shape {wanted} keeps an axis that {shape} does not have")
        wanted = [shape[axis] if size == 0 else size for axis, size in enumerate(wanted)]
    if wanted.count(-1) > 1 or min(wanted, default=0) < -1:
        raise ValueError(f"{wanted} is no shape")
    count = int(np.prod(shape, dtype=np.int64))
    if -1 in wanted:
        others = int(np.prod([size for size in wanted if size != -1], dtype=np.int64))
        wanted = [(count // others if others else 0) if size == -1 else size for size in wanted]
    if int(np.prod(wanted, dtype=np.int64)) != count:
        raise ValueError(f"{shape} can't be reshaped to {tuple(wanted)}")
    return reshaped(inputs[0], wanted)


def _flatten(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    axis = int(node.attributes.get("axis", 1))
    if not -len(shape) <= axis <= len(shape):
        raise ValueError(f"axis {axis} of a tensor with {len(shape)} dimensions")
    axis += len(shape) if axis < 0 else 0
    return reshaped(inputs[0], [int(np.prod(part, dtype=np.int64)) for part in (shape[:axis], shape[axis:])])


def _squeeze(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    axes = list_of(node, inputs, "axes", 1, 13)
    chosen = (
        [n for n, size in enumerate(shape) if size == 1] if axes is None else [axis_of(a, len(shape)) for a in axes]
    )
    if any(shape[axis] != 1 for axis in chosen):
        raise ValueError(f"axes {chosen} of {shape} are not all of size 1")
    return op.squeeze(inputs[0], chosen) if chosen else inputs[0]


def _unsqueeze(node: Node, inputs: Operands) -> Any:
    axes = list_of(node, inputs, "axes", 1, 13)
    if axes is None:
        raise ValueError("it has no axes")
    rank = len(ir.static_shape(inputs[0])) + len(axes)
    chosen = sorted({axis_of(axis, rank) for axis in axes})
    if len(chosen) != len(axes):
        raise ValueError(f"axes {axes} name one twice")
    return op.expand_dims(inputs[0], chosen) if chosen else inputs[0]


def _eye_like(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    if len(shape) != 2:
        raise ValueError(f"a matrix like a tensor with {len(shape)} dimensions")
    dtype = type_name(node.attributes["dtype"]) if "dtype" in node.attributes else dtype_of(inputs[0])
    return constant(np.eye(*shape, k=int(node.attributes.get("k", 0)), dtype=dtype))


def cast(value: Value, dtype: str) -> Value:
    """Return a tensor in another type, with what C makes of numbers that it can't hold."""
    source = dtype_of(value)
    if source == dtype:
        return value
    if dtype == "bool":
        # NaN is true, and so is half. In kernels no comparison holds for NaN, not even this one.
        other = op.not_equal(value, scalar(0, value))
        return op.logical_or(other, op.isnan(value)) if source.startswith("float") else other
    if source.startswith("float") and dtype in ("int8", "uint8", "int16", "uint16"):
        # Straight to few bits, what doesn't fit them is whatever the CPU does; its low bits are well defined.
        return op.astype(op.astype(value, "int32"), dtype)
    if source.startswith("float") and dtype == "uint32":
        return op.astype(op.astype(value, "int64"), dtype)
    return op.astype(value, dtype)


def _cast(node: Node, inputs: Operands) -> Any:
    return cast(inputs[0], type_name(int(node.attributes["to"])))


def _cast_like(node: Node, inputs: Operands) -> Any:
    dtype = dtype_of(inputs[1])
    if dtype not in TYPES:
        raise ValueError(f"type {dtype} is not supported")
    return cast(inputs[0], dtype)


CONVERTERS: dict[str, Converter] = {
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "EyeLike": _eye_like,
    "Cast": _cast,
    "CastLike": _cast_like,
    "ConstantOfShape": refused("a shape that is computed: the shape of the result depends on data"),
    "Range": refused("bounds that are computed: the shape of the result depends on data"),
    "NonZero": refused("values that are computed: the shape of the result depends on data"),
    "Unique": refused("values that are computed: the shape of the result depends on data"),
}
