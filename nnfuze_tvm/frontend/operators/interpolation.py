"""Where the pixels of a resized axis come from, as tables: everything that ONNX's Resize says of coordinates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Axis:
    """One axis that is resized.

    Attributes
    ----------
    length, size : int
        Pixels before and after.
    scale : float
        Pixels after for one before: not always the quotient of the two, ``size`` is rounded down.
    start, end : float
        What part of it is taken, as fractions (``tf_crop_and_resize``).
    """

    length: int
    size: int
    scale: float
    start: float = 0.0
    end: float = 1.0

    @property
    def is_whole(self) -> bool:
        """Tell whether the scale makes a whole number of pixels."""
        return abs(float(self.scale) * self.length - self.size) < 1e-4

    def coordinates(self, mode: str) -> np.ndarray:
        """Return where in the data each pixel of the result lies, ``[size]``.

        Where a coordinate is a whole number but for rounding, the precision decides which pixel it falls to: here it is
        that of ONNX Runtime.

        Raises
        ------
        ValueError
            If the mode is not known, or the specification and runtimes read it in different ways.
        """
        x, single = np.arange(self.size, dtype=np.float32), np.float32
        half, scale, length, size = (single(each) for each in (0.5, self.scale, self.length, self.size))
        last, steps = length - single(1), max(size - single(1), single(1))
        if mode in ("align_corners", "tf_crop_and_resize") and not self.is_whole:
            raise ValueError(
                f"{mode} with scales that make no whole sizes is not supported, runtimes disagree on it: give sizes"
            )
        if mode == "align_corners":
            return x * last / steps
        if mode == "tf_crop_and_resize":
            start, end = single(self.start), single(self.end)
            if self.size == self.length and (start, end) != (0, 1):
                raise ValueError(f"{mode} without a change of size is not supported, runtimes disagree on it")
            return start * last + x * (end - start) * last / steps if self.size > 1 else half * (start + end) * last + x
        if mode == "asymmetric":
            return (x.astype(np.float64) / self.scale).astype(single)
        if mode == "pytorch_half_pixel" and self.size == 1:
            return np.zeros(1, single)
        if mode == "half_pixel_symmetric":
            # The middle of the data stays the middle of the result.
            offset = length / single(2) * (single(1) - size / (scale * length))
            return (float(offset) + (x.astype(np.float64) + 0.5) / float(scale) - 0.5).astype(single)
        if mode not in ("half_pixel", "pytorch_half_pixel"):
            raise ValueError(f"coordinate_transformation_mode {mode!r} is not supported")
        return (x + half) / scale - half

    def nearest(self, mode: str, rounding: str) -> np.ndarray:
        """Return the index that each pixel of the result is a copy of, ``[size]``.

        Raises
        ------
        ValueError
            If a mode is not known.
        """
        x = self.coordinates(mode)
        ways = {
            # Not by adding 0.5, which may round up what is just below it.
            "round_prefer_floor": lambda: np.floor(x) + (x - np.floor(x) > 0.5),
            "round_prefer_ceil": lambda: np.floor(x) + (x - np.floor(x) >= 0.5),
            "floor": lambda: np.floor(x),
            "ceil": lambda: np.ceil(x),
            # That of Resize before there was a choice.
            "outwards": lambda: np.floor(x) if self.size > self.length else np.ceil(x),
        }
        if rounding not in ways:
            raise ValueError(f"nearest_mode {rounding!r} is not supported")
        return np.clip(ways[rounding]().astype(np.int64), 0, self.length - 1)

    def weights(self, mode: str, kernel: Kernel, antialias: bool, exclude_outside: bool) -> np.ndarray:
        """Return by what each pixel is multiplied for each pixel of the result, ``[size, length]``.

        Parameters
        ----------
        mode : str
            The coordinate transformation.
        kernel : Kernel
            The weight of a pixel by its distance.
        antialias : bool
            Stretch the kernel where the axis shrinks.
        exclude_outside : bool
            Leave out what lies outside of the data; else the pixel at the border stands for it.
        """
        x = self.coordinates(mode).astype(np.float64)
        stretch = min(float(self.scale), 1.0) if antialias else 1.0
        reach = kernel.reach / stretch
        first = np.floor(x - reach).astype(np.int64)
        places = first[:, None] + np.arange(int(np.ceil(2 * reach)) + 2)
        values = kernel.weight((places - x[:, None]) * stretch)
        if exclude_outside:
            values = np.where((places < 0) | (places >= self.length), 0, values)
        if antialias or exclude_outside:
            total = values.sum(1, keepdims=True)
            values = values / np.where(total == 0, 1, total)
        result = np.zeros((self.size, self.length))
        rows = np.broadcast_to(np.arange(self.size)[:, None], places.shape)
        np.add.at(result, (rows, np.clip(places, 0, self.length - 1)), values)
        return result


@dataclass(frozen=True)
class Kernel:
    """How much a pixel counts by its distance, up to ``reach`` pixels."""

    reach: float
    weight: Callable[[np.ndarray], np.ndarray]


def linear() -> Kernel:
    """Return the triangle of linear interpolation."""
    return Kernel(1, lambda x: np.maximum(1 - np.abs(x), 0))


def cubic(a: float) -> Kernel:
    """Return the convolution kernel of cubic interpolation with parameter ``a`` (Keys, 1981)."""

    def weight(x: np.ndarray) -> np.ndarray:
        d = np.abs(x)
        near = ((a + 2) * d - (a + 3)) * d * d + 1
        far = ((a * d - 5 * a) * d + 8 * a) * d - 4 * a
        return np.where(d <= 1, near, np.where(d < 2, far, 0))

    return Kernel(2, weight)


def taps(weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return what is not zero in the rows of a matrix ``[size, length]``.

    Returns
    -------
    index, weight : np.ndarray
        ``[size, k]``: places in the row and what stands there; rows of fewer have zeros at the end.
    """
    count = max(int((weights != 0).sum(1).max()), 1)
    # Stable: places stay in order, those that aren't zero come first.
    order = np.argsort(weights == 0, axis=1, kind="stable")[:, :count]
    found = np.take_along_axis(weights, order, 1)
    return np.where(found == 0, order[:, :1], order), found
