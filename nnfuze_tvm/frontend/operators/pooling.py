"""Pooling: windows, or all of an image, reduced to one value per channel."""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import nonnegative
from nnfuze_tvm.frontend.operators.windows import Windows, pads
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

_LAYOUTS = {1: "NCW", 2: "NCHW", 3: "NCDHW"}


def _windows(node: Node, data: Value) -> Windows:
    extent = ir.static_shape(data)[2:]
    if len(extent) not in _LAYOUTS:
        raise ValueError(f"{len(extent)} spatial dimensions are not supported")
    windows = Windows.of(node, extent, [int(each) for each in node.attributes["kernel_shape"]])
    windows.check_data()
    mode = node.text("auto_pad")
    if mode.startswith("SAME"):
        # The specification pads for the dilated window, ONNX Runtime for one without dilation.
        if max(windows.dilations) > 1:
            raise ValueError("auto_pad with dilations is not supported, runtimes disagree on it: give pads")
        # Padding that would be negative is none, or cuts off.
        axes = zip(windows.count, windows.strides, windows.kernel, windows.extent, strict=True)
        if any((n - 1) * stride + taps - size < (-1 if mode == "SAME_UPPER" else 0) for n, stride, taps, size in axes):
            raise ValueError("auto_pad with windows apart is not supported, runtimes disagree on it: give pads")
    return windows


def _pool(kind: str, data: Value, windows: Windows, count_include_pad: bool = False) -> Value:
    """Return a pooling of Relax, with all of the padding that the windows reach."""
    rank = len(windows.extent)
    return getattr(relax.op.nn, f"{kind}_pool{rank}d")(
        data,
        pool_size=windows.kernel,
        strides=windows.strides,
        padding=[*windows.before, *windows.behind],
        dilation=windows.dilations,
        count_include_pad=count_include_pad,
        layout=_LAYOUTS[rank],
    )


def _max(node: Node, inputs: Operands) -> Any:
    data = inputs[0]
    windows = _windows(node, data)
    if node.outputs > 1 and node.proto.output[1]:
        return _max_with_indices(node, data, windows)
    return _pool("max", data, windows)


