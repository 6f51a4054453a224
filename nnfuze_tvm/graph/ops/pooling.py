"""Pooling: the largest value or the average of each window."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.batching import along
from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.integers.context import Integers, checked, scaled
from nnfuze_tvm.graph.integers.values import Known, Quantized
from nnfuze_tvm.graph.integers.windows import reduce_sum, window_sum
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops._windows import (
    channels_first,
    from_channels_first,
    padded_to,
    reach_of,
    to_channels_first,
    windows,
)
from nnfuze_tvm.graph.ops.moving import move
from nnfuze_tvm.graph.ops.operator import Example, Operator, as_its_operand


def _seen(call: Call, data: np.ndarray, fill: float) -> np.ndarray:
    """Return the windows of a pooling, ``[N, C, *count, *size]``."""
    attrs = call.attrs
    count = [n for n, letter in zip(static_shape(call), str(attrs.layout), strict=True) if letter not in "NC"]
    sizes, strides, dilation, padding = (
        [int(each) for each in field] for field in (attrs.pool_size, attrs.strides, attrs.dilation, attrs.padding)
    )
    first = to_channels_first(data, str(attrs.layout))
    return windows(first, sizes, strides, dilation, padding[: len(sizes)], count, fill)


def _inner(view: Any) -> tuple[int, ...]:
    return tuple(range(2 + (view.ndim - 2) // 2, view.ndim))


def _largest(call: Call, data: np.ndarray) -> np.ndarray:
    least = -np.inf if data.dtype.kind == "f" else np.iinfo(data.dtype).min
    view = _seen(call, data, least)
    # NaN counts as nothing.
    return from_channels_first(np.fmax.reduce(view, _inner(view), initial=least), str(call.attrs.layout))


def _average(call: Call, data: np.ndarray) -> np.ndarray:
    view = _seen(call, data, 0)
    kind = np.result_type(data.dtype, np.float32) if data.dtype.kind == "f" else np.float64
    total = view.sum(_inner(view), dtype=kind)
    result = total / _counts(call, static_shape(call.args[0]), static_shape(call), channels_first=True)
    return from_channels_first(result.astype(data.dtype), str(call.attrs.layout))


def _counts(call: Call, shape: Sequence[int], out_shape: Sequence[int], channels_first: bool) -> np.ndarray:
    """Return by how many numbers each window's sum is divided, broadcastable to the result."""
    attrs = call.attrs
    spatial = [axis for axis, letter in enumerate(str(attrs.layout)) if letter not in "NC"]
    counts = np.ones((1,) * len(shape))
    for k, axis in enumerate(spatial):
        size, stride, dilation = (int(a[k]) for a in (attrs.pool_size, attrs.strides, attrs.dilation))
        at = np.arange(out_shape[axis])[:, None] * stride + np.arange(size)[None] * dilation - int(attrs.padding[k])
        own = np.maximum(((at >= 0) & (at < shape[axis])).sum(1), 1)
        along_axis = np.full(out_shape[axis], size) if attrs.count_include_pad else own
        place = 2 + k if channels_first else axis
        counts = counts * along_axis.reshape([-1 if i == place else 1 for i in range(len(shape))])
    return counts


def _torch_windows(torch: Any, call: Call, data: Any, fill: float) -> Any:
    """Return what `_seen` does."""
    attrs, order = call.attrs, channels_first(str(call.attrs.layout))
    count = [static_shape(call)[axis] for axis in order[2:]]
    sizes, strides, dilation, padding = (
        [int(each) for each in field] for field in (attrs.pool_size, attrs.strides, attrs.dilation, attrs.padding)
    )
    reach = reach_of(count, sizes, strides, dilation)
    view = padded_to(torch, data.permute(order), padding[: len(sizes)], reach, fill)
    for axis, (size, stride, apart) in enumerate(zip(sizes, strides, dilation, strict=True), start=2):
        view = view.unfold(axis, (size - 1) * apart + 1, stride)[..., ::apart]
    return view


def _torch_largest(torch: Any, call: Call, data: Any) -> Any:
    view = _torch_windows(torch, call, data, -torch.inf)
    return view.amax(_inner(view)).permute(np.argsort(channels_first(str(call.attrs.layout))).tolist())


def _torch_average(torch: Any, call: Call, data: Any) -> Any:
    view = _torch_windows(torch, call, data, 0.0)
    counts = _counts(call, static_shape(call.args[0]), static_shape(call), channels_first=True)
    result = view.sum(_inner(view)) / torch.from_numpy(counts).to(view.dtype)
    return result.permute(np.argsort(channels_first(str(call.attrs.layout))).tolist())


def _torch_adaptive(torch: Any, call: Call, data: Any) -> Any:
    order = channels_first(str(call.attrs.layout))
    result = data.permute(order)
    for axis in range(2, len(order)):
        length, size = result.shape[axis], static_shape(call)[order[axis]]
        parts = [result.narrow(axis, start, end - start) for start, end in _borders(length, size)]
        result = torch.cat([part.mean(axis, keepdim=True) for part in parts], axis)
    return result.permute(np.argsort(order).tolist())


