"""Tensor intrinsics: how a CPU multiplies four int8 pairs and adds them to one int32 lane.

``dot4(features, dtype)`` names the intrinsic of the best instruction set at hand. All of them compute
``C[i] += sum(A[k] * B[i, k] for k in range(4))`` in exact int32 arithmetic, so results are the same bits
everywhere. Two conditions make that true on AVX2 (whose ``vpmaddubsw`` saturates at int16): ``uint8`` data
holds values up to 127 only, and int8 weights are never -128 (``RealizeInteger`` holds layers with such weights in
int16, which no intrinsic takes).
"""

from __future__ import annotations

from dataclasses import dataclass

from nnfuze_tvm.schedules.intrinsics import arm, elementary, x86

elementary.install()


@dataclass(frozen=True)
class Dot4:
    """A registered tensor intrinsic, the int32 lanes it fills and the multiplications it issues."""

    name: str
    lanes: int
    multiplies: int


def dot4(features: frozenset[str], dtype: str) -> Dot4 | None:
    """Return the int8 dot-product intrinsic for a CPU, or None where it has none.

    Parameters
    ----------
    features : frozenset[str]
        LLVM's names of the CPU's features.
    dtype : str
        Of the data: ``uint8`` (values 0..127) or ``int8``. Weights are int8.
    """
    for feature, data, name, lanes, multiplies in (*x86.DOT4, *arm.DOT4):
        if feature in features and data == dtype:
            return Dot4(name, lanes, multiplies)
    return None
