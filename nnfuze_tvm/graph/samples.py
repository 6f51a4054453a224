"""Arrays of many samples, as people keep them."""

from __future__ import annotations

import numpy as np


def in_a_row(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return samples of an input as ``[N, …]``, one behind the other.

    Parameters
    ----------
    array : np.ndarray
        Either that, or ``[N, *shape]``: the inputs of N inferences, which are samples, too.
    shape : tuple of int
        The input's shape, the batch first.
    """
    if shape and array.ndim == len(shape) + 1 and array.shape[1:] == shape:
        return array.reshape(-1, *shape[1:])
    return array


def by_inference(array: np.ndarray, shape: tuple[int, ...]) -> np.ndarray:
    """Return samples ``[N, …]`` of several inferences as ``[inferences, *shape]``; anything else as it is."""
    samples = array.ndim == len(shape) > 0 and array.shape[1:] == shape[1:] and array.shape != shape
    if samples and shape[0] and len(array) and len(array) % shape[0] == 0:
        return array.reshape(-1, *shape)
    return array
