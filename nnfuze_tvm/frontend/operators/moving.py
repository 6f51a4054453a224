"""Operators that put values in other places, or several times in the result."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import (
    axis_of,
    dtype_of,
    empty,
    fixed,
    list_of,
    nonnegative,
    operand,
    permuted,
    required,
    reshaped,
    rows,
    scalar,
)
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def sliced(data: Value, cuts: dict[int, slice]) -> Value:
    """Return what slices take of the axes of a tensor, with the meaning that they have in Python."""
    shape = list(ir.static_shape(data))
    begins, ends, steps, axes = [], [], [], []
    for axis, cut in sorted(cuts.items()):
        size = shape[axis]
        taken = range(size)[cut]
        shape[axis] = len(taken)
        if taken == range(size) or not taken:
            continue
        step = taken.step if len(taken) > 1 else 1
        last = taken[-1] + (1 if step > 0 else -1)
        axes.append(axis)
        begins.append(taken[0])
        # In front of the first element: -1 would be the last one.
        ends.append(last if last >= 0 else -size - 1)
        steps.append(step)
    if 0 in shape:
        return empty(shape, dtype_of(data))
    return op.strided_slice(data, axes, begins, ends, steps) if axes else data


def _slice(node: Node, inputs: Operands) -> Any:
    rank = len(ir.static_shape(inputs[0]))
    starts, ends = list_of(node, inputs, "starts", 1, 10), list_of(node, inputs, "ends", 2, 10)
    if starts is None or ends is None:
        raise ValueError("it has no starts or no ends")
    axes, steps = list_of(node, inputs, "axes", 3, 10), None
    if node.opset >= 10:
        steps = list_of(node, inputs, "steps", 4, 10)
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    if 0 in steps:
        raise ValueError("a step of 0")
    cuts = zip(axes, starts, ends, steps, strict=True)
    return sliced(inputs[0], {axis_of(axis, rank): slice(first, end, step) for axis, first, end, step in cuts})


def _transpose(node: Node, inputs: Operands) -> Any:
    rank = len(ir.static_shape(inputs[0]))
    order = [int(axis) for axis in node.attributes.get("perm", range(rank)[::-1])]
    if sorted(order) != list(range(rank)):
        raise ValueError(f"perm {order} of {rank} dimensions")
    return permuted(inputs[0], order)


def _concat(node: Node, inputs: Operands) -> Any:
    shapes = [ir.static_shape(each) for each in inputs]
    axis = axis_of(int(node.attributes.get("axis", 1)), len(shapes[0]))
    if any(shape[:axis] + shape[axis + 1 :] != shapes[0][:axis] + shapes[0][axis + 1 :] for shape in shapes):
        raise ValueError(f"shapes {', '.join(map(str, shapes))} can't be joined along axis {axis}")
    parts = [part for part, shape in zip(inputs, shapes, strict=True) if shape[axis]] or inputs[:1]
    return parts[0] if len(parts) == 1 else op.concat(parts, axis)


def _split(node: Node, inputs: Operands) -> Any:
    data, shape = inputs[0], ir.static_shape(inputs[0])
    axis = axis_of(int(node.attributes.get("axis", 0)), len(shape))
    sizes = list_of(node, inputs, "split", 1, 13)
    if sizes is None:
        count = int(node.attributes.get("num_outputs", node.outputs))
        largest = -(-shape[axis] // count)
        sizes = [max(min(largest, shape[axis] - n * largest), 0) for n in range(count)]
    if sum(sizes) != shape[axis] or min(sizes) < 0:
        raise ValueError(f"{shape[axis]} values along axis {axis} can't be split into {sizes}")
    # Slices become part of the kernels that read them.
    ends = np.cumsum(sizes).tolist()
    return [sliced(data, {axis: slice(end - size, end)}) for end, size in zip(ends, sizes, strict=True)]


def _expand(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    wanted = tuple(int(size) for size in required(inputs[1], "shapes"))
    result = np.broadcast_shapes(shape, wanted)
    if 0 in result:
        return empty(result, dtype_of(inputs[0]))
    return inputs[0] if result == shape else op.broadcast_to(inputs[0], result)


def _tile(node: Node, inputs: Operands) -> Any:
    shape = ir.static_shape(inputs[0])
    repeats = [int(each) for each in required(inputs[1], "repeats")]
    if len(repeats) != len(shape):
        raise ValueError(f"{len(repeats)} repeats of a tensor with {len(shape)} dimensions")
    if min(repeats, default=0) < 0:
        raise ValueError(f"repeats {repeats} are negative")
    if 0 in repeats:
        return empty([size * times for size, times in zip(shape, repeats, strict=True)], dtype_of(inputs[0]))
    if all(size == 1 or times == 1 for size, times in zip(shape, repeats, strict=True)):
        result = tuple(size * times for size, times in zip(shape, repeats, strict=True))
        return inputs[0] if result == shape else op.broadcast_to(inputs[0], result)
    return op.tile(inputs[0], repeats)


def _pad(node: Node, inputs: Operands) -> Any:
    data, rank = inputs[0], len(ir.static_shape(inputs[0]))
    pads = list_of(node, inputs, "pads", 1, 11)
    if pads is None:
        raise ValueError("it has no pads")
    chosen = fixed(operand(inputs, 3), "axes") if node.opset >= 18 else None
    axes = list(range(rank)) if chosen is None else [axis_of(int(axis), rank) for axis in chosen.ravel()]
    if len(pads) != 2 * len(axes):
        raise ValueError(f"{len(pads)} pads for {len(axes)} axes")
    widths = {axis: (pads[n], pads[n + len(axes)]) for n, axis in enumerate(axes)}
    data = _cropped(node, data, widths)
    widths = {axis: (max(first, 0), max(last, 0)) for axis, (first, last) in widths.items() if max(first, last) > 0}
    mode = node.text("mode", "constant")
    if mode == "constant":
        fill = operand(inputs, 2) if node.opset >= 11 else constant(np.array(node.attributes.get("value", 0.0)))
        return _filled_around(data, widths, fill) if widths else data
    if mode not in ("reflect", "edge", "wrap"):
        raise ValueError(f"mode {mode!r} is not supported")
    for axis, (first, last) in widths.items():
        data = _continued(node, data, axis, first, last, mode)
    return data


def _cropped(node: Node, data: Value, widths: dict[int, tuple[int, int]]) -> Value:
    """Cut off what negative pads say."""
    shape = ir.static_shape(data)
    if any(shape[axis] + min(first, 0) + min(last, 0) < 0 for axis, (first, last) in widths.items()):
        raise ValueError("negative pads cut off more than there is")
    cuts = {
        axis: slice(max(-first, 0), shape[axis] + min(last, 0))
        for axis, (first, last) in widths.items()
        if min(first, last) < 0
    }
    return node.emit(sliced(data, cuts)) if cuts else data


def _filled_around(data: Value, widths: dict[int, tuple[int, int]], fill: Value | None) -> Value:
    """Put one value around a tensor.

    R.nn.pad holds the value as a float64: it does not need to be one, nor known.
    """
    shape, dtype = ir.static_shape(data), dtype_of(data)
    amounts = [amount for axis in range(len(shape)) for amount in widths.get(axis, (0, 0))]
    value = np.zeros((), dtype) if fill is None else known(fill)
    value = None if value is None else value.astype(dtype).reshape(())
    plain = value is not None and value.dtype.kind != "b" and 0 not in shape
    if value is not None and plain and (value.dtype.kind == "f" or abs(int(value)) < 2**53):
        return op.nn.pad(data, amounts, "constant", float(value))
    inside = np.pad(np.ones(shape, bool), np.array(amounts).reshape(-1, 2))
    other = constant(value) if value is not None else op.reshape(fill, ())
    if 0 in shape:
        return op.broadcast_to(other, inside.shape)
    number = op.astype(data, "int8") if dtype == "bool" else data
    padded = op.nn.pad(number, amounts, "constant", 0.0)
    return op.where(constant(inside), op.astype(padded, dtype) if dtype == "bool" else padded, other)


def _continued(node: Node, data: Value, axis: int, first: int, last: int, mode: str) -> Value:
    """Pad one axis by values of its own: slices side by side where they are few, else by index."""
    size = ir.static_shape(data)[axis]
    if size == 0:
        raise ValueError(f"mode {mode!r} of a tensor without elements")
    if mode == "edge":
        parts = [
            op.repeat(node.emit(sliced(data, {axis: slice(at, at + 1)})), count, axis)
            if count > 1
            else node.emit(sliced(data, {axis: slice(at, at + 1)}))
            for at, count in ((0, first), (size - 1, last))
            if count
        ]
        return node.emit(op.concat([*parts[:1], data, *parts[1:]] if first else [data, *parts], axis))
    if max(first, last) > (size - 1 if mode == "reflect" else size):
        # Several periods.
        places = np.pad(np.arange(size), (first, last), mode)  # type: ignore[call-overload]
        return node.emit(op.take(data, constant(places), axis))
    if mode == "reflect":
        before, after = slice(first, 0, -1), slice(size - 2, size - 2 - last if size - 2 - last >= 0 else None, -1)
    else:
        before, after = slice(size - first, size), slice(0, last)
    front = [node.emit(sliced(data, {axis: before}))] if first else []
    back = [node.emit(sliced(data, {axis: after}))] if last else []
    return node.emit(op.concat([*front, data, *back], axis))


def _space_to_depth(node: Node, inputs: Operands) -> Any:
    batch, channels, height, width = ir.static_shape(inputs[0])
    size = int(node.attributes["blocksize"])
    if height % size or width % size:
        raise ValueError(f"{height} x {width} values are no blocks of {size} x {size}")
    blocks = op.reshape(inputs[0], (batch, channels, height // size, size, width // size, size))
    # ONNX's own way is DCR; of the other one only files know.
    order = [0, 1, 3, 5, 2, 4] if node.text("mode", "DCR") == "CRD" else [0, 3, 5, 1, 2, 4]
    return op.reshape(op.permute_dims(blocks, order), (batch, channels * size * size, height // size, width // size))


def _depth_to_space(node: Node, inputs: Operands) -> Any:
    batch, channels, height, width = ir.static_shape(inputs[0])
    size, mode = int(node.attributes["blocksize"]), node.text("mode", "DCR")
    if channels % (size * size):
        raise ValueError(f"{channels} channels are no blocks of {size} x {size}")
    left = channels // (size * size)
    if mode not in ("DCR", "CRD"):
        raise ValueError(f"mode {mode!r} is not supported")
    parts, order = (
        ((size, size, left), [0, 3, 4, 1, 5, 2]) if mode == "DCR" else ((left, size, size), [0, 1, 4, 2, 5, 3])
    )
    blocks = op.permute_dims(op.reshape(inputs[0], (batch, *parts, height, width)), order)
    return op.reshape(blocks, (batch, left, height * size, width * size))


def _reverse_sequence(node: Node, inputs: Operands) -> Any:
    """Pick rows in the order of [steps, sequences] or [sequences, steps]."""
    shape = ir.static_shape(inputs[0])
    along = int(node.attributes.get("time_axis", 0))
    across = int(node.attributes.get("batch_axis", 1))
    if {along, across} != {0, 1}:
        raise ValueError("time_axis and batch_axis other than 0 and 1")
    steps, sequences = np.indices(shape[:2])[along], np.indices(shape[:2])[across]
    columns = (1, shape[1]) if across == 1 else (shape[0], 1)
    lengths = node.emit(op.reshape(op.astype(inputs[1], "int64"), columns))
    step = constant(steps)
    source = op.where(op.less(step, lengths), op.subtract(op.subtract(lengths, scalar(1, lengths)), step), step)
    source = node.emit(nonnegative(node.emit(source), shape[along]))
    if along == 0:
        place = op.add(op.multiply(source, scalar(shape[1], source)), constant(sequences))
    else:
        place = op.add(source, constant(sequences * shape[1]))
    return rows(reshaped(inputs[0], (shape[0] * shape[1], *shape[2:])), node.emit(place))


def _where(node: Node, inputs: Operands) -> Any:
    return op.where(*inputs)


CONVERTERS: dict[str, Converter] = {
    "Slice": _slice,
    "Transpose": _transpose,
    "Concat": _concat,
    "Split": _split,
    "Expand": _expand,
    "Tile": _tile,
    "Pad": _pad,
    "SpaceToDepth": _space_to_depth,
    "DepthToSpace": _depth_to_space,
    "ReverseSequence": _reverse_sequence,
    "Where": _where,
}
