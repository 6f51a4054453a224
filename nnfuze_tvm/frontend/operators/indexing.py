"""Operators that pick or replace values by index."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.onnx_door import impossible_size
from nnfuze_tvm.frontend.operators.moving import sliced
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import (
    axis_of,
    dtype_of,
    empty,
    fixed,
    nonnegative,
    operand,
    required,
    reshaped,
    rows,
    scalar,
)
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

# Constant indices that name a place more often are left to a loop over the updates.
_FEW = 4


def _picked(node: Node, data: Value, indices: Value, axis: int) -> Value:
    """Return slices along an axis, by index: a slice where the indices are evenly spaced."""
    shape, places = ir.static_shape(data), known(indices)
    result = (*shape[:axis], *ir.static_shape(indices), *shape[axis + 1 :])
    if 0 in result:
        return empty(result, dtype_of(data))
    if places is None:
        # Of a place that is not there the nearest is taken: what lies behind the data is nobody's.
        return op.take(data, indices, axis, mode="clip")
    if places.size > shape[axis]:
        return op.take(data, indices, axis)
    line = [int(place) for place in places.ravel()]
    step = line[1] - line[0] if len(line) > 1 else 1
    if step == 0 or line != list(range(line[0], line[0] + step * len(line), step)):
        return op.take(data, indices, axis)
    end = line[-1] + (1 if step > 0 else -1)
    taken = node.emit(sliced(data, {axis: slice(line[0], end if end >= 0 else None, step)}))
    return op.squeeze(taken, axis) if places.ndim == 0 else reshaped(taken, result)


def _gather(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    axis = axis_of(int(node.attributes.get("axis", 0)), len(shape))
    return _picked(node, inputs[0], node.emit(nonnegative(inputs[1], shape[axis])), axis)


def _gather_elements(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    axis = axis_of(int(node.attributes.get("axis", 0)), len(shape))
    taken = ir.static_shape(inputs[1])
    if 0 in taken:
        return empty(taken, dtype_of(inputs[0]))
    data = sliced(inputs[0], {n: slice(0, size) for n, size in enumerate(taken) if n != axis})
    return op.gather_elements(data, nonnegative(inputs[1], shape[axis]), axis)


def _places(node: Node, indices: Value, sizes: np.ndarray) -> Value:
    """Return the numbers of rows that are called by one index per axis.

    Shapes: [..., axes] and [axes] → [...].
    """
    inside = nonnegative(indices, sizes)
    strides = np.append(np.cumprod(sizes[:0:-1])[::-1], 1).astype("int64")
    found = known(inside)
    if found is not None:
        return constant((found * strides).sum(-1))
    return node.emit(op.sum(op.multiply(op.astype(inside, "int64"), constant(strides)), -1))


def _gather_nd(node: Node, inputs: Operands) -> Any:
    shape, taken = ir.static_shape(inputs[0]), ir.static_shape(inputs[1])
    batch = int(node.attributes.get("batch_dims", 0))
    named = batch + taken[-1]
    if 0 in (result := (*taken[:-1], *shape[named:])):
        return empty(result, dtype_of(inputs[0]))
    places = _places(node, inputs[1], np.array(shape[batch:named], dtype="int64"))
    count, size = (int(np.prod(part)) for part in (shape[:batch], shape[batch:named]))
    if batch:
        firsts = constant((np.arange(count) * size).reshape(shape[:batch] + (1,) * (len(taken) - 1 - batch)))
        array = known(places)
        places = node.emit(op.add(places, firsts)) if array is None else constant(array + known(firsts))
    return _picked(node, node.emit(reshaped(inputs[0], (count * size, *shape[named:]))), places, 0)


def _replaced(node: Node, data: Value, places: Value, updates: Value, reduction: str) -> Value:
    """Return rows of which some are replaced by others, or combined with them.

    Shapes: [N, ...], [M] and [M, ...] → [N, ...].
    """
    if reduction not in ("none", "add", "mul", "max", "min"):
        raise ValueError(f"reduction {reduction!r} is not supported")
    line = known(places)
    rounds = None if line is None else _rounds(line, ir.static_shape(data)[0], reduction)
    if rounds is None:
        shape = ir.static_shape(updates)
        index = op.broadcast_to(reshaped(places, (shape[0],) + (1,) * (len(shape) - 1)), shape)
        return op.scatter_elements(data, index, updates, 0, "update" if reduction == "none" else reduction)
    if reduction == "none":
        return rows(node.emit(op.concat([data, updates], 0)), constant(rounds[0]))
    combine = {"add": op.add, "mul": op.multiply, "max": op.maximum, "min": op.minimum}[reduction]
    neutral = constant(np.full((1, *ir.static_shape(data)[1:]), _neutral(reduction, dtype_of(data)), dtype_of(data)))
    extended = node.emit(op.concat([updates, neutral], 0))
    for which in rounds:
        data = node.emit(combine(data, rows(extended, constant(which))))
    return data


def _rounds(line: np.ndarray, count: int, reduction: str) -> list[np.ndarray] | None:
    """Return which row each place of the result takes; several rounds where a place is named again.

    With reduction ``none`` the rows are those of the data, then the updates; else the updates, and one that changes
    nothing. None where there would be many rounds.
    """
    if reduction == "none":
        which = np.arange(count)
        which[line] = count + np.arange(line.size)
        return [which]
    if line.size and np.bincount(line, minlength=count).max() > _FEW:
        return None
    result: list[np.ndarray] = []
    times = np.zeros(count, int)
    for update, place in enumerate(line):
        if times[place] == len(result):
            result.append(np.full(count, line.size))
        result[times[place]][place] = update
        times[place] += 1
    return result


def _neutral(reduction: str, dtype: str) -> float:
    if reduction in ("add", "mul"):
        return 0 if reduction == "add" else 1
    if np.dtype(dtype).kind == "f":
        return -np.inf if reduction == "max" else np.inf
    if dtype == "bool":
        return reduction == "min"
    return np.iinfo(dtype).min if reduction == "max" else np.iinfo(dtype).max


def _scatter_elements(node: Node, inputs: Operands) -> Any:
    data, indices, updates = inputs[:3]
    shape, taken = ir.static_shape(data), ir.static_shape(indices)
    if 0 in taken or 0 in shape:
        return data
    axis = axis_of(int(node.attributes.get("axis", 0)), len(shape))
    inside = node.emit(nonnegative(indices, shape[axis]))
    others = np.indices(taken).astype("int64")
    strides = np.append(np.cumprod(shape[:0:-1])[::-1], 1).astype("int64")
    rest = sum((others[n] * strides[n] for n in range(len(shape)) if n != axis), np.zeros(taken, "int64"))
    found = known(inside)
    if found is not None:
        places: Value = constant((found.astype("int64") * strides[axis] + rest).ravel())
    else:
        along = op.multiply(op.astype(inside, "int64"), constant(strides[axis]))
        places = node.emit(op.reshape(op.add(along, constant(rest)), (rest.size,)))
    flat, new = (node.emit(reshaped(each, (int(np.prod(ir.static_shape(each))),))) for each in (data, updates))
    return reshaped(node.emit(_replaced(node, flat, places, new, node.text("reduction", "none"))), shape)


def _scatter_nd(node: Node, inputs: Operands) -> Any:
    data, indices, updates = inputs[:3]
    shape, taken = ir.static_shape(data), ir.static_shape(indices)
    if 0 in taken[:-1] or 0 in shape:
        return data
    named = taken[-1]
    places = node.emit(reshaped(_places(node, indices, np.array(shape[:named], "int64")), (int(np.prod(taken[:-1])),)))
    places = constant(array) if (array := known(places)) is not None else places
    flat = node.emit(reshaped(data, (int(np.prod(shape[:named])), *shape[named:])))
    new = node.emit(reshaped(updates, (int(np.prod(taken[:-1])), *shape[named:])))
    return reshaped(node.emit(_replaced(node, flat, places, new, node.text("reduction", "none"))), shape)


def _one_hot(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    depth = int(required(inputs[1], "depths").item())
    axis = axis_of(int(node.attributes.get("axis", -1)), len(shape) + 1)
    indices = inputs[0] if dtype_of(inputs[0]).startswith("int") else op.astype(inputs[0], "int64")
    indices = node.emit(indices)
    # Those outside of [-depth, depth) are nowhere.
    counted = op.where(op.less(indices, scalar(0, indices)), op.add(indices, scalar(depth, indices)), indices)
    if reason := impossible_size((*shape, depth)):
        raise ValueError(f"a result {reason}")
    line = np.arange(depth).reshape([-1 if n == axis else 1 for n in range(len(shape) + 1)])
    hit = op.equal(op.expand_dims(counted, axis), constant(line, dtype_of(indices)))
    off, on = (node.emit(_picked(node, inputs[2], constant(np.array(n)), 0)) for n in range(2))
    return op.where(hit, on, off)


def _top_k(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    axis = axis_of(int(node.attributes.get("axis", -1)), len(shape))
    count = int(node.attributes["k"]) if node.opset < 10 else int(required(inputs[1], "counts").item())
    if not 0 <= count <= shape[axis]:
        raise ValueError(f"{count} of {shape[axis]} values")
    if count == 0:
        result = (*shape[:axis], 0, *shape[axis + 1 :])
        return [empty(result, dtype_of(inputs[0])), empty(result, "int64")]
    if dtype_of(inputs[0]) in ("bool", "uint16", "uint32", "uint64"):
        raise ValueError(f"type {dtype_of(inputs[0])} is not supported")
    largest = bool(node.attributes.get("largest", 1))
    return op.topk(inputs[0], count, axis, "both", largest, "int64")


def _trilu(node: Node, inputs: Operands) -> Any:
    shape, dtype = ir.static_shape(inputs[0]), dtype_of(inputs[0])
    offset = fixed(operand(inputs, 1), "diagonals")
    first = 0 if offset is None else int(offset.item())
    upper = bool(node.attributes.get("upper", 1))
    if 0 in shape:
        return inputs[0]
    if dtype == "bool":
        inside = np.triu(np.ones(shape[-2:], bool), first) if upper else np.tril(np.ones(shape[-2:], bool), first)
        return op.logical_and(inputs[0], constant(inside))
    # Diagonals outside of the matrix may be named by any number.
    bounded = min(max(first, -shape[-2]), shape[-1])
    return (op.triu if upper else op.tril)(inputs[0], bounded)


def _compress(node: Node, inputs: Operands) -> Any:
    taken = np.flatnonzero(required(inputs[1], "conditions")).astype("int64")
    data, axis = inputs[0], node.attributes.get("axis")
    if axis is None:
        data, axis = node.emit(reshaped(data, (int(np.prod(ir.static_shape(data))),))), 0
    along = axis_of(int(axis), len(ir.static_shape(data)))
    return _picked(node, data, nonnegative(constant(taken), ir.static_shape(data)[along]), along)


CONVERTERS: dict[str, Converter] = {
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "Scatter": _scatter_elements,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "OneHot": _one_hot,
    "TopK": _top_k,
    "Trilu": _trilu,
    "Compress": _compress,
}
