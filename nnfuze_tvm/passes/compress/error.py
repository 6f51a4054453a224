"""How far a network's outputs are from those of another one: what a budget of accuracy is stated in."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

# How sure it is that a bound of an error holds.
_SURE = 0.95
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


def error_bound(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return what the error of one output hardly exceeds over other inferences of the same kind.

    That is `output_error` with the mean of its squares (of integers, the share itself) where Student's distribution has
    95 % below, given how much it differs from inference to inference: few that differ much tell little. Of a single
    inference, its error.

    Parameters
    ----------
    answers, exact : sequence of numpy.ndarray
        The output of each inference, as it is and as it should be.
    """
    from scipy.special import stdtrit  # slow to import, and only budgets need it

    error, count = output_error(answers, exact), len(exact)
    if count < 2 or error == 0 or not math.isfinite(error):
        return error
    floats = exact[0].dtype.kind == "f"
    each = np.array(
        [_square(*pair) if floats else np.mean(pair[0] != pair[1]) for pair in zip(answers, exact, strict=True)]
    )
    beyond = 1 + float(stdtrit(count - 1, _SURE)) * float(each.std(ddof=1)) / math.sqrt(count) / float(each.mean())
    return error * math.sqrt(beyond) if floats else min(1.0, error * beyond)


def _square(found: np.ndarray, wanted: np.ndarray) -> float:
    """Return the mean square of the differences, where there are finite values."""
    finite = np.isfinite(wanted)
    return float(np.mean((found[finite].astype("float64") - wanted[finite]) ** 2)) if finite.any() else 0.0
