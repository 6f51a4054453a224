"""How far a network's outputs are from those of another one: what a budget of accuracy is stated in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# An output that varies by less than this part of its root mean square is called constant.
_VARIES = 1 / 50


def output_error(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the error of one output over some inferences.

    Parameters
    ----------
    answers, exact : sequence of numpy.ndarray
        The output of each inference, as it is and as it should be.

    Returns
    -------
    float
        Of floats, the root mean square of the difference, relative to the standard deviation of the exact values: 0.1
        means a correlation of 0.995 where the error has no mean. Relative to their root mean square where they hardly
        vary. Of anything else, the share of the values that differ.
    """
    found, wanted = (np.concatenate([np.ravel(each) for each in arrays]) for arrays in (answers, exact))
    if wanted.dtype.kind != "f":
        return float(np.mean(found != wanted)) if wanted.size else 0.0
    finite = np.isfinite(wanted)
    found, wanted = found[finite].astype("float64"), wanted[finite].astype("float64")
    if not wanted.size:
        return 0.0
    if not np.isfinite(found).all():
        return math.inf
    size, spread = math.sqrt(float(np.mean(wanted**2))), float(wanted.std())
    difference = math.sqrt(float(np.mean((found - wanted) ** 2)))
    return difference / ((spread if spread > _VARIES * size else size) or 1.0)
