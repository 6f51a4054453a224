"""The weights of a Winograd convolution: their nine taps at the points, in NumPy and as a kernel.

The taps of 3×3 weights are polynomials in both directions; `winograd_kernel` says which points they are evaluated at.
Every number at a point is a sum over the nine taps alone, so weights that are packed tap by tap are packed at the
points as well: a bundle holds the former, and its library makes the latter of them.

Of int8 weights, all is multiplied by what makes integers of them, and the output divided by it, which is exact:

- m = 2: by 2 in a row, and likewise in a column. A transformed weight is at most 9 · 127, transformed data are at most
  4 · 128.
- m = 4, at 0, ±1, ±2: by 12, 6, 24 and 3 in a row, and likewise in a column. A transformed weight is at most
  49 · 127, transformed data are at most 100 · 128.

Sums at a point fit int32 for almost all weights (`fit` looks). What is interpolated of them may not, but is right
modulo 2^32: it is 4 or 576 times the output, which is divided by 9 modulo 2^32 and shifted by at most 6 bits, so that
outputs of 30 or 26 bits are exact.
"""

from __future__ import annotations

from math import sqrt
from typing import Any

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

TAPS = 9

# The dtype that sums are made in, and that of the result, by the weights'.
_DTYPES = {"int8": ("int16", "int16"), "float16": ("float32", "float16"), "float32": ("float64", "float32")}
_POINTS: dict[tuple[int, bool], tuple[float, ...]] = {
    (2, False): (0.0, 1.0, -1.0),
    (2, True): (0.0, 1.0, -1.0),
    (4, False): (0.0, sqrt(0.5), -sqrt(0.5), sqrt(2.0), -sqrt(2.0)),
    (4, True): (0.0, 1.0, -1.0, 2.0, -2.0),
}
# Of integers: what rows are multiplied by, and by how much data grow there, in one direction.
_WHOLE = {2: (2, 2, 2, 2), 4: (12, 6, 6, 24, 24, 3)}
_GROWTH = {2: (2, 2, 2, 2), 4: (10, 10, 10, 6, 6, 10)}
# The greatest absolute value of int8 data, and what sums at a point and outputs must stay below, by m.
_LARGEST = 128
_SUMS = 2**31
_OUTPUTS = {2: 2**29, 4: 2**25}


def taps(weights: np.ndarray, computed: int | None = None) -> np.ndarray:
    """Return the taps ``[9, O, I]`` of OHWI 3×3 weights, and zeros for further outputs that are ``computed``."""
    outputs, _, _, channels = weights.shape
    found = np.ascontiguousarray(weights.transpose(1, 2, 0, 3)).reshape(TAPS, outputs, channels)
    return found if computed is None else np.pad(found, ((0, 0), (0, computed - outputs), (0, 0)))


def factors(m: int, dtype: str) -> np.ndarray:
    """Return what the taps are multiplied by, ``[(m+2)², 9]``, for weights of a dtype."""
    whole = dtype == "int8"
    points = _POINTS[m, whole]
    rows = [np.array([1.0, p, p * p]) / np.prod([p - q for q in points if q != p]) for p in points]
    if m == 2:
        rows[0] = -rows[0]  # as `winograd_kernel` has it
    evaluate = np.stack([*rows, np.array([0.0, 0.0, 1.0])])
    if whole:
        evaluate *= np.array(_WHOLE[m])[:, None]
    both = np.kron(evaluate, evaluate)
    return np.rint(both).astype("int16") if whole else both.astype(_DTYPES[dtype][0])


def fit(parts: np.ndarray, m: int) -> bool:
    """Tell whether sums over the channels of int8 taps ``[9, O, I]``, at the points and in the end, are sure to fit."""
    growth = np.kron(_GROWTH[m], _GROWTH[m])
    there = np.tensordot(factors(m, "int8").astype("float32"), parts.astype("float32"), 1)
    sums = np.abs(there).sum(-1, dtype="float64") * (growth * _LARGEST)[:, None]
    outputs = np.abs(parts.astype("float64")).sum((0, -1)) * _LARGEST
    return bool(sums.max() < _SUMS and outputs.max() < _OUTPUTS[m])


def at_points(parts: np.ndarray, m: int) -> np.ndarray:
    """Return taps ``[9, …]`` evaluated at the points: ``[(m+2)², …]`` of their dtype, int16 of int8."""
    dtype = str(parts.dtype)
    wide, result = _DTYPES[dtype]
    parts, found = parts.astype(wide), []
    for row in factors(m, dtype):
        total = np.zeros(parts.shape[1:], wide)
        for factor, part in zip(row, parts, strict=True):
            if factor:
                total += factor * part
        found.append(total.astype(result))
    return np.stack(found)


def transform_weights(weights: np.ndarray, m: int, computed: int | None = None) -> np.ndarray:
    """Return OHWI 3×3 weights evaluated at the points: ``[(m+2)², O, I]`` of their dtype, int16 of int8 weights.

    Of more ``computed`` outputs than there are, the last are zeros.
    """
    return at_points(taps(weights, computed), m)


def prim_func(m: int, dtype: str) -> tirx.PrimFunc:
    """Return the PrimFunc ``(factors, taps [9, n], result [(m+2)², n])`` of `at_points`, for any n."""
    wide, result = _DTYPES[dtype]
    points = (m + 2) ** 2
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name(f"winograd{m}x{m}_weights")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            table = T.arg("table", _buffer((points, TAPS), wide))
            size = tirx.Var("n", "int64")
            parts = T.arg("parts", _buffer((TAPS, size), dtype))
            out = T.arg("out", _buffer((points, size), result))
            with T.sblock("root"), T.grid(tirx.IntImm("int64", points), size) as loops, T.sblock("at_points"):
                p = T.axis.spatial(tirx.IntImm("int64", points), loops[0], dtype="int64")
                x = T.axis.spatial(size, loops[1], dtype="int64")
                T.reads(table[p, 0:TAPS], parts[0:TAPS, x])
                T.writes(out[p, x])
                total = tirx.const(0, wide)
                for k in range(TAPS):
                    total = total + table[p, k] * T.cast(parts[k, x], wide)
                T.buffer_store(out, T.cast(total, result), [p, x])
    return builder.get()


def _buffer(shape: tuple[Any, ...], dtype: str) -> Any:
    return T.Buffer([dim if isinstance(dim, tirx.Var) else tirx.IntImm("int64", dim) for dim in shape], dtype)
