"""What converters of several families ask of operands, and make of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def operand(inputs: Operands, index: int) -> Value | None:
    """Return an operand, None where it is left out."""
    return inputs[index] if index < len(inputs) else None


def dtype_of(value: Value) -> str:
    """Return the type of a tensor's elements."""
    return str(value.ty.dtype)


def fixed(value: Value | None, what: str) -> np.ndarray | None:
    """Return an operand that must be constant; None where it is left out.

    Raises
    ------
    ValueError
        If it is computed.
    """
    found = known(value)
    if value is not None and found is None:
        raise ValueError(f"{what} that are computed are not supported")
    return found


def required(value: Value | None, what: str) -> np.ndarray:
    """Return an operand that must be there, and constant.

    Raises
    ------
    ValueError
        If it is left out, or computed.
    """
    found = fixed(value, what)
    if found is None:
        raise ValueError(f"it has no {what}")
    return found


def axis_of(axis: int, rank: int) -> int:
    """Return an axis that may count from the end.

    Raises
    ------
    ValueError
        If there is no such axis.
    """
    if not -rank <= axis < max(rank, 1):
        raise ValueError(f"axis {axis} of a tensor with {rank} dimensions")
    return axis % max(rank, 1)


def list_of(node: Node, inputs: Operands, name: str, index: int, since: int) -> list[int] | None:
    """Return whole numbers that are an attribute before a version of the operator set, and an operand since then.

    None where they are left out.
    """
    if node.opset < since:
        found = node.attributes.get(name)
        return None if found is None else [int(each) for each in found]
    values = fixed(operand(inputs, index), name)
    return None if values is None else [int(each) for each in values.ravel()]


def empty(shape: Sequence[int], dtype: str) -> Value:
    """Return the one value that a tensor without elements has."""
    return constant(np.zeros(shape, dtype))


def scalar(value: float, like: Value) -> Value:
    """Return a constant of the type of a tensor's elements."""
    return constant(np.array(value, dtype_of(like)))


def nonnegative(indices: Value, sizes: int | np.ndarray) -> Value:
    """Return indices that count from the front, and lie inside.

    ``sizes`` are those of the axis, or axes (in indices' last one), that they point into.
    """
    bound = np.asarray(sizes)
    array = known(indices)
    if array is not None:
        if ((array < -bound) | (array >= bound)).any():
            raise ValueError("an index is out of range")
        return constant(np.where(array < 0, array + bound, array).astype(array.dtype))
    dtype = dtype_of(indices)
    counted = op.where(
        op.less(indices, constant(np.array(0, dtype))), op.add(indices, constant(bound.astype(dtype))), indices
    )
    # What points elsewhere shall at least not be read there.
    return op.minimum(op.maximum(counted, constant(np.array(0, dtype))), constant((bound - 1).astype(dtype)))


def rows(data: Value, indices: Value) -> Value:
    """Return rows of a tensor, picked by indices that lie inside.

    Shapes: [N, ...] and [...i] → [...i, ...].
    """
    return op.take(data, indices, 0)


def reshaped(value: Value, shape: Sequence[int]) -> Value:
    """Return a tensor in another shape, itself where that is the same."""
    wanted = tuple(int(size) for size in shape)
    return value if _shape(value) == wanted else op.reshape(value, wanted)


def permuted(value: Value, order: Sequence[int]) -> Value:
    """Return a tensor with its axes in another order, itself where that is the same."""
    return value if list(order) == list(range(len(order))) else op.permute_dims(value, list(order))


def _shape(value: Value) -> tuple[int, ...] | None:
    # What is not bound yet has no type.
    return None if value.ty is None or not hasattr(value.ty, "shape") else ir.static_shape(value)
