"""Operators that put values in other places."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def axes_of(node: Node, operand: Value | None, rank: int) -> list[int] | None:
    """Return the axes of a node, an operand or (in old operator sets) an attribute, counted from the front.

    Raises
    ------
    ValueError
        If they are computed, or the data have no such axis.
    """
    if operand is not None:
        values = known(operand)
        if values is None:
            raise ValueError("axes that are computed are not supported")
        axes = values.ravel().tolist()
    elif "axes" in node.attributes:
        axes = list(node.attributes["axes"])
    else:
        return None
    if any(not -rank <= axis < rank for axis in axes):
        raise ValueError(f"axes {axes} of data of rank {rank}")
    return [int(axis) % rank for axis in axes]


def numbers(node: Node, operand: Value | None, name: str) -> list[int] | None:
    """Return integers that are a constant operand or an attribute of the same name; None where there are none."""
    if operand is not None:
        values = known(operand)
        if values is None:
            raise ValueError(f"{name} that is computed is not supported")
        return [int(value) for value in values.ravel()]
    given = node.attributes.get(name)
    return None if given is None else [int(value) for value in given]


def piece(data: Value, bounds: dict[int, tuple[int, int, int]]) -> Value:
    """Return ``data[start:stop:step]`` along some axes; bounds are as Python's ``slice.indices`` gives them."""
    shape = ir.static_shape(data)
    bounds = {axis: each for axis, each in bounds.items() if each != (0, shape[axis], 1)}
    if not bounds:
        return data
    # Behind the front is where a slice ends that goes back to the first element.
    ends = [stop if stop >= 0 else -shape[axis] - 1 for axis, (_, stop, _) in bounds.items()]
    starts, steps = ([each[n] for each in bounds.values()] for n in (0, 2))
    return op.strided_slice(data, list(bounds), starts, ends, steps)


def _slice(node: Node, inputs: Operands) -> Value:
    """Count bounds in Python's integers: TVM's converter narrows them to 32 bits."""
    data = inputs[0]
    shape = ir.static_shape(data)
    starts, ends = (numbers(node, inputs[n], name) for n, name in ((1, "starts"), (2, "ends")))
    if starts is None or ends is None:
        raise ValueError("it has no starts or no ends")
    axes = axes_of(node, inputs[3], len(shape))
    steps = numbers(node, inputs[4], "steps") or [1] * len(starts)
    axes = list(range(len(starts))) if axes is None else axes
    bounds = {}
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        bounds[axis] = slice(start, end, step).indices(shape[axis])
    return piece(data, bounds)


def _pad(node: Node, inputs: Operands) -> Value:
    """Cut what negative amounts take away, then pad: with a constant, or with elements that are picked by an index."""
    data = inputs[0]
    rank = len(ir.static_shape(data))
    name = "pads" if node.opset >= 2 else "paddings"
    amounts = numbers(node, inputs[1] if node.opset >= 11 else None, name)
    if amounts is None:
        raise ValueError(f"it has no {name}")
    axes = axes_of(node, inputs[3], rank) or list(range(rank))
    before, after = [0] * rank, [0] * rank
    for n, axis in enumerate(axes):
        before[axis], after[axis] = amounts[n], amounts[n + len(axes)]
    mode = node.text("mode", "constant")
    if mode != "constant":
        return _pick_padding(node, data, before, after, mode)
    kept = {
        axis: (-min(before[axis], 0), size + min(after[axis], 0), 1) for axis, size in enumerate(ir.static_shape(data))
    }
    data = node.emit(piece(data, kept))
    width = [max(amount, 0) for pair in zip(before, after, strict=True) for amount in pair]
    return op.nn.pad(data, width, "constant", _fill(node, inputs)) if any(width) else data


def _fill(node: Node, inputs: Operands) -> float:
    if node.opset < 11:
        return float(node.attributes.get("value", 0.0))
    if inputs[2] is None:
        return 0.0
    value = known(inputs[2])
    if value is None:
        raise ValueError("a computed value to pad with is not supported")
    return float(value.item())


def _pick_padding(node: Node, data: Value, before: list[int], after: list[int], mode: str) -> Value:
    modes: dict[str, Any] = {"reflect": "reflect", "edge": "edge", "wrap": "wrap"}
    if mode not in modes:
        raise ValueError(f"mode {mode!r} is not supported")
    for axis, size in enumerate(ir.static_shape(data)):
        if before[axis] or after[axis]:
            wide = np.pad(np.arange(size), (max(before[axis], 0), max(after[axis], 0)), mode=modes[mode])
            index = wide[max(-before[axis], 0) : len(wide) - max(-after[axis], 0)]
            data = node.emit(pick(data, index, axis))
    return data


