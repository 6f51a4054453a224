"""The computation of a few-bit layer: one kernel that packs its data, and one that counts bits.

Bit ``k`` of byte ``m`` of a pixel is channel ``k · bytes + m``: channels are packed in whole vectors, none is moved
across one. Counts of one byte have a lane per output channel; so many are added in a byte as fit, these sums in 16 bits
or 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm import te, tirx

from nnfuze_tvm.passes.lower.bit_serial.planes import Planes, unit

Pixel = Sequence[Any]
# The most bits that a byte counts.
_BYTE = 255


@dataclass(frozen=True)
class Window:
    """What a layer reads: kernel, strides, dilation and padding (top, left, bottom, right) of a convolution NHWC.

    A dense layer has a kernel of one pixel, and pixels of any rank.
    """

    kernel: tuple[int, int] = (1, 1)
    strides: tuple[int, int] = (1, 1)
    dilation: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)

    def at(self, pixel: Pixel, tap: Pixel) -> Pixel:
        """Return the pixel of the padded data that a tap of the window of a result's pixel sees."""
        if self.kernel == self.strides == (1, 1):
            return pixel
        *before, y, x = pixel
        steps = zip((y, x), tap, self.strides, self.dilation, strict=True)
        return [*before, *(place * stride + each * dilation for place, each, stride, dilation in steps)]


