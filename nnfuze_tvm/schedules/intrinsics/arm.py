"""AArch64: products by lanes of a vector of data, for every generation.

One load brings the data of several steps of the reduction, and each multiplication takes its step's part of that
vector: by element where the instruction can (``fmla``, ``smlal``, ``sdot``).
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import Dot, NarrowSums, Step, steps_desc

# An expression of TVM's of several lanes.
Vector = Any
# Steps whose products are added in int16, where not many are and not only one's.
_STEPS_AT_ONCE = 2


def _call(name: str, dtype: str, *args: Vector) -> Vector:
    return T.call_llvm_pure_intrin(dtype, f"llvm.aarch64.neon.{name}", *args)


def _pick(vector: Vector, *lanes: int) -> Vector:
    # TVM's shuffles give no more lanes than they take.
    return tirx.Shuffle([vector] * -(-len(lanes) // vector.ty.dtype.lanes), list(lanes))


def signed(data: Vector) -> Vector:
    """Return bytes as int8: unsigned ones are up to 127."""
    return tirx.reinterpret(f"int8x{data.ty.dtype.lanes}", data)


def _fmla(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Four float32 or eight float16 channels: ``fmla`` by element."""
    return total + _pick(data, *[step] * weights.ty.dtype.lanes) * weights


def _smlal(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Eight int16 channels: ``smlal`` and ``smlal2`` by element."""
    number = _pick(data, *[step] * 4)
    low, high = (_call("smull", "int32x4", _pick(weights, *range(half, half + 4)), number) for half in (0, 4))
    return total + tirx.Shuffle([low, high], list(range(8)))


def _smlal_pairs(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Four int8 channels, four products each: two are added in int16 (2 · 127 · 128 < 2^15), pairs of sums in int32.

    The weights hold the first two inputs of all channels, then the other two; one table look-up brings the data into
    that order.
    """
    low, high = _pairs(data, weights, step)
    return total + pairs_added(low + high)


def _pairs(data: Vector, weights: Vector, step: int) -> tuple[Vector, Vector]:
    """Return the products of the first two inputs of four channels, and of the other two, in int16."""
    first = 4 * step
    number = _pick(data, *[first, first + 1] * 4, *[first + 2, first + 3] * 4)
    low, high = (
        _call("smull", "int16x8", *(_pick(v, *range(half, half + 8)) for v in (weights, number))) for half in (0, 8)
    )
    return low, high


def pairs_added(narrow: Vector) -> Vector:
    """Add eight int16 two by two, in int32: ``saddlp``."""
    return _call("saddlp", "int32x4", narrow)


def few_bit_products(narrow: Vector | None, data: Vector, weights: Vector, step: int) -> Vector:
    """Add four products of each of four channels to two int16 sums of each, which must have room for them."""
    low, high = _pairs(signed(data), weights, step)
    return low + high if narrow is None else narrow + low + high


def _few_at_once(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Four int8 channels, eight products each: four are added in int16, where the weights are so small."""
    (first, second), narrow = weights, None
    for number, own in ((2 * step, first), (2 * step + 1, second)):
        narrow = few_bit_products(narrow, data, own, number)
    return total + pairs_added(narrow)


def _sdot(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Four int8 channels, four products each: ``sdot`` by element."""
    return _call("sdot", "int32x4", total, weights, _pick(data, *list(range(4 * step, 4 * step + 4)) * 4))


def matrix_product(total: Vector, rows: Vector, columns: Vector) -> Vector:
    """Add the products of two rows of eight int8 and two columns to 2 × 2 sums: ``smmla``."""
    return _call("smmla", "int32x4", total, rows, columns)


def _smmla(total: Vector, data: Vector, weights: Vector, step: int) -> Vector:
    """Four int8 channels, eight products each, of one row: half of what ``smmla`` can do."""
    row = _pick(data, *list(range(8 * step, 8 * step + 8)) * 2)
    none = tirx.Broadcast(tirx.const(0, "int32"), 4)
    low, high = (matrix_product(none, row, _pick(weights, *range(half, half + 16))) for half in (0, 16))
    return total + tirx.Shuffle([low, high], [0, 1, 4, 5])


def _by_lanes(dot: Dot, step: Step, at_once: int = 1) -> tirx.PrimFunc:
    """Return the implementation of ``dot`` as a chain of its steps, of which ``step`` takes so many at once."""
    numbers = dot.steps * dot.depth
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            a, b, c = (T.arg(name, T.handle()) for name in "abc")
            data = T.match_buffer(a, (numbers,), dot.data, offset_factor=1)
            packed = dot.packed
            strides = [T.int32(), *(prod(packed[i + 1 :]) for i in range(1, len(packed)))]
            weights = T.match_buffer(b, packed, dot.weights, offset_factor=1, strides=strides)
            sums = T.match_buffer(c, (dot.lanes,), dot.sums, offset_factor=1)
            with T.sblock("root"):
                T.reads(sums[0 : dot.lanes], data[0:numbers], weights[tuple(slice(0, n) for n in packed)])
                T.writes(sums[0 : dot.lanes])
                row = data.vload([0], f"{dot.data}x{numbers}")
                if dot.data == "uint8":
                    row = signed(row)
                total = sums.vload([0], f"{dot.sums}x{dot.lanes}")
                places = [[index, *[0] * (len(packed) - 1)] for index in range(dot.steps)]
                loaded = [weights.vload(place, f"{dot.weights}x{dot.lanes * dot.depth}") for place in places]
                for index in range(dot.steps // at_once):
                    own = loaded[at_once * index : at_once * (index + 1)]
                    total = step(total, row, own[0] if at_once == 1 else own, index)
                T.buffer_store(sums, total, [T.ramp(T.int32(0), 1, dot.lanes)])
    return builder.get()


def _several(
    most: int, step: Step, name: str, *, data: str, lanes: int, depth: int, multiplies: int, **others: Any
) -> list[tuple[Dot, Step]]:
    """Return an intrinsic for ``most`` steps, and for fewer."""
    # A single product per step and sum needs no intrinsic.
    counts = [count for count in (8, 4, 3, 2, 1) if (2 if depth == 1 else 1) <= count <= most]
    return [(Dot(f"nnfuze_{name}_{count}", lanes, depth, multiplies, data, count, **others), step) for count in counts]


_PAIRS = [
    pair
    for data in ("uint8", "int8")
    for pair in _several(
        4, _smlal_pairs, f"pairs_{data}", data=data, lanes=4, depth=4, multiplies=3, prepare=1, paired=True
    )
]
# By feature, the best first.
_ALL: dict[str, list[tuple[Dot, Step]]] = {
    "i8mm": [
        pair
        for data in ("uint8", "int8")
        for pair in _several(2, _smmla, f"smmla_{data}", data=data, lanes=4, depth=8, multiplies=1, rows=2)
    ],
    "dotprod": [
        pair
        for data in ("uint8", "int8")
        for pair in _several(4, _sdot, f"sdot_{data}", data=data, lanes=4, depth=4, multiplies=1)
    ],
    "fullfp16": _several(
        8, _fmla, "fmla_half", data="float16", lanes=8, depth=1, multiplies=1, weights="float16", sums="float16"
    ),
    "neon": [
        *_PAIRS,
        *_several(8, _smlal, "smlal", data="int16", lanes=8, depth=1, multiplies=2, weights="int16"),
        *_several(4, _fmla, "fmla", data="float32", lanes=4, depth=1, multiplies=1, weights="float32", sums="float32"),
    ],
}
DOTS: dict[str, list[Dot]] = {feature: [dot for dot, _ in found] for feature, found in _ALL.items()}

STEPS: dict[str, Step] = {dot.name: step for found in _ALL.values() for dot, step in found}

NARROW = {dot.name: NarrowSums(8, few_bit_products, pairs_added) for dot, _ in _PAIRS}
"""The intrinsics whose products can be added in int16 first, by name."""

FEW = {
    dot.name: replace(dot, name=f"{dot.name}_few", multiplies=2.5)
    for dot, _ in _PAIRS
    if dot.steps % _STEPS_AT_ONCE == 0
}
"""What adds the products of two steps in int16, by the name of the intrinsic in whose place."""


def _register() -> None:
    for dot in FEW.values():
        TensorIntrin.register(dot.name, steps_desc(dot), _by_lanes(dot, _few_at_once, _STEPS_AT_ONCE))
    for found in _ALL.values():
        for dot, step in found:
            TensorIntrin.register(dot.name, steps_desc(dot), _by_lanes(dot, step))


_register()
