"""Codes of few bits for weights, chosen by what the layer makes of the inputs that were seen, not weight by weight."""

from __future__ import annotations

import numpy as np

# The largest weight becomes the largest code, or this part of it does: what is larger is cut off.
_SHRINKS = np.linspace(1.0, 0.4, 25)
# How much of the mean power of the inputs is added to that of each, so that what was never seen stays where it was.
_RIDGE = 0.01
_BLOCK = 128


def best_scales(weight: np.ndarray, power: np.ndarray, levels: int) -> np.ndarray:
    """Return the scale of each row of weights with the least error of their products with independent inputs.

    Parameters
    ----------
    weight : numpy.ndarray
        ``[rows, n]``.
    power : numpy.ndarray
        Mean squares of the inputs, broadcastable to the weights.
    levels : int
        The largest code.
    """
    largest = np.maximum(np.abs(weight).max(1, keepdims=True), 1e-30)
    best, least = largest / levels, np.full((len(weight), 1), np.inf)
    for shrink in _SHRINKS:
        scale = largest * shrink / levels
        error = (np.square(nearest(weight, scale, levels) * scale - weight) * power).sum(1, keepdims=True)
        best, least = np.where(error < least, scale, best), np.minimum(error, least)
    return best[:, 0].astype("float32")


def nearest(weight: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    """Return the codes nearest to weights ``[rows, n]``, by scales ``[rows, 1]``."""
    return np.clip(np.rint(weight / scale), -levels, levels)


def rounded(weight: np.ndarray, gram: np.ndarray, scale: np.ndarray, levels: int) -> np.ndarray:
    """Return codes whose products with the inputs are nearest to those of the weights.

    Input by input, what rounding its weights makes wrong is made up for by those of the inputs that are still to be
    rounded, as far as they are correlated (Frantar et al., "GPTQ", ICLR 2023); those of most power come first. A row
    that is better off with the nearest codes gets these.

    Parameters
    ----------
    weight : numpy.ndarray
        ``[rows, n]``.
    gram : numpy.ndarray
        Sums of the products of inputs, ``[n, n]``, float64.
    scale : numpy.ndarray
        Of each row, ``[rows, 1]``, or of each weight.
    levels : int
        The largest code.
    """
    scale = np.broadcast_to(scale, weight.shape)
    plain = nearest(weight, scale, levels)
    order = np.argsort(-np.diag(gram), kind="stable")
    factors = _factors(gram[np.ix_(order, order)])
    left = weight[:, order].astype("float64")
    codes = np.empty_like(left)
    for begin in range(0, len(order), _BLOCK):
        end = min(begin + _BLOCK, len(order))
        errors = np.empty((len(left), end - begin))
        for k in range(begin, end):
            own = scale[:, order[k]]
            codes[:, k] = nearest(left[:, k], own, levels)
            errors[:, k - begin] = (left[:, k] - codes[:, k] * own) / factors[k, k]
            left[:, k:end] -= errors[:, k - begin, None] * factors[k, k:end]
        left[:, end:] -= errors @ factors[begin:end, end:]
    found = np.empty_like(codes)
    found[:, order] = codes
    better = _errors(found, weight, gram, scale) < _errors(plain, weight, gram, scale)
    return np.where(better[:, None], found, plain)


def towards(weight: np.ndarray, gram: np.ndarray, cross: np.ndarray) -> np.ndarray:
    """Return weights whose products with changed inputs are nearest to those that the weights had with the inputs.

    Parameters
    ----------
    weight : numpy.ndarray
        ``[rows, n]``.
    gram : numpy.ndarray
        Sums of the products of changed inputs with each other, ``[n, n]``, float64.
    cross : numpy.ndarray
        Those of inputs (rows) with changed ones (columns).
    """
    return weight + np.linalg.solve(_ridged(gram), (weight @ (cross - gram)).T).T


def _ridged(gram: np.ndarray) -> np.ndarray:
    return gram + np.eye(len(gram)) * max(_RIDGE * float(np.diag(gram).mean()), 1e-30)


def _factors(gram: np.ndarray) -> np.ndarray:
    """Return the upper triangular factor of the inverse: row by row, what an input's error costs those behind it."""
    return np.linalg.cholesky(np.linalg.inv(_ridged(gram))).T


def _errors(codes: np.ndarray, weight: np.ndarray, gram: np.ndarray, scale: np.ndarray) -> np.ndarray:
    change = codes * scale - weight
    return ((change @ gram) * change).sum(1)
