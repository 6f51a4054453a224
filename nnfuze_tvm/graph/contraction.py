"""What a convolution or a matrix product with constant weights computes, in the words that kernels are chosen by."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

# The attribute of a kernel that says how many products with its constants may be added in int16: what `narrow_products`
# returns.
NARROW_PRODUCTS = "nnfuze.narrow_products"
# The attribute of a kernel whose tiles shall end where a row of the image does.
BY_ROWS = "nnfuze.by_rows"
ALL_PRODUCTS = 2**30
# Where fewer fit, what comes between costs about what it saves,
FEWEST_PRODUCTS = 32
# but for so many, whose sums go to int32 at once.
FEW_PRODUCTS = 8
# The largest of int8 data in absolute value, and the most of an int16.
_LARGEST_DATA, _MOST = 2**7, 2**15 - 1
# Weights stand in fours.
_GROUP = 4
# What the weights of the products that are added in one int16 may be together, in absolute value.
MOST_WEIGHTS = _MOST // _LARGEST_DATA


class Narrow(NamedTuple):
    """How many products may be added in int16, by which two of each four go to one sum.

    Attributes
    ----------
    neighbours : int
        Where it is the first and the second, and the other two.
    apart : int
        Where it is the first and the third, and the other two.
    """

    neighbours: int
    apart: int


NO_PRODUCTS = Narrow(0, 0)


@dataclass(frozen=True)
class Contraction:
    """What a layer with constant weights computes.

    Attributes
    ----------
    rows, cols : int
        Rows and columns of its output.
    channels : int
        Its output channels.
    products : int
        Products per sum.
    depth : int
        Of these, how many stand side by side in the data.
    data, weights, sums : str
        The dtypes.
    narrow : Narrow
        How many products with its weights may be added in int16, see `narrow_products`.
    """

    rows: int
    cols: int
    channels: int
    products: int
    depth: int
    data: str
    weights: str
    sums: str
    narrow: Narrow = NO_PRODUCTS


def narrow_products(weights: np.ndarray, channels: int) -> Narrow:
    """Return how many products of int8 data and weights can be added in two sums of int16, whatever the data are.

    Parameters
    ----------
    weights : np.ndarray
        int8. Weights of other types have no such number, nor have reductions of another length than a multiple of four.
    channels : int
        The axis of the output channels; along the others is summed, in their order.

    Returns
    -------
    Narrow
        Any so many products that follow each other, from a multiple of four on, fit; `ALL_PRODUCTS` if all of a
        reduction do. Of less than `FEWEST_PRODUCTS`, `FEW_PRODUCTS` if any so many do, from a multiple of that on;
        else 0.
    """
    rows = np.moveaxis(weights, channels, 0).reshape(weights.shape[channels], -1)
    if weights.dtype != np.int8 or rows.shape[1] % _GROUP:
        return NO_PRODUCTS
    return Narrow(*map(_fitting, _pairs(rows.astype("int32"))))


def _pairs(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the sizes of the pairs' weights, ``[O, fours, 2]``, by the ways of `Narrow`."""
    fours = np.abs(rows).reshape(len(rows), -1, 2, 2)
    return fours.sum(3), fours.sum(2)


def _fitting(sizes: np.ndarray) -> int:
    """Return the number for the sizes of the pairs' weights, ``[channels, fours, 2]``."""
    products = sizes.shape[1] * _GROUP
    before = np.pad(np.cumsum(sizes, axis=1, dtype="int32"), ((0, 0), (1, 0), (0, 0)))
    fits, ends = 0, products // _GROUP
    while fits < ends:
        groups = (fits + ends + 1) // 2
        most = int((before[:, groups:] - before[:, :-groups]).max(initial=0))
        fits, ends = (groups, ends) if most <= MOST_WEIGHTS else (fits, groups - 1)
    if fits * _GROUP == products:
        return ALL_PRODUCTS
    if fits * _GROUP >= FEWEST_PRODUCTS:
        return fits * _GROUP
    few = products % FEW_PRODUCTS == 0 and int(_of_few(sizes).max(initial=0)) <= MOST_WEIGHTS
    return FEW_PRODUCTS if few else 0


def _of_few(sizes: np.ndarray) -> np.ndarray:
    """Return the sizes of `FEW_PRODUCTS` together, two fours, for those of the pairs' weights."""
    return sizes[:, ::2] + sizes[:, 1::2]


def most_of_few(rows: np.ndarray) -> np.ndarray:
    """Return what the weights in one int16 are together at most, ``[O]``, of `FEW_PRODUCTS` at a time.

    Parameters
    ----------
    rows : np.ndarray
        Weights ``[O, K]``, K a multiple of `FEW_PRODUCTS`; two of each four go to one sum, in either of `Narrow`'s
        ways.
    """
    return np.maximum(*(_of_few(sizes).max((1, 2)) for sizes in _pairs(rows)))