def pick(data: Value, index: np.ndarray, axis: int) -> Value:
    """Return the elements at constant, valid places of an axis; ``index`` may have any shape."""
    flat = index.ravel().astype("int64")
    shape = ir.static_shape(data)
    steps = np.diff(flat)
    if len(flat) and (steps == 1).all():
        result = piece(data, {axis: (int(flat[0]), int(flat[-1]) + 1, 1)})
    else:
        result = op.take(data, constant(flat), axis, "clip")
    wanted = [*shape[:axis], *index.shape, *shape[axis + 1 :]]
    return result if index.ndim == 1 else op.reshape(result, wanted)


def _tile(node: Node, inputs: Operands) -> Value:
    repeats = numbers(node, inputs[1], "repeats")
    if repeats is None or node.opset < 6:
        raise ValueError("operator sets before 6 are not supported")
    return inputs[0] if set(repeats) <= {1} else op.tile(inputs[0], repeats)


def _expand(node: Node, inputs: Operands) -> Value:
    wanted = numbers(node, inputs[1], "shape") or []
    shape = ir.static_shape(inputs[0])
    result = np.broadcast_shapes(shape, tuple(wanted))
    return inputs[0] if result == shape else op.broadcast_to(inputs[0], list(result))


def _split(node: Node, inputs: Operands) -> list[Value] | Value:
    data = inputs[0]
    shape = ir.static_shape(data)
    axis = int(node.attributes.get("axis", 0)) % len(shape)
    sizes = numbers(node, inputs[1], "split")
    if sizes is None:
        parts = int(node.attributes.get("num_outputs", node.outputs))
        size = -(-shape[axis] // parts)
        sizes = [max(min(size, shape[axis] - n * size), 0) for n in range(parts)]
    if sum(sizes) != shape[axis]:
        raise ValueError(f"parts of {sizes} of an axis of {shape[axis]}")
    if len(sizes) == 1:
        return data
    places = np.cumsum([0, *sizes]).tolist()
    if 0 in sizes:
        return [piece(data, {axis: (start, start + size, 1)}) for start, size in zip(places, sizes, strict=False)]
    return op.split(data, places[1:-1], axis)


def _depth_to_space(node: Node, inputs: Operands) -> Value:
    batch, channels, height, width = ir.static_shape(inputs[0])
    block, mode = int(node.attributes["blocksize"]), node.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise ValueError(f"mode {mode!r} is not supported")
    inner = channels // block**2
    if mode == "DCR":
        wide, order = [batch, block, block, inner, height, width], [0, 3, 4, 1, 5, 2]
    else:
        wide, order = [batch, inner, block, block, height, width], [0, 1, 4, 2, 5, 3]
    moved = node.emit(op.permute_dims(node.emit(op.reshape(inputs[0], wide)), order))
    return op.reshape(moved, [batch, inner, height * block, width * block])


def _space_to_depth(node: Node, inputs: Operands) -> Value:
    batch, channels, height, width = ir.static_shape(inputs[0])
    block, mode = int(node.attributes["blocksize"]), node.text("mode", "DCR")
    if mode not in ("DCR", "CRD"):
        raise ValueError(f"mode {mode!r} is not supported")
    rows, columns = height // block, width // block
    order = [0, 3, 5, 1, 2, 4] if mode == "DCR" else [0, 1, 3, 5, 2, 4]
    wide = node.emit(op.reshape(inputs[0], [batch, channels, rows, block, columns, block]))
    return op.reshape(node.emit(op.permute_dims(wide, order)), [batch, channels * block**2, rows, columns])


def _concat(node: Node, inputs: Operands) -> Value:
    """Leave out what has no elements."""
    rank = len(ir.static_shape(inputs[0]))
    axis = int(node.attributes.get("axis", 1)) % rank
    full = [value for value in inputs if 0 not in ir.static_shape(value)] or inputs[:1]
    return full[0] if len(full) == 1 else op.concat(full, axis)


CONVERTERS: dict[str, Converter] = {
    "Concat": _concat,
    "DepthToSpace": _depth_to_space,
    "Expand": _expand,
    "Pad": _pad,
    "Slice": _slice,
    "SpaceToDepth": _space_to_depth,
    "Split": _split,
    "Tile": _tile,
}