def _max_with_indices(node: Node, data: Value, windows: Windows) -> list[Value]:
    """Return the largest values, and where they are in the flat data.

    A tap outside of the data reads the nearest one inside instead, which changes neither the largest value nor, as the
    order stays, which of several equal ones comes first.
    """
    shape = ir.static_shape(data)
    rank = len(windows.extent)
    places = []
    for axis, size in enumerate(windows.extent):
        own = windows.places(axis)
        inside = (own >= 0) & (own < size)
        first, last = inside.argmax(1), own.shape[1] - 1 - inside[:, ::-1].argmax(1)
        places.append(np.take_along_axis(own, np.clip(np.arange(own.shape[1]), first[:, None], last[:, None]), 1))
    for axis, own in enumerate(places):
        data = relax.op.take(data, constant(own.ravel()), 2 + axis, mode="clip")
    parts = [part for own in places for part in own.shape]
    order = [0, 1, *range(2, 2 + 2 * rank, 2), *range(3, 3 + 2 * rank, 2)]
    seen = relax.op.permute_dims(relax.op.reshape(data, [*shape[:2], *parts]), order)
    seen = node.emit(relax.op.reshape(seen, [*shape[:2], *windows.count, windows.taps]))
    which = relax.op.argmax(seen, -1)
    # [*count, taps]: where every tap is in its image, the last axis running fastest, or the first one.
    column_major = bool(node.attributes.get("storage_order", 0))
    steps = np.cumprod([1, *(windows.extent if column_major else windows.extent[::-1])])[:-1]
    steps = steps if column_major else steps[::-1]
    table = np.zeros([1] * 2 * rank, np.int64)
    for axis, own in enumerate(places):
        apart = [1] * 2 * rank
        apart[axis], apart[rank + axis] = own.shape
        table = table + own.reshape(apart) * steps[axis]
    starts = np.arange(table.size // windows.taps).reshape(windows.count) * windows.taps
    where = relax.op.take(constant(table.ravel()), relax.op.add(which, constant(starts)), 0, mode="clip")
    images = np.arange(shape[0] * shape[1]).reshape(*shape[:2], *[1] * rank) * int(np.prod(windows.extent))
    return [relax.op.max(seen, -1), relax.op.add(where, constant(images))]


def _average(node: Node, inputs: Operands) -> Any:
    data, windows = inputs[0], _windows(node, inputs[0])
    if not node.attributes.get("count_include_pad", 0):
        return _pool("avg", data, windows)
    result = _pool("avg", data, windows, count_include_pad=True)
    if all(reached <= after for reached, after in zip(windows.behind, windows.after, strict=True)):
        return result
    # What only ceil_mode adds behind the padding isn't counted.
    counts = np.ones((1, 1))
    for axis, (size, after) in enumerate(zip(windows.extent, windows.after, strict=True)):
        own = (windows.places(axis) < size + after).sum(1)
        counts = counts[..., None] * own
    return relax.op.multiply(result, constant(windows.taps / counts, str(data.ty.dtype)))


def _power(node: Node, data: Value) -> tuple[Value, int]:
    """Return what an Lp norm sums, and p."""
    p = int(node.attributes.get("p", 2))
    if p < 1:
        raise ValueError(f"p {p} is not supported")
    factor = data if p % 2 == 0 else relax.op.abs(data)
    return reduce(relax.op.multiply, [factor] * p), p


def _root(total: Value, p: int, dtype: str) -> Value:
    if p == 1:
        return total
    return relax.op.sqrt(total) if p == 2 else relax.op.power(total, constant(np.array(1 / p), dtype))


def _lp(node: Node, inputs: Operands) -> Any:
    """Return the norm of each window: its average power, as often as it has taps, and the root of that."""
    data, dtype = inputs[0], str(inputs[0].ty.dtype)
    windows = _windows(node, data)
    powers, p = _power(node, data)
    average = _pool("avg", powers, windows, count_include_pad=True)
    return _root(relax.op.multiply(average, constant(np.array(windows.taps), dtype)), p, dtype)


def _spatial(data: Value) -> list[int]:
    return list(range(2, len(ir.static_shape(data))))


def _global_average(node: Node, inputs: Operands) -> Any:
    """Return a mean, where TVM's kernel for one and three axes has loops of varying length."""
    axes = _spatial(inputs[0])
    return NotImplemented if len(axes) == 2 else relax.op.mean(inputs[0], axes, keepdims=True)


def _global_max(node: Node, inputs: Operands) -> Any:
    return relax.op.max(inputs[0], _spatial(inputs[0]), keepdims=True)


def _global_lp(node: Node, inputs: Operands) -> Any:
    powers, p = _power(node, inputs[0])
    return _root(relax.op.sum(powers, _spatial(inputs[0]), keepdims=True), p, str(inputs[0].ty.dtype))


def _max_unpool(node: Node, inputs: Operands) -> Any:
    """Put values back where a `MaxPool` found them; everything else is 0."""
    data, indices = inputs[0], inputs[1]
    shape, kernel = ir.static_shape(data), [int(each) for each in node.attributes["kernel_shape"]]
    strides = node.attributes.get("strides") or [1] * len(kernel)
    front, behind = pads(node, len(kernel))
    spatial = [
        (size - 1) * stride - b - a + taps
        for size, stride, b, a, taps in zip(shape[2:], strides, front, behind, kernel, strict=True)
    ]
    whole = [*shape[:2], *map(int, spatial)]
    final = known(inputs[2])
    if inputs[2] is not None and final is None:
        raise ValueError("an output shape that is computed from data is not supported")
    zeros = constant(np.zeros(int(np.prod(whole)), str(data.ty.dtype)))
    places = nonnegative(node.emit(relax.op.reshape(indices, [-1])), int(np.prod(whole)))
    scattered = relax.op.scatter_elements(zeros, places, relax.op.reshape(data, [-1]), axis=0)
    result = relax.op.reshape(scattered, whole)
    if final is None or list(final) == whole:
        return result
    # The indices are those of the smaller image.
    more = [int(size) - own for size, own in zip(final, whole, strict=True)]
    if min(more) < 0:
        raise ValueError(f"an output shape below {whole} is not supported")
    return relax.op.nn.pad(result, [width for each in more for width in (0, each)])


CONVERTERS: dict[str, Converter] = {
    "MaxPool": _max,
    "AveragePool": _average,
    "LpPool": _lp,
    "GlobalAveragePool": _global_average,
    "GlobalMaxPool": _global_max,
    "GlobalLpPool": _global_lp,
    "MaxUnpool": _max_unpool,
}