def _borders(length: int, size: int) -> list[tuple[int, int]]:
    """Return where each of ``size`` windows of an adaptive pooling begins and ends."""
    return [(i * length // size, -(-(i + 1) * length // size)) for i in range(size)]


def _adaptive(call: Call, data: np.ndarray) -> np.ndarray:
    layout = str(call.attrs.layout)
    first = to_channels_first(data, layout)
    sizes = [n for n, letter in zip(static_shape(call), layout, strict=True) if letter not in "NC"]
    result = first.astype(np.result_type(data.dtype, np.float32))
    for axis, size in enumerate(sizes, start=2):
        length = first.shape[axis]
        borders = _borders(length, size)
        parts = [result.take(range(start, end), axis).mean(axis, keepdims=True) for start, end in borders]
        result = np.concatenate(parts, axis)
    return from_channels_first(result, layout)


def couple(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    """Hand images and channels on; what windows mix stays whole."""
    layout = str(call.attrs.layout)
    if str(getattr(call.attrs, "out_layout", None) or layout) != layout or not layout.isupper():
        return None
    labels = coupling.tensor(call.args[0])
    shape = static_shape(var)
    result = []
    for axis, name in enumerate(layout):
        if name not in "NC":
            coupling.channels.fix(labels[axis])
        result.append(labels[axis] if name in "NC" else np.full(shape[axis], FIXED))
    return result


def _integer_average(context: Integers, call: Call, _: str) -> Known | None:
    data, attrs = context.value(call.args[0]), call.attrs
    if not isinstance(data, Quantized) or attrs.layout != attrs.out_layout:
        return None
    spatial = [axis for axis, letter in enumerate(attrs.layout) if letter not in "NC"]
    out_shape = static_shape(call)
    sizes = {
        axis: (int(attrs.pool_size[k]), int(attrs.strides[k]), int(attrs.dilation[k]), int(attrs.padding[k]))
        for k, axis in enumerate(spatial)
    }
    counts = _counts(call, data.shape, out_shape, channels_first=False)
    if np.all(counts == counts.flat[0]):
        counts = counts.flat[0] * np.ones((1,) * len(out_shape))
    return checked(scaled(window_sum(context, data, sizes, out_shape), 1.0 / counts))


def _integer_adaptive(context: Integers, call: Call, _: str) -> Known | None:
    data, attrs = context.value(call.args[0]), call.attrs
    if not isinstance(data, Quantized) or attrs.layout != attrs.out_layout:
        return None
    out_shape = static_shape(call)
    spatial = [axis for axis, letter in enumerate(attrs.layout) if letter not in "NC"]
    sizes = {axis: data.shape[axis] // out_shape[axis] for axis in spatial}
    if any(data.shape[axis] % out_shape[axis] for axis in spatial):
        return None
    count = int(np.prod(list(sizes.values())))
    if all(out_shape[axis] == 1 for axis in spatial):
        return checked(scaled(reduce_sum(context, data, spatial, True), 1.0 / count))
    own = {axis: (size, size, 1, 0) for axis, size in sizes.items()}
    return checked(scaled(window_sum(context, data, own, out_shape), 1.0 / count))


def _position(call: Call, axis: int) -> int | None:
    same = call.attrs.layout == call.attrs.out_layout
    return axis if same and axis == str(call.attrs.layout).index("C") else None


def transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    """Return the pooling in the layout of its operand."""
    attrs = call.attrs
    if attrs.out_layout != attrs.layout:
        return None
    layout = "".join(attrs.layout[axes.index(axis)] for axis in range(len(axes)))
    if layout[0] != "N" or "C" not in (layout[1], layout[-1]):
        return None
    function = getattr(op.nn, op_name(call).removeprefix("nn."))
    if "adaptive" in op_name(call):
        return function(sources[0], attrs.output_size, layout)
    sizes = (attrs.pool_size, attrs.strides, attrs.padding, attrs.dilation)
    return function(sources[0], *sizes, attrs.ceil_mode, attrs.count_include_pad, layout=layout)


def _operators(rank: int) -> dict[str, Operator]:
    data = (2, 8, *[7] * rank)
    largest, average, adaptive = (
        getattr(relax.op.nn, f"{kind}_pool{rank}d") for kind in ("max", "avg", "adaptive_avg")
    )
    window: dict[str, Any] = {"pool_size": (3,) * rank, "strides": (2,) * rank, "padding": (1,) * (2 * rank)}
    common: dict[str, Any] = {
        "couple": couple,
        "batch": along(_position),
        "transposed": transposed,
        "kernels": ("pooling",),
    }
    return {
        f"nn.max_pool{rank}d": Operator(
            effect="moves",
            evaluate=_largest,
            train=_torch_largest,
            examples=(Example((data,), partial(largest, **window)),),
            integer=move,
            nonnegative=as_its_operand,
            half=True,
            **common,
        ),
        f"nn.avg_pool{rank}d": Operator(
            effect="averages",
            evaluate=_average,
            train=_torch_average,
            examples=(Example((data,), partial(average, **window)),),
            integer=_integer_average,
            **common,
        ),
        f"nn.adaptive_avg_pool{rank}d": Operator(
            effect="averages",
            evaluate=_adaptive,
            train=_torch_adaptive,
            examples=(Example((data,), partial(adaptive, output_size=(1,) * rank)),),
            integer=_integer_adaptive,
            # TVM writes it as loops of varying length, which a rule takes behind a convolution only (channels last).
            **{**common, "kernels": ("pooling", "fallback")},
        ),
    }


OPERATORS = {**_operators(1), **_operators(2), **_operators(3)}

ONNX = {
    name: onnx.adaptive_average
    if "adaptive" in name
    else onnx.pooling("MaxPool" if name.startswith("nn.max") else "AveragePool")
    for name in OPERATORS
}
