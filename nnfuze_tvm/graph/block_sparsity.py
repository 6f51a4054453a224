"""Blocks of weights that are zero: what is removed together, and how what is left is stored.

A block is the weights of `OUTPUTS` output channels that lie side by side, for `INPUTS` input channels that do, at all
places of the kernel: one vector of the longest dot products of bytes, and a whole number of vectors of all others. So
one index says for a register tile's channels which data they read, whatever the machine.
"""

from __future__ import annotations

import numpy as np

OUTPUTS, INPUTS = 16, 4


def has_blocks(filters: np.ndarray) -> bool:
    """Tell whether weights ``[groups, outputs, inputs, *kernel]`` are whole blocks: of one group, several of them."""
    groups, outputs, inputs = filters.shape[:3]
    return groups == 1 and outputs % OUTPUTS == 0 and inputs % INPUTS == 0 and inputs > INPUTS


def in_blocks(filters: np.ndarray) -> np.ndarray:
    """Return weights as a matrix of blocks, ``[rows, columns, OUTPUTS, INPUTS, places of the kernel]``."""
    _, outputs, inputs = filters.shape[:3]
    apart = filters.reshape(outputs // OUTPUTS, OUTPUTS, inputs // INPUTS, INPUTS, -1)
    return apart.swapaxes(1, 2)


def kept_blocks(filters: np.ndarray) -> np.ndarray:
    """Return which blocks are stored of each row, ``[rows, kept]`` in rising order.

    Rows have equally many: the kept blocks of one with fewer that are not zero include some that are.
    """
    used = in_blocks(filters).any((2, 3, 4))
    kept = max(1, int(used.sum(1).max()))
    return np.sort(np.argsort(~used, axis=1, kind="stable")[:, :kept], axis=1)


def in_rows(filters: np.ndarray, kept: np.ndarray) -> np.ndarray:
    """Return what is stored of weights, row by row: ``[rows, OUTPUTS, inputs that a row reads, *kernel]``."""
    own = np.take_along_axis(in_blocks(filters), kept[:, :, None, None, None], 1)
    return own.swapaxes(1, 2).reshape(len(kept), OUTPUTS, kept.shape[1] * INPUTS, *filters.shape[3:])


def of_rows(rows: np.ndarray, kept: np.ndarray, inputs: int) -> np.ndarray:
    """Return the weights that are stored so, ``[1, outputs, inputs, *kernel]``; see `in_rows`."""
    kernel = rows.shape[3:]
    blocks = rows.reshape(*kept.shape[:1], OUTPUTS, kept.shape[1], INPUTS, -1).swapaxes(1, 2)
    whole = np.zeros((len(kept), inputs // INPUTS, *blocks.shape[2:]), rows.dtype)
    np.put_along_axis(whole, kept[:, :, None, None, None], blocks, 1)
    return whole.swapaxes(1, 2).reshape(1, len(kept) * OUTPUTS, inputs, *kernel)


def columns(kept: np.ndarray, places: int) -> np.ndarray:
    """Return which products the outputs of each row sum, of those of ``inputs × places``, in the order of `in_rows`."""
    return (kept[:, :, None] * (INPUTS * places) + np.arange(INPUTS * places)).reshape(len(kept), -1)
