"""Sliding windows and sums with NumPy: what convolutions and poolings are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the type to sum products in: at least float32, and of integers float64, which holds them exactly."""
    return np.result_type(np.float32, dtype) if dtype.kind == "f" else np.dtype(np.float64)


def to_channels_first(data: np.ndarray, layout: str) -> np.ndarray:
    """Return ``data`` with its axes in the order N, C (of weights O, I), then the others as they are in ``layout``."""
    return data.transpose(channels_first(layout))


def from_channels_first(data: np.ndarray, layout: str) -> np.ndarray:
    """Return ``data`` of axes N, C, then the others, in the order of ``layout``."""
    return data.transpose(np.argsort(channels_first(layout)))


def channels_first(layout: str) -> list[int]:
    """Return the axes of ``layout`` in the order N, C (of weights O, I), then the others."""
    first = [layout.index(letter) for letter in ("NC" if "N" in layout else "OI")]
    return [*first, *(axis for axis in range(len(layout)) if axis not in first)]


def padded_to(torch: Any, data: Any, before: Sequence[int], reach: Sequence[int], fill: float = 0) -> Any:
    """Return a PyTorch tensor ``[N, C, …]`` padded in front, and cut or padded behind to a length per axis."""
    widths = [w for b, r, n in zip(before, reach, data.shape[2:], strict=True) for w in (r - b - n, b)]
    return torch.nn.functional.pad(data, widths[::-1], value=fill) if any(widths) else data


def reach_of(count: Sequence[int], size: Sequence[int], strides: Sequence[int], dilation: Sequence[int]) -> list[int]:
    """Return how far ``count`` windows reach along each axis."""
    return [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(count, strides, size, dilation, strict=True)]


def windows(
    data: np.ndarray,
    size: Sequence[int],
    strides: Sequence[int],
    dilation: Sequence[int],
    before: Sequence[int],
    count: Sequence[int],
    fill: float,
) -> np.ndarray:
    """Return what windows over the last axes see, ``[N, C, *count, *size]``.

    Parameters
    ----------
    data : np.ndarray
        ``[N, C, …]``.
    size, strides, dilation, before, count : sequence of int
        Of each of the other axes: the window's length, the windows' distance, its elements' distance, the padding in
        front, the number of windows. Behind, as much is padded as the windows reach.
    fill : float
        What is padded with.
    """
    rank = len(size)
    reach = reach_of(count, size, strides, dilation)
    widths = [(0, 0), (0, 0)]
    widths += [(b, max(0, r - b - e)) for b, r, e in zip(before, reach, data.shape[2:], strict=True)]
    padded = np.pad(data, widths, constant_values=np.asarray(fill, data.dtype)) if np.any(widths) else data
    spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    picked = [slice(0, (n - 1) * s + 1, s) for n, s in zip(count, strides, strict=True)]
    return view[(slice(None), slice(None), *picked, *(slice(None, None, d) for d in dilation))]
