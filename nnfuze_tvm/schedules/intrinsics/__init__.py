"""Tensor intrinsics: how a CPU multiplies two or four int8 pairs and adds them to one int32 lane.

``dots`` lists the intrinsics of the instruction sets at hand. All of those for integers compute
``C[i] += sum(A[k] * B[i, k] for k in range(depth))`` in exact int32 arithmetic, so results are the same bits
everywhere. Two conditions make that true where two products are added in int16: ``uint8`` data hold values up to 127
only (AVX2's ``vpmaddubsw``; 2 · 255 · 127 would saturate), and int8 weights are never -128 (AArch64's ``smlal`` with
signed data; 2 · 128 · 128 would wrap). ``RealizeInteger`` sees to both; it holds layers with other weights in int16,
which no intrinsic multiplies by int8. Where ``wants_unsigned`` says so, ``uint8`` data may be of any value.
"""

from __future__ import annotations

from dataclasses import replace

from nnfuze_tvm.graph.contraction import FEW_PRODUCTS, FEWEST_PRODUCTS, NO_PRODUCTS, Narrow
from nnfuze_tvm.graph.integers import modulo
from nnfuze_tvm.schedules.intrinsics import arm, elementary, rounding, words, x86
from nnfuze_tvm.schedules.intrinsics.description import Dot, NarrowSums, Step

elementary.install()
modulo.install()
rounding.install()
words.install()

_NARROW, _FEW = x86.NARROW | arm.NARROW, x86.FEW | arm.FEW


def dots(features: frozenset[str], data: str, weights: str, narrow: Narrow = NO_PRODUCTS) -> list[Dot]:
    """Return the intrinsics that a CPU has for products of these dtypes, best first, long vectors before short ones.

    Parameters
    ----------
    features : frozenset[str]
        LLVM's names of the CPU's features.
    data : str
        Dtype of the data: ``uint8`` (values 0..127), ``int8``, ``int16``, ``float16`` or ``float32``.
    weights : str
        Dtype of the weights: ``int8``, ``int16``, ``float16`` or ``float32``.
    narrow : Narrow
        How many products with the weights may be added in int16 (`graph.contraction.narrow_products`).
    """
    if (data, weights) == ("int16", "int16"):
        found = [
            Dot(name, lanes, 2, 1, "int16", weights="int16")
            for feature, name, lanes in x86.WORDS
            if feature in features
        ]
    else:
        found = [
            Dot(name, lanes, depth, multiplies, taken_as)
            for feature, dtype, name, lanes, depth, multiplies, taken_as in x86.DOTS
            if feature in features
            and (dtype, "int8") == (data, weights)
            and (narrow.neighbours >= FEWEST_PRODUCTS or name not in x86.FOR_SMALL)
        ]
    # Of vectors of one length the best; shorter ones are for channels that fill no longer one.
    found = list({(dot.lanes, dot.depth): dot for dot in reversed(found)}.values())[::-1]
    own = [dot for feature, known in arm.DOTS.items() if feature in features for dot in known]
    return _narrowed([*found, *(dot for dot in own if (dot.data, dot.weights) == (data, weights))], narrow)


def _narrowed(known: list[Dot], narrow: Narrow) -> list[Dot]:
    """Return intrinsics as they multiply by small weights: where they can, products are added in int16 first."""
    fits = [narrow.apart if dot.paired else narrow.neighbours for dot in known]
    few = [dot for dot, fit in zip(known, fits, strict=True) if fit == FEW_PRODUCTS and dot.name in _FEW]
    found: list[Dot] = []
    for dot, fit in zip(known, fits, strict=True):
        if few and dot is few[0]:  # those of two steps are better than all that could be in their place
            found += [_FEW[each.name] for each in few]
        small = fit >= FEWEST_PRODUCTS and dot.name in _NARROW
        found.append(replace(dot, multiplies=dot.multiplies - 1, narrow=fit) if small else dot)
    return found


def narrow_of(name: str) -> NarrowSums:
    """Return how an intrinsic adds products in int16 first."""
    return _NARROW[name]


def signed_dots(features: frozenset[str]) -> list[Dot]:
    """Return more ways to multiply int8 by int8, for kernels that read weights once; best first, for `step_of` only."""
    return [dot for feature, dot in x86.SIGNED if feature in features]


def step_of(dot: Dot) -> Step:
    """Return what an intrinsic adds to its sums in one step, as expressions of vectors."""
    return (x86.STEPS | arm.STEPS)[dot.name]


def dot_product(features: frozenset[str]) -> Dot | None:
    """Return the intrinsic for one step of uint8 data (values 0..127) and int8 weights, four inputs of a channel
    side by side, or None where a CPU has none.
    """
    found = dots(features, "uint8", "int8")
    return next((dot for dot in found if (dot.steps, dot.depth, dot.paired) == (1, 4, False)), None)


def bytes_are_fast(features: frozenset[str]) -> bool:
    """Tell whether a CPU multiplies more pairs of int8 per instruction than of int16."""
    best = dot_product(features)
    return best is not None and best.multiplies == 1


def wants_unsigned(features: frozenset[str]) -> bool:
    """Tell whether a CPU multiplies four pairs of unsigned (up to 255) and signed bytes at once, but none of signed."""
    return any(feature in features for feature in x86.ANY_UNSIGNED)


def fitting(known: list[Dot], channels: int, depth: int) -> list[Dot]:
    """Return the best of the known intrinsics that divides so many channels and products, for several steps or one."""
    found = [dot for dot in known if channels % dot.lanes == 0 and depth % (dot.steps * dot.depth) == 0]
    kind = [(dot.lanes, dot.depth, dot.multiplies) for dot in found]
    return [dot for dot, own in zip(found, kind, strict=True) if own == kind[0]]
