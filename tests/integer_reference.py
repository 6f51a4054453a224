"""The integer arithmetic of the package in plain NumPy: int64 sums, one float32 multiplication, ``np.rint``.

Written from the numerics as they are documented, without a look at how the pass emits them. Activations are
``Tensor``s: codes as int64, a scale and a zero point, in the order of axes the caller likes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass
class Tensor:
    """Quantized numbers: ``(codes - zero) * scale``."""

    codes: np.ndarray
    scale: float
    zero: int = 0


@dataclass
class Accumulator:
    """An int32 sum in units of ``scale``, which broadcasts to it; ``bound`` is the largest it can get."""

    values: np.ndarray
    scale: np.ndarray
    bound: np.ndarray


def quantize(x: np.ndarray, scale: float, zero: int, lo: int, hi: int) -> Tensor:
    """Quantize float32 numbers."""
    rounded = np.rint(x.astype(np.float32) / np.float32(scale)) + np.float32(zero)
    return Tensor(np.clip(rounded, lo, hi).astype(np.int64), scale, zero)


def requantize(total: Accumulator, scale: float, zero: int, lo: int, hi: int) -> Tensor:
    """Bring a sum back to 8 bits."""
    assert np.abs(total.values).max(initial=0) < 2**31
    multiplier = (total.scale / scale).astype(np.float32)
    rounded = np.rint(total.values.astype(np.int32).astype(np.float32) * multiplier) + np.float32(zero)
    return Tensor(np.clip(rounded, lo, hi).astype(np.int64), scale, zero)


def convolve(
    x: Tensor,
    weight: np.ndarray,
    weight_scale: np.ndarray,
    stride: tuple[int, int] = (1, 1),
    padding: tuple[int, int, int, int] = (0, 0, 0, 0),
    dilation: tuple[int, int] = (1, 1),
    groups: int = 1,
) -> Accumulator:
    """Convolve NCHW codes with OIHW weights; what is padded is the number zero."""
    top, left, bottom, right = padding
    data = np.pad(x.codes - x.zero, ((0, 0), (0, 0), (top, bottom), (left, right)))
    out_channels, per_group, kh, kw = weight.shape
    height = (data.shape[2] - (kh - 1) * dilation[0] - 1) // stride[0] + 1
    width = (data.shape[3] - (kw - 1) * dilation[1] - 1) // stride[1] + 1
    result = np.zeros((data.shape[0], out_channels, height, width), np.int64)
    for o in range(out_channels):
        first = o // (out_channels // groups) * per_group
        for i in range(per_group):
            for a in range(kh):
                for b in range(kw):
                    rows = slice(a * dilation[0], a * dilation[0] + (height - 1) * stride[0] + 1, stride[0])
                    cols = slice(b * dilation[1], b * dilation[1] + (width - 1) * stride[1] + 1, stride[1])
                    result[:, o] += data[:, first + i, rows, cols] * int(weight[o, i, a, b])
    scale = (np.broadcast_to(weight_scale, (out_channels,)) * x.scale).reshape(1, -1, 1, 1)
    bound = np.abs(weight.astype(np.int64)).sum((1, 2, 3)).reshape(1, -1, 1, 1)
    return Accumulator(result, scale, bound)


def matmul(x: Tensor, weight: np.ndarray, weight_scale: np.ndarray) -> Accumulator:
    """Multiply codes by a matrix [K, N]."""
    scale = np.broadcast_to(weight_scale, weight.shape[1:]) * x.scale
    bound = np.abs(weight.astype(np.int64)).sum(0)
    return Accumulator((x.codes - x.zero) @ weight.astype(np.int64), scale, bound)


def add_bias(total: Accumulator, bias: np.ndarray) -> Accumulator:
    """Add real numbers, rounded to the unit of the sum."""
    return Accumulator(total.values + np.rint(bias / total.scale).astype(np.int64), total.scale, total.bound)


def add_residual(total: Accumulator, x: Tensor, shift: int) -> Accumulator:
    """Add codes in units of the sum, which is made finer by ``shift`` bits."""
    ratio = np.rint(x.scale / total.scale * 2.0**shift).astype(np.int64)
    values = total.values * 2**shift + (x.codes - x.zero) * ratio
    return Accumulator(values, total.scale / 2.0**shift, total.bound)


def residual_shift(total: Accumulator, x: Tensor, bits: int = 11) -> int:
    """Return by how many bits a sum is made finer, so that every ratio of scales has ``bits`` bits."""
    return max(0, int(np.ceil(bits - np.log2((x.scale / total.scale).min()))))


def add(x: Tensor, y: Tensor) -> Accumulator:
    """Add two tensors, in units of 2**-20 of the larger scale."""
    unit = max(x.scale, y.scale) / 2**20
    values = sum((t.codes - t.zero) * round(t.scale / unit) for t in (x, y))
    return Accumulator(np.asarray(values), np.asarray(unit), np.zeros(1))


def multiply(x: Tensor, y: Tensor) -> Accumulator:
    """Multiply two tensors element by element."""
    return Accumulator((x.codes - x.zero) * (y.codes - y.zero), np.asarray(x.scale * y.scale), np.zeros(1))


def widen(x: Tensor) -> Accumulator:
    """Take codes as a sum of one."""
    return Accumulator(x.codes - x.zero, np.asarray(x.scale), np.zeros(1))


def mean(x: Tensor, axes: tuple[int, ...]) -> Accumulator:
    """Average over whole axes, which stay with length one."""
    count = int(np.prod([x.codes.shape[axis] for axis in axes]))
    values = (x.codes - x.zero).sum(axes, keepdims=True)
    return Accumulator(values, np.asarray(x.scale * (1.0 / count)), np.zeros(1))


def windows(
    x: np.ndarray, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int], fill: int
) -> np.ndarray:
    """Return the windows of an NCHW array as [N, C, OH, OW, KH * KW]."""
    top, left, bottom, right = padding
    data = np.pad(x, ((0, 0), (0, 0), (top, bottom), (left, right)), constant_values=fill)
    view = np.lib.stride_tricks.sliding_window_view(data, size, (2, 3))[:, :, :: stride[0], :: stride[1]]
    return view.reshape(*view.shape[:4], -1)


def average_pool(
    x: Tensor,
    size: tuple[int, int],
    stride: tuple[int, int],
    padding: tuple[int, int, int, int],
    count_padding: bool,
) -> Accumulator:
    """Average over NCHW windows."""
    sums = windows(x.codes - x.zero, size, stride, padding, 0).sum(-1)
    inside = windows(np.ones_like(x.codes[:1, :1]), size, stride, padding, 0).sum(-1)
    counts = np.full_like(inside, size[0] * size[1]) if count_padding else inside
    return Accumulator(sums, x.scale * (1.0 / counts), np.zeros(1))


def max_pool(x: Tensor, size: tuple[int, int], stride: tuple[int, int], padding: tuple[int, int, int, int]) -> Tensor:
    """Take the largest code of NCHW windows."""
    return Tensor(windows(x.codes, size, stride, padding, -(2**31)).max(-1), x.scale, x.zero)
