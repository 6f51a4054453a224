"""What a convolution or a matrix product with constant weights computes, in the words that kernels are chosen by."""

from __future__ import annotations

from dataclasses import dataclass


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
    """

    rows: int
    cols: int
    channels: int
    products: int
    depth: int
    data: str
    weights: str
    sums: str