def packed_bytes(channels: int) -> int:
    """Return the bytes of one plane of a pixel."""
    return -(-channels // 8)


def packed(bits: np.ndarray) -> np.ndarray:
    """Return bits ``[..., channels]`` as bytes ``[..., bytes]``."""
    count = packed_bytes(bits.shape[-1])
    whole = np.zeros((*bits.shape[:-1], 8 * count), "uint8")
    whole[..., : bits.shape[-1]] = bits
    whole = whole.reshape(*bits.shape[:-1], 8, count)
    return np.bitwise_or.reduce(whole << np.arange(8, dtype="uint8")[:, None], axis=-2)


def pack(planes: Planes, window: Window) -> Callable[[te.Tensor], te.Tensor]:
    """Return what makes of data ``[*pixels, channels]`` planes ``[*padded pixels, planes, bytes]``."""

    def bit_planes(data: te.Tensor) -> te.Tensor:
        *pixels, channels = (int(size) for size in data.shape)
        count = packed_bytes(channels)
        top, left, bottom, right = window.padding
        before, after = (
            [0] * (len(pixels) - 2) + pads if any(window.padding) else [0] * len(pixels)
            for pads in ([top, left], [bottom, right])
        )
        padded = [first + size + last for first, size, last in zip(before, pixels, after, strict=True)]

        def element(*index: tirx.Var) -> tirx.PrimExpr:
            *place, plane, byte = index
            at = [each - first for each, first in zip(place, before, strict=True)]
            inside = [
                condition
                for each, size, first, last in zip(at, pixels, before, after, strict=True)
                for condition in ([each >= 0] if first else []) + ([each < size] if last else [])
            ]
            total: Any = None
            for position in range(8):
                channel = byte + position * count
                bit = _bit(data(*at, channel), planes, plane)
                conditions = inside + ([channel < channels] if (position + 1) * count > channels else [])
                if conditions:
                    bit = tirx.if_then_else(tirx.all(*conditions), bit, tirx.const(0, "uint8"))
                bit = bit << tirx.const(position, "uint8")
                total = bit if total is None else total | bit
            return total

        return te.compute((*padded, len(planes.weights), count), element, name="bit_planes")

    return bit_planes


def _bit(number: Any, planes: Planes, plane: Any) -> Any:
    """Return one bit of a code, as uint8."""
    if planes.bipolar:
        return (number > tirx.const(0, number.ty.dtype)).astype("uint8")
    byte = number if str(number.ty.dtype) == "uint8" else number.astype("uint8")
    return (byte >> plane.astype("uint8")) & tirx.const(1, "uint8")


@dataclass(frozen=True)
class Border:
    """Rows or columns of a result whose windows see padding: so many first ones and last ones of ``size``."""

    size: int
    first: int = 0
    last: int = 0

    @property
    def classes(self) -> list[int]:
        """One row of each kind: the first ones, one that sees no padding, the last ones."""
        if self.first + self.last >= self.size:
            return list(range(self.size))
        return [*range(self.first + 1), *range(self.size - self.last, self.size)]

    def class_of(self, place: Any) -> Any:
        """Return the place in `classes` of a row's kind."""
        if not self.first + self.last:
            return 0
        if self.first + self.last >= self.size:
            return place
        return tirx.min(place, self.first) + tirx.max(place - (self.size - 1 - self.last), 0)


@dataclass(frozen=True)
class Sums:
    """The sums of one layer.

    Attributes
    ----------
    data, weights : Planes
        What is multiplied.
    window : Window
        What a pixel of the result sees.
    pixels : tuple of int
        The result's shape without its channels.
    channels : int
        The data's channels.
    borders : tuple of Border
        Which rows and columns see padding that is no number of the data.
    """

    data: Planes
    weights: Planes
    window: Window
    pixels: tuple[int, ...]
    channels: int
    borders: tuple[Border, Border] = (Border(1), Border(1))

    @property
    def chunk(self) -> tuple[int, int, int]:
        """Kernel rows, kernel columns and bytes whose bits are counted in a byte."""
        most, (height, width), count = _BYTE // 8, self.window.kernel, packed_bytes(self.channels)
        if height * width * count <= most:
            return height, width, count
        if width * count <= most:
            return 1, width, count
        return 1, 1, next(n for n in range(min(most, count), 0, -1) if count % n == 0)

    @property
    def sum_dtype(self) -> str:
        """The dtype that holds every sum of counts."""
        pairs = sum(abs(a * b) for a in self.data.weights for b in self.weights.weights)
        return "int16" if pairs * prod(self.window.kernel) * self.channels < 1 << 15 else "int32"

    def compute(self, bits: te.Tensor, weights: te.Tensor, least: te.Tensor) -> te.Tensor:
        """Return the sums of ``pack``'s planes and packed weights ``[planes, KH, KW, bytes, outputs]``.

        ``least`` ``[rows, columns, outputs]`` is what is added to the counts, per kind of row and of column.
        """
        outputs, rank = int(weights.shape[-1]), len(self.pixels)
        chunk = self.chunk
        whole = (*self.window.kernel, packed_bytes(self.channels))
        counts = [size // part for size, part in zip(whole, chunk, strict=True)]
        planes = (len(self.data.weights), len(self.weights.weights))
        inner = [te.reduce_axis((0, size), name) for size, name in zip(chunk, ("ry", "rx", "rb"), strict=True)]
        outer = [te.reduce_axis((0, size), name) for size, name in zip(counts, ("ky", "kx", "kb"), strict=True)]

        def counted(*index: tirx.Var) -> tirx.PrimExpr:
            pixel, (y, x, block, left, right, output) = index[:rank], index[rank:]
            ky, kx, byte = (own * size + each for own, size, each in zip((y, x, block), chunk, inner, strict=True))
            data, weight = bits(*self.window.at(pixel, (ky, kx)), left, byte), weights(right, ky, kx, byte, output)
            both = data ^ weight if self.weights.bipolar else data & weight
            return te.sum(tirx.popcount(both), axis=inner)

        parts = te.compute((*self.pixels, *counts, *planes, outputs), counted, name="bit_counts")

        def summed(*index: tirx.Var) -> tirx.PrimExpr:
            terms = [
                parts(*index[:rank], *outer, i, j, index[-1]).astype(self.sum_dtype) * tirx.const(a * b, self.sum_dtype)
                for i, a in enumerate(self.data.weights)
                for j, b in enumerate(self.weights.weights)
            ]
            return te.sum(sum(terms[1:], terms[0]), axis=outer)

        total = te.compute((*self.pixels, outputs), summed, name="bit_sums")
        factor = tirx.const(unit(self.data, self.weights), "int32")

        def result(*index: tirx.Var) -> tirx.PrimExpr:
            kinds = [border.class_of(place) for border, place in zip(self.borders, index[-3:-1], strict=False)]
            return least(*[0] * (2 - len(kinds)), *kinds, index[-1]) + total(*index).astype("int32") * factor

        return te.compute((*self.pixels, outputs), result, name="bit_result")
