"""Tensor intrinsics: how a CPU multiplies two or four int8 pairs and adds them to one int32 lane.

``dot_product(features, dtype)`` names the intrinsic of the best instruction set at hand. All of them compute
``C[i] += sum(A[k] * B[i, k] for k in range(depth))`` in exact int32 arithmetic, so results are the same bits
everywhere. Two conditions make that true on AVX2 (whose ``vpmaddubsw`` saturates at int16): ``uint8`` data
holds values up to 127 only, and int8 weights are never -128 (``RealizeInteger`` holds layers with such weights in
int16, which no intrinsic takes).
"""

from __future__ import annotations

from dataclasses import dataclass

from nnfuze_tvm.schedules.intrinsics import arm, elementary, x86

elementary.install()


@dataclass(frozen=True)
class Dot:
    """A registered tensor intrinsic.

    Attributes
    ----------
    name : str
        TVM's name of it.
    lanes : int
        The int32 lanes it fills.
    depth : int
        Products per lane.
    multiplies : int
        The multiplications it issues.
    data : str
        Dtype in which it takes the data; ``int16`` where int8 data are to be widened before.
    """

    name: str
    lanes: int
    depth: int
    multiplies: int
    data: str


def dot_product(features: frozenset[str], dtype: str) -> Dot | None:
    """Return the int8 dot-product intrinsic for a CPU, or None where it has none.

    Parameters
    ----------
    features : frozenset[str]
        LLVM's names of the CPU's features.
    dtype : str
        Of the data: ``uint8`` (values 0..127) or ``int8``. Weights are int8.
    """
    for feature, data, name, lanes, depth, multiplies, taken_as in (*x86.DOTS, *arm.DOTS):
        if feature in features and data == dtype:
            return Dot(name, lanes, depth, multiplies, taken_as)
    return None


def dot_words(features: frozenset[str]) -> Dot | None:
    """Return the intrinsic that multiplies pairs of int16 and adds them to int32 lanes, or None where there is none."""
    for feature, name, lanes in x86.WORDS:
        if feature in features:
            return Dot(name, lanes, 2, 1, "int16")
    return None


def bytes_are_fast(features: frozenset[str]) -> bool:
    """Tell whether a CPU multiplies more pairs of int8 per instruction than of int16."""
    best = dot_product(features, "uint8")
    return best is not None and best.multiplies == 1
