"""Operators that read or write elements at places that are data."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from onnx.helper import tensor_dtype_to_np_dtype
from tvm.relax import op

from nnfuze_tvm.frontend.operators.moving import pick
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _counted(node: Node, indices: Value, sizes: np.ndarray, clamp: bool = True) -> Value:
    """Return indices counted from the front, as int64; ``sizes`` is broadcast to them.

    Computed ones that are out of range are brought into it with ``clamp``.

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
    if not clamp:
        return chosen
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
    places = _counted(node, indices, np.array(shape[axis]), clamp=False)
    values = known(places)
    # An index out of range must not read elsewhere.
    return op.take(data, places, axis, "clip") if values is None else pick(data, values, axis)


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
    return op.reshape(node.emit(op.take(rows, index, 0, "clip")), [*places[:-1], *block])


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


def _compress(node: Node, inputs: Operands) -> Value:
    """Pick what a constant chooses."""
    chosen = known(inputs[1])
    if chosen is None:
        raise ValueError("a computed condition is not supported: the size of the result depends on it")
    data = inputs[0]
    if "axis" not in node.attributes:
        data = node.emit(op.reshape(data, [int(np.prod(ir.static_shape(data)))]))
    return pick(data, np.flatnonzero(chosen), _axis(node, len(ir.static_shape(data))))


def _reverse_sequence(node: Node, inputs: Operands) -> Value:
    """Pick the elements of each sequence backwards, as far as it goes."""
    lengths = known(inputs[1])
    if lengths is None:
        raise ValueError("sequence_lens that is computed is not supported")
    shape = ir.static_shape(inputs[0])
    time, batch = (int(node.attributes.get(f"{name}_axis", n)) for n, name in enumerate(("time", "batch")))
    steps = np.arange(shape[time])[:, None]
    places = np.where(steps < lengths, lengths - 1 - steps, steps)
    if time == 1:
        places = places.T
    rows, columns = shape[:2]
    other = np.arange(rows)[:, None] if batch == 0 else np.arange(columns)
    flat = places * columns + other if batch == 1 else other * columns + places
    data = node.emit(op.reshape(inputs[0], [rows * columns, *shape[2:]]))
    return op.reshape(node.emit(pick(data, flat.ravel(), 0)), list(shape))


def _eye(node: Node, inputs: Operands) -> Value:
    """Only the shape of the operand counts."""
    kind = node.attributes.get("dtype")
    dtype = str(inputs[0].ty.dtype) if kind is None else str(tensor_dtype_to_np_dtype(kind))
    rows, columns = ir.static_shape(inputs[0])
    return constant(np.eye(rows, columns, int(node.attributes.get("k", 0))).astype(dtype))


def _cumulative(function: Callable[..., Value]) -> Converter:
    def convert(node: Node, inputs: Operands) -> Value:
        given = known(inputs[1])
        if given is None:
            raise ValueError("an axis that is computed is not supported")
        data, axis = inputs[0], int(given.item()) % len(ir.static_shape(inputs[0]))
        back = bool(node.attributes.get("reverse", 0))
        data = node.emit(op.flip(data, axis)) if back else data
        total = function(data, axis, str(data.ty.dtype), bool(node.attributes.get("exclusive", 0)))
        return op.flip(node.emit(total), axis) if back else total

    return convert


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
    if not 0 < count <= shape[axis]:
        raise ValueError(f"the first {count} of {shape[axis]}")
    own = str(data.ty.dtype)
    # Of these types all values are values of the wider one.
    wide = {"float16": "float32", "int8": "int32", "uint8": "int32", "int16": "int32", "uint16": "int32"}.get(own, own)
    if wide not in ("float32", "float64", "int32", "int64"):
        raise ValueError(f"type {own} is not supported")
    both = node.emit(op.topk(data if wide == own else op.astype(data, wide), count, axis, "both", largest, "int64"))
    return [both[0] if wide == own else op.astype(node.emit(both[0]), own), both[1]]


CONVERTERS: dict[str, Converter] = {
    "Compress": _compress,
    "CumProd": _cumulative(op.cumprod),
    "CumSum": _cumulative(op.cumsum),
    "EyeLike": _eye,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "OneHot": _one_hot,
    "ReverseSequence": _reverse_sequence,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "TopK": _top_k,
}
