"""Matrices of few-bit codes that are scaled in blocks, as kernels read them: packed, and unpacked in registers.

A block is the weights of one output for some inputs that lie side by side. Codes of 4 bits stand eight in a word of 32,
those of inputs that follow each other, the first in the lowest bits, in two's complement.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from math import gcd

import numpy as np

# Codes of 4 bits in a word, and what that is.
IN_WORD, WORD = 8, np.dtype("uint32")
# The fewest inputs of a block for which a scale is worth its bytes.
_LEAST_BLOCK = 8


@dataclass(frozen=True)
class Packed:
    """The weights ``(codes - zeros) * scales`` of a layer.

    Attributes
    ----------
    codes : numpy.ndarray
        ``[inputs, outputs]``, int8.
    scales : numpy.ndarray
        ``[blocks, outputs]``, float32.
    zeros : numpy.ndarray or None
        ``[blocks, outputs]``, int8; None: all zero.
    bits : int
        4 or 8 per code.
    """

    codes: np.ndarray
    scales: np.ndarray
    zeros: np.ndarray | None
    bits: int

    @property
    def block(self) -> int:
        """Inputs that share a scale."""
        return len(self.codes) // len(self.scales)

    @cached_property
    def words(self) -> np.ndarray:
        """Codes as kernels read them: int8 ``[inputs, outputs]``, or uint32 words of 4 bits ``[words, outputs]``."""
        if self.bits == 8:
            return self.codes
        apart = self.codes.reshape(-1, IN_WORD, self.codes.shape[1]).astype(WORD) & 15
        shifts = np.arange(0, 32, 4, dtype=WORD)[:, None]
        return np.bitwise_or.reduce(apart << shifts, axis=1)

    def padded(self, outputs: int) -> Packed:
        """Return weights with more outputs, all zero."""
        width = [(0, 0), (0, outputs - self.codes.shape[1])]
        codes, scales = np.pad(self.codes, width), np.pad(self.scales, width)
        return Packed(codes, scales, None if self.zeros is None else np.pad(self.zeros, width), self.bits)


def packed(codes: np.ndarray, scales: np.ndarray, zeros: np.ndarray) -> Packed | None:
    """Return a matrix as packed codes; None if it has none of 8 bits, too small blocks, or scales that are no numbers.

    Parameters
    ----------
    codes : numpy.ndarray
        ``[inputs, outputs]``, int8 or uint8.
    scales, zeros : numpy.ndarray
        One of each per code, or what broadcasts to that.
    """
    if not np.isfinite(scales).all():
        return None
    shape, wide = codes.shape, codes.astype("int16")
    scales, zeros = np.broadcast_to(scales, shape), np.broadcast_to(zeros.astype("int16"), shape)
    shifted = wide - zeros
    for bits in (4, 8):
        least = -(2 ** (bits - 1))
        offset = int(wide.min()) - least
        for own, points in ((shifted, None), (wide - offset, zeros - offset)):
            block = gcd(_block(scales), 0 if points is None else _block(points))
            fits = least <= own.min() and own.max() < -least and block >= _LEAST_BLOCK
            if not fits or (bits == 4 and block % IN_WORD) or (points is not None and np.abs(points).max() > 127):
                continue
            zero = None if points is None else points[::block].astype("int8")
            return Packed(own.astype("int8"), scales[::block].astype("float32"), zero, bits)
    return None


def _block(numbers: np.ndarray) -> int:
    """Return the largest number of rows, side by side, that are equal wherever a matrix is cut into so many."""
    changes = np.flatnonzero((numbers[1:] != numbers[:-1]).any(1)) + 1
    return gcd(len(numbers), *map(int, changes))
