"""Numbers as planes of bits, and what the bits that two of them have in common say of their products.

A number is ``factor · Σ weight_i · bit_i``, or, where numbers are ``bipolar``, ``factor · Σ weight_i · (2 bit_i - 1)``.
A sum of products is then a sum over pairs of planes of counted bits, of ``a AND b``, or of ``a XOR b`` where the right
ones are bipolar [1]_: ``b (2c - 1) = c - (b XOR c)`` and ``(2b - 1)(2c - 1) = 1 - 2 (b XOR c)``. What does not depend
on the data is a constant.

.. [1] M. Cowan et al., "Automatic generation of high-performance quantized machine learning kernels", CGO 2020.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Planes:
    """How integers are planes of bits: what they are all multiples of, each plane's weight, and which of two ways.

    To those of data that are not bipolar an ``offset`` is added whose bits in the planes are zero: codes of uint8 that
    are few are stored as int8 from -128 on.
    """

    factor: int
    weights: tuple[int, ...]
    bipolar: bool
    offset: int = 0

    @staticmethod
    def of(values: np.ndarray) -> Planes:
        """Return the fewest planes for some integers."""
        factor = int(np.gcd.reduce(np.abs(values.ravel()))) or 1
        low, high = int(values.min()) // factor, int(values.max()) // factor
        odd = np.all(values // factor % 2)
        if odd and low < 0:
            return Planes(factor, _powers(max(-low, high).bit_length()), True)
        if low >= 0:
            return Planes(factor, _powers(max(high, 1).bit_length()), False)
        count = 1 + max((-low - 1).bit_length(), high.bit_length())
        *powers, last = _powers(count)
        return Planes(factor, (*powers, -last), False)

    @staticmethod
    def above(values: np.ndarray) -> Planes | None:
        """Return the planes of what integers are more than the smallest of them; None if that has bits of theirs."""
        low = int(values.min())
        count = int(values.max() - low).bit_length()
        return None if count == 0 or low % (1 << count) else Planes(1, _powers(count), False, low)

    @property
    def least(self) -> int:
        """The number all of whose bits are zero."""
        return -self.factor * sum(self.weights) if self.bipolar else self.offset

    def bits(self, values: np.ndarray) -> np.ndarray:
        """Return integers ``[...]`` as bits ``[planes, ...]``."""
        whole = values.astype("int64") // self.factor
        whole = (whole + sum(self.weights)) // 2 if self.bipolar else whole
        return np.stack([whole >> plane & 1 for plane in range(len(self.weights))])


def _powers(count: int) -> tuple[int, ...]:
    return tuple(1 << plane for plane in range(count))


def unit(data: Planes, weights: Planes) -> int:
    """Return what a counted bit of the pair of planes of weight 1 adds to a sum."""
    size = data.factor * weights.factor * (2 if data.bipolar else 1)
    return -size if weights.bipolar else size
