"""Operators that read or write elements at places that are data."""

from __future__ import annotations

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.moving import pick
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _counted(node: Node, indices: Value, sizes: np.ndarray) -> Value:
    """Return indices counted from the front, as int64; ``sizes`` is broadcast to them.

    Raises
    ------
    ValueError
        If constant ones are out of range.
    """
    values = known(indices)
    if values is not None:
        if ((values < -sizes) | (values >= sizes)).any():
            raise ValueError("an index is out of range")
        return constant(np.where(values < 0, values + sizes, values).astype("int64"))
    wide = indices if str(indices.ty.dtype) == "int64" else node.emit(op.astype(indices, "int64"))
    shifted = node.emit(op.add(wide, constant(sizes.astype("int64"))))
    negative = node.emit(op.less(wide, constant(np.array(0, "int64"))))
    chosen = node.emit(op.where(negative, shifted, wide))
    # What is out of range reads and writes inside all the same.
    low = node.emit(op.maximum(chosen, constant(np.array(0, "int64"))))
    return node.emit(op.minimum(low, constant((sizes - 1).astype("int64"))))


def _axis(node: Node, rank: int, default: int = 0) -> int:
    axis = int(node.attributes.get("axis", default))
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of data of rank {rank}")
    return axis % rank


def _gather(node: Node, inputs: Operands) -> Value:
    data, indices = inputs[0], inputs[1]
    shape = ir.static_shape(data)
    axis = _axis(node, len(shape))
    places = _counted(node, indices, np.array(shape[axis]))
    values = known(places)
    return op.take(data, places, axis) if values is None else pick(data, values, axis)


def _gather_elements(node: Node, inputs: Operands) -> Value:
    shape = ir.static_shape(inputs[0])
    axis = _axis(node, len(shape))
    return op.gather_elements(inputs[0], _counted(node, inputs[1], np.array(shape[axis])), axis)


def _gather_nd(node: Node, inputs: Operands) -> Value:
    """Read blocks at places that are counted through all indexed axes."""
    data, indices = inputs[0], inputs[1]
    shape, places = ir.static_shape(data), ir.static_shape(indices)
    batch = int(node.attributes.get("batch_dims", 0))
    depth = places[-1]
    sizes, block = np.array(shape[batch : batch + depth]), shape[batch + depth :]
    groups = shape[:batch]
    counted = _counted(node, indices, sizes)
    strides = np.array([int(np.prod(sizes[n + 1 :])) for n in range(depth)], "int64")
    scaled = node.emit(op.multiply(counted, constant(strides)))
    flat = node.emit(op.sum(scaled, [-1]))
    if groups:
        first = np.arange(int(np.prod(groups)), dtype="int64") * int(np.prod(sizes))
        flat = node.emit(op.add(flat, constant(first.reshape(*groups, *[1] * (len(places) - 1 - batch)))))
    rows = node.emit(op.reshape(data, [int(np.prod(shape[: batch + depth])), *block]))
    index = node.emit(op.reshape(flat, [int(np.prod(places[:-1]))]))
    return op.reshape(node.emit(op.take(rows, index, 0)), [*places[:-1], *block])


_REDUCTIONS = {"none": "update", "add": "add", "mul": "mul", "max": "max", "min": "min"}


def _reduction(node: Node) -> str:
    name = node.text("reduction", "none")
    if name not in _REDUCTIONS:
        raise ValueError(f"reduction {name!r} is not supported")
    return _REDUCTIONS[name]


def _scatter_elements(node: Node, inputs: Operands) -> Value:
    shape = ir.static_shape(inputs[0])
    axis = _axis(node, len(shape))
    places = _counted(node, inputs[1], np.array(shape[axis]))
    return op.scatter_elements(inputs[0], places, inputs[2], axis, _reduction(node))


def _scatter_nd(node: Node, inputs: Operands) -> Value:
    shape, depth = ir.static_shape(inputs[0]), ir.static_shape(inputs[1])[-1]
    places = _counted(node, inputs[1], np.array(shape[:depth]))
    return op.scatter_nd(inputs[0], places, inputs[2], _reduction(node))


def _one_hot(node: Node, inputs: Operands) -> Value:
    """Compare with every class; what is no class is off everywhere."""
    depth, values = known(inputs[1]), known(inputs[2])
    if depth is None or values is None:
        raise ValueError("a computed depth or computed values are not supported")
    count, rank = int(depth.item()), len(ir.static_shape(inputs[0]))
    axis = int(node.attributes.get("axis", -1)) % (rank + 1)
    wide = node.emit(op.astype(inputs[0], "int64"))
    zero, size = constant(np.array(0, "int64")), constant(np.array(count, "int64"))
    counted = node.emit(op.where(node.emit(op.less(wide, zero)), node.emit(op.add(wide, size)), wide))
    classes = np.arange(count).reshape([-1 if n == axis else 1 for n in range(rank + 1)])
    here = node.emit(op.equal(node.emit(op.expand_dims(counted, axis)), constant(classes)))
    off, on = (constant(value) for value in values)
    return op.where(here, on, off)


def _top_k(node: Node, inputs: Operands) -> list[Value]:
    data = inputs[0]
    shape = ir.static_shape(data)
    axis = _axis(node, len(shape), -1)
    if node.opset < 10:
        count = int(node.attributes["k"])
    else:
        given = known(inputs[1])
        if given is None:
            raise ValueError("K that is computed is not supported")
        count = int(given.item())
    largest = bool(node.attributes.get("largest", 1))
    if str(data.ty.dtype) not in ("float32", "float64", "int32", "int64"):
        raise ValueError(f"type {data.ty.dtype} is not supported")
    if not 0 < count <= shape[axis]:
        raise ValueError(f"the first {count} of {shape[axis]}")
    both = node.emit(op.topk(data, count, axis, "both", largest, "int64"))
    return [both[0], both[1]]


CONVERTERS: dict[str, Converter] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
