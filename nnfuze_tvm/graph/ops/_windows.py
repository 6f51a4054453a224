"""Sliding windows and sums with NumPy: what convolutions and poolings are computed from."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np


def accumulator(dtype: np.dtype) -> np.dtype:
    """Return the type to sum products in: at least float32, and of integers float64, which holds them exactly."""
    return np.result_type(np.float32, dtype) if dtype.kind == "f" else np.dtype(np.float64)


def to_channels_first(data: np.ndarray, layout: str) -> np.ndarray:
    """Return ``data`` with its axes in the order N, C, then the others as they are in ``layout``."""
    spatial = [axis for axis, letter in enumerate(layout) if letter not in "NCOI"]
    first = [layout.index(letter) for letter in ("NC" if "N" in layout else "OI")]
    return data.transpose([*first, *spatial])


def from_channels_first(data: np.ndarray, layout: str) -> np.ndarray:
    """Return ``data`` of axes N, C, then the others, in the order of ``layout``."""
    spatial = [letter for letter in layout if letter not in "NC"]
    order = ["N", "C", *spatial]
    return data.transpose([order.index(letter) for letter in layout])


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
    reach = [(n - 1) * s + (k - 1) * d + 1 for n, s, k, d in zip(count, strides, size, dilation, strict=True)]
    widths = [(0, 0), (0, 0)]
    widths += [(b, max(0, r - b - e)) for b, r, e in zip(before, reach, data.shape[2:], strict=True)]
    padded = np.pad(data, widths, constant_values=np.asarray(fill, data.dtype)) if np.any(widths) else data
    spans = [(k - 1) * d + 1 for k, d in zip(size, dilation, strict=True)]
    view = np.lib.stride_tricks.sliding_window_view(padded, spans, axis=tuple(range(2, 2 + rank)))
    picked = [slice(0, (n - 1) * s + 1, s) for n, s in zip(count, strides, strict=True)]
    return view[(slice(None), slice(None), *picked, *(slice(None, None, d) for d in dilation))]
