"""The weights of a layer that come nearest to what it should give, by what was seen of its input."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

# How far weights are held where they were, as parts of the mean square of what they multiply.
_RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0)
# Squared errors of this part of the squares come from rounding.
_ROUNDING = 1e-11


@dataclass
class Seen:
    """What a layer's weights multiply, and what its sums should be.

    Attributes
    ----------
    rows : numpy.ndarray
        ``[groups, n, inputs of a group × kernel]``.
    wanted : numpy.ndarray
        ``[groups, n, outputs of a group]``.
    """

    rows: np.ndarray
    wanted: np.ndarray

    def error(self, weight: np.ndarray, bias: np.ndarray) -> float:
        """Return the sum of the squared errors of a layer."""
        return float(np.square(self.rows @ weight.swapaxes(1, 2) + bias - self.wanted, dtype="float64").sum())


def fit(
    seen: Seen, held: Seen, weight: np.ndarray, bias: np.ndarray, *, has_bias: bool
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return weights and bias of least squares that serve better where they were not fitted; None if none do.

    The ridge holds weights where they were, so that what is never seen of an input does not move them. How much of it
    there is, is what serves best on what was held back.

    Parameters
    ----------
    seen, held : Seen
        What to fit to, and what to judge by.
    weight : numpy.ndarray
        The weights as they are, ``[groups, outputs, inputs × kernel]``.
    bias : numpy.ndarray
        The bias as it is, ``[groups, 1, outputs]``.
    has_bias : bool
        Whether the bias may change.
    """
    centre = seen.rows.mean(1, keepdims=True) if has_bias else np.zeros_like(seen.rows[:, :1])
    level = seen.wanted.mean(1, keepdims=True) if has_bias else bias
    rows = seen.rows - centre
    rest = seen.wanted - level - rows @ weight.swapaxes(1, 2)
    best, least = None, held.error(weight, bias)
    if least <= _ROUNDING * np.square(held.wanted, dtype="float64").sum():
        return None
    for change in (np.zeros_like(weight), *_changes(rows, rest)):
        new = (weight + change).astype(weight.dtype)
        offset = (level - centre @ new.swapaxes(1, 2)).astype(bias.dtype) if has_bias else bias
        error = held.error(new, offset)
        if error < least:
            best, least = (new, offset), error
    return best


def _changes(rows: np.ndarray, rest: np.ndarray) -> list[np.ndarray]:
    """Return the changes of the weights ``[groups, outputs, inputs]`` that explain the rest, ridge by ridge."""
    count, size = rows.shape[1:]
    few = count < size
    # Of few rows the products of rows are the smaller system; the solution is the same.
    products = (rows @ rows.swapaxes(1, 2) if few else rows.swapaxes(1, 2) @ rows).astype("float64")
    right = (rest if few else rows.swapaxes(1, 2) @ rest).astype("float64")
    power = np.maximum(np.square(rows, dtype="float64").sum((1, 2)) / size, 1e-30)
    diagonal = np.arange(products.shape[1])
    found = []
    for ridge in _RIDGES:
        ridged = products.copy()
        ridged[:, diagonal, diagonal] += ridge * power[:, None]
        try:
            solution = np.linalg.solve(ridged, right)
        except np.linalg.LinAlgError:
            continue
        found.append((rows.swapaxes(1, 2) @ solution if few else solution).swapaxes(1, 2))
    return [change for change in found if np.isfinite(change).all()]
