"""Which channels of the example network must be removed together, and which of them matter least."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Group:
    """Convolutions that write the same channels, and the layers that read them.

    "head" among the readers means the dense layer behind the trunk.
    """

    producers: tuple[str, ...]
    consumers: tuple[str, ...]
    inner: bool


GROUPS = {
    "block1.inner": Group(("block1.conv1",), ("block1.conv2",), inner=True),
    "block2.inner": Group(("block2.conv1",), ("block2.conv2",), inner=True),
    "block3.inner": Group(("block3.conv1",), ("block3.conv2",), inner=True),
    "stream1": Group(("stem", "block1.conv2"), ("block1.conv1", "block2.conv1", "block2.shortcut"), inner=False),
    "stream2": Group(("block2.conv2", "block2.shortcut"), ("block3.conv1", "block3.shortcut"), inner=False),
    "stream3": Group(("block3.conv2", "block3.shortcut"), ("head",), inner=False),
}


def weakest(filters: list[np.ndarray], fraction: float) -> np.ndarray:
    """Find the channels with the smallest L2 norm over all filters that produce them.

    Parameters
    ----------
    filters : list of numpy.ndarray
        Weights [channels, ...] of the producers of one group, with BatchNorm folded into them.
    fraction : float
        The share of the channels to return.

    Returns
    -------
    numpy.ndarray
        Sorted channel numbers.
    """
    energy = sum((weight.reshape(len(weight), -1) ** 2).sum(axis=1) for weight in filters)
    return np.sort(np.argsort(energy, kind="stable")[: int(len(energy) * fraction)])
