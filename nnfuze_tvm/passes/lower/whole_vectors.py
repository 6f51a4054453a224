"""Channels of zero weights beside a layer's own, for vectors to be whole."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape

# Channels that make whole vectors on any machine, and how many of a layer's own are worth some of zeros.
_VECTOR = 16
_MIN_CHANNELS = 64
# A multiple of this makes vectors, if not of the longest kind.
_ODD = 4
_TILE = range(4, 9)


def is_odd(channels: int) -> bool:
    """Tell whether so many channels are worth some of zeros."""
    return channels % _ODD != 0 and channels >= _MIN_CHANNELS


def whole(channels: int) -> int:
    """Return how many channels make whole vectors."""
    return -(-channels // _VECTOR) * _VECTOR


def whole_tiles(channels: int) -> int:
    """Return how many channels make vectors that a single row's sums can be made of, four to eight at a time.

    Fewer wait for each other. Up to eight vectors are one tile.
    """
    vectors = whole(channels) // _VECTOR
    while vectors > _TILE[-1] and all(vectors % count for count in _TILE):
        vectors += 1
    return vectors * _VECTOR


@dataclass(frozen=True)
class FirstChannels:
    """A form: the result is the first ``channels`` of ``computed`` ones, which are an axis in the middle or the last.

    Channels that are not the last axis are so in memory.
    """

    axis: int
    channels: int
    computed: int

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel for all that are computed."""
        return np.pad(values.reshape(-1), (0, self.computed - self.channels), mode="edge")

    def restored(self, *sources: Value) -> Value:
        """Return the result."""
        (source,) = sources
        if self.channels == self.computed:
            return source
        last = len(static_shape(source)) - 1
        if self.axis % (last + 1) == last:
            return op.strided_slice(source, [last], [0], [self.channels])
        order = list(range(last + 1))
        order.append(order.pop(self.axis))
        back = np.argsort(order).tolist()
        return op.permute_dims(op.strided_slice(op.permute_dims(source, order), [last], [0], [self.channels]), back)
