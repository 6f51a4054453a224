"""Sums of 8-bit codes over axes and sliding windows, as PrimFuncs that take what follows them into their kernel."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax, te, tirx

from nnfuze_tvm.graph.integers.sums import SumOps
from nnfuze_tvm.graph.integers.values import Quantized, Sum


def reduce_sum(ops: SumOps, data: Quantized, axes: Sequence[int], keepdims: bool) -> Sum:
    """Sum codes over ``axes``; the real value is that of the sum."""
    shape = data.shape
    count = int(np.prod([shape[axis] for axis in axes]))
    kept = [axis for axis in range(len(shape)) if axis not in axes]
    out_shape = [1 if axis in axes else dim for axis, dim in enumerate(shape) if keepdims or axis in kept]

    def reduce_sum(tensor: te.Tensor) -> te.Tensor:
        window = {axis: te.reduce_axis((0, shape[axis]), name=f"r{axis}") for axis in axes}

        def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
            own = dict(zip(range(len(shape)) if keepdims else kept, index, strict=True))
            at = [window.get(axis, own.get(axis)) for axis in range(len(shape))]
            return te.sum(tensor(*at).astype("int32"), axis=list(window.values()))

        return te.compute(tuple(out_shape), element, name="reduce_sum")

    total = ops.reduction(reduce_sum, data.codes.expr, "reduce_sum")
    return _window(total, data, count, np.ones((1,) * len(out_shape)))


def window_sum(
    ops: SumOps,
    data: Quantized,
    windows: dict[int, tuple[int, int, int, int]],
    out_shape: Sequence[int],
) -> Sum:
    """Sum codes over sliding windows.

    ``windows`` maps an axis to size, stride, dilation and padding in front.
    """
    shape, zero = data.shape, data.zero_point

    def window_sum(tensor: te.Tensor) -> te.Tensor:
        reach = {
            axis: (out_shape[axis] - 1) * stride + (size - 1) * dilation + 1 - before - shape[axis]
            for axis, (size, stride, dilation, before) in windows.items()
        }
        padded = tensor
        if any(win[3] for win in windows.values()) or any(after > 0 for after in reach.values()):
            before = [windows[axis][3] if axis in windows else 0 for axis in range(len(shape))]
            after = [max(0, reach.get(axis, 0)) for axis in range(len(shape))]
            value = tirx.const(zero, tensor.dtype)
            padded = tvm.topi.nn.pad(tensor, before, after, pad_value=value, name="pad_temp")
        window = {axis: te.reduce_axis((0, win[0]), name=f"r{axis}") for axis, win in windows.items()}

        def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
            at = [
                i * windows[axis][1] + window[axis] * windows[axis][2] if axis in windows else i
                for axis, i in enumerate(index)
            ]
            return te.sum(padded(*at).astype("int32"), axis=list(window.values()))

        return te.compute(tuple(out_shape), element, name="window_sum")

    total = ops.reduction(window_sum, data.codes.expr, "window_sum")
    count = int(np.prod([win[0] for win in windows.values()]))
    return _window(total, data, count, np.ones((1,) * len(shape)))


def _window(total: relax.Expr, data: Quantized, count: int, one: np.ndarray) -> Sum:
    bias = np.full(one.shape, -data.zero_point * count, "int64")
    largest, zero = max(abs(data.codes.lo), abs(data.codes.hi)), data.zero_point
    bound = count * (largest + abs(zero)) * one
    return Sum(total, data.scale * one, bias, bound, lo=0.0 if data.codes.lo >= zero else -np.inf)
