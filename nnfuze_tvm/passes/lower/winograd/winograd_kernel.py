"""The computation of a Winograd convolution F(m×m, 3×3) as one PrimFunc.

A tile of m×m outputs takes (m+2)² products per pair of channels instead of 9m²: the tile's data and the weights are
evaluated at m+1 points and at infinity in both directions, multiplied point by point, and interpolated [1]_. m = 2
uses the points 0, ±1: only additions. m = 4 uses 0, ±√½, ±√2: the products ±a·b = ±1 save multiplications, the
squares ½ and 2 are exact, and in float32 the error is half of what the customary 0, ±1, ±2 give (about five times
a direct convolution's). Integers are evaluated at those, in int16; `winograd_weights` says what makes that exact.

.. [1] A. Lavin and S. Gray, "Fast Algorithms for Convolutional Neural Networks", CVPR 2016.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import sqrt
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.integers import modulo

Values = list[Any]

# The points other than 0 and infinity are ±A and ±B for m = 4 and ±1 for m = 2; see `winograd_weights`.
_A, _B = sqrt(0.5), sqrt(2.0)
# 9 times this is 1 modulo 2^32.
_NINTH = 954437177
# By how many bits rows and columns of `_sum_4_whole` are too large, beside three times.
_BITS_4 = (3, 2, 1, 1)
# More tiles than this are rounded up to a multiple.
_ROUND = 4


@dataclass(frozen=True)
class Shape:
    """What a kernel computes: ``n`` images of ``height × width × channels``, zeros around, to ``outputs`` channels.

    ``pad`` is top, left, bottom, right; ``m`` is the edge of an output tile: 2 or 4; ``dtype`` is the data's: float32,
    int8 or uint8 (values up to 127), or with m = 2 float16; output channels are computed in vectors of ``lanes``.
    """

    n: int
    height: int
    width: int
    channels: int
    outputs: int
    pad: tuple[int, int, int, int]
    m: int
    dtype: str = "float32"
    lanes: int = 1

    @property
    def whole(self) -> bool:
        """Whether the data are integers."""
        return "int" in self.dtype

    @property
    def computed(self) -> int:
        """Output channels of the weights and the products: whole vectors, the last of zeros."""
        return -(-self.outputs // self.lanes) * self.lanes

    @property
    def out_height(self) -> int:
        """Rows of the result."""
        return self.height + self.pad[0] + self.pad[2] - 2

    @property
    def out_width(self) -> int:
        """Columns of the result."""
        return self.width + self.pad[1] + self.pad[3] - 2

    @property
    def points(self) -> int:
        """Products per tile and pair of channels."""
        return (self.m + 2) ** 2

    @property
    def tile_rows(self) -> int:
        """Rows of tiles per image."""
        return -(-self.out_height // self.m)

    @property
    def tile_cols(self) -> int:
        """Columns of tiles per image."""
        return -(-self.out_width // self.m)

    @property
    def tiles(self) -> int:
        """Tiles per image."""
        return self.tile_rows * self.tile_cols

    @property
    def padded_tiles(self) -> int:
        """Tiles per image that are computed: their number has divisors that make good register tiles."""
        return self.tiles if self.tiles <= _ROUND else -(-self.tiles // _ROUND) * _ROUND


def prim_func(shape: Shape) -> tirx.PrimFunc:
    """Return the PrimFunc ``(data NHWC, transformed weights, result NHWC)`` of a convolution, int32 of integers.

    The weights have ``shape.computed`` outputs.

    Its blocks are ``winograd_data``, ``winograd_product``, ``winograd_sum`` and ``winograd_crop``; the schedule
    rule of that name takes it, with the elementwise operators that follow it fused behind ``winograd_crop``.
    The transforms are blocks over (tile, channel) that handle the whole tile, so that common subexpressions are
    computed once; their first iterator, of extent 1, stands for the tile's own axes.
    """
    s, m, edge = shape, shape.m, shape.m + 2
    tiles = s.padded_tiles
    factor, result = ("int16", "int32") if s.whole else (s.dtype, s.dtype)
    data_1d, sum_1d = _TRANSFORMS[m, s.whole]
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name(f"winograd{m}x{m}_conv2d")
            T.func_attr({"op_pattern": 4, "tirx.noalias": True})
            data = T.arg("data", _buffer((s.n, s.height, s.width, s.channels), s.dtype))
            weights = T.arg("weights", _buffer((s.points, s.computed, s.channels), factor))
            out = T.arg("out", _buffer((s.n, s.out_height, s.out_width, s.outputs), result))
            with T.sblock("root"):
                at_points = T.sblock_alloc_buffer(_dims((s.points, s.n, tiles, s.channels)), factor, layout=None)
                product = T.sblock_alloc_buffer(_dims((s.points, s.n, tiles, s.computed)), result, layout=None)
                total = T.sblock_alloc_buffer(_dims((s.n, tiles, m, m, s.outputs)), result, layout=None)
                with _grid(1, s.n, tiles, s.channels) as loops, T.sblock("winograd_data"):
                    z, n, t, c = _spatial((1, s.n, tiles, s.channels), loops)
                    T.reads(data[n, 0 : s.height, 0 : s.width, c])
                    T.writes(at_points[z * s.points : z * s.points + s.points, n, t, c])
                    values = _separably(data_1d, _load(data, s, n, t, c))
                    for i, value in enumerate(v for row in values for v in row):
                        T.buffer_store(at_points, value, [z * s.points + i, n, t, c])
                with _grid(s.points, s.n, tiles, s.computed, s.channels) as loops, T.sblock("winograd_product"):
                    p, n, t, o = _spatial((s.points, s.n, tiles, s.computed), loops[:4])
                    c = T.axis.reduce(*_dims([s.channels]), loops[4], dtype="int64")
                    T.reads(at_points[p, n, t, c], weights[p, o, c])
                    T.writes(product[p, n, t, o])
                    with T.init():
                        T.buffer_store(product, tirx.const(0, result), [p, n, t, o])
                    value = _widen(at_points[p, n, t, c], result) * _widen(weights[p, o, c], result)
                    T.buffer_store(product, product[p, n, t, o] + value, [p, n, t, o])
                with _grid(1, s.n, tiles, s.outputs) as loops, T.sblock("winograd_sum"):
                    z, n, t, o = _spatial((1, s.n, tiles, s.outputs), loops)
                    # More than is read where not all are: so all are computed, in whole vectors.
                    own = slice(0, s.computed) if s.computed > s.outputs else o
                    T.reads(product[0 : s.points, n, t, own])
                    T.writes(total[n, t, z * m : z * m + m, z * m : z * m + m, o])
                    loaded = [[T.bind(product[i * edge + j, n, t, o]) for j in range(edge)] for i in range(edge)]
                    for i, row in enumerate(_separably(sum_1d, loaded)):
                        for j, value in enumerate(row):
                            value = _without_factor(value, m, i, j) if s.whole else value
                            T.buffer_store(total, value, [n, t, z * m + i, z * m + j, o])
                with _grid(s.n, s.out_height, s.out_width, s.outputs) as loops, T.sblock("winograd_crop"):
                    n, y, x, o = _spatial((s.n, s.out_height, s.out_width, s.outputs), loops)
                    value = total[n, y // m * s.tile_cols + x // m, y % m, x % m, o]
                    T.reads(value)
                    T.writes(out[n, y, x, o])
                    T.buffer_store(out, value, [n, y, x, o])
    return builder.get()


def _widen(value: tirx.PrimExpr, dtype: str) -> tirx.PrimExpr:
    return T.cast(value, dtype) if dtype == "int32" else value


def _buffer(shape: tuple[int, ...], dtype: str) -> Any:
    """Return a buffer of the type that operators' own PrimFuncs have."""
    return T.Buffer(_dims(shape), dtype, layout=None)


def _dims(shape: Sequence[int]) -> list[tirx.IntImm]:
    return [tirx.IntImm("int64", extent) for extent in shape]


def _grid(*extents: int) -> Any:
    return T.grid(*_dims(extents))


def _spatial(extents: Sequence[int], loops: Sequence[tirx.Var]) -> Values:
    return [T.axis.spatial(extent, loop, dtype="int64") for extent, loop in zip(_dims(extents), loops, strict=True)]


def _load(data: Any, s: Shape, n: tirx.Var, t: tirx.Var, c: tirx.Var) -> list[Values]:
    """Load the (m+2)² pixels of tile ``t``, zeros outside the image; what is always inside has no condition."""
    top, left = t // s.tile_cols * s.m - s.pad[0], t % s.tile_cols * s.m - s.pad[1]
    last_top, last_left = (s.tile_rows - 1) * s.m - s.pad[0], (s.tile_cols - 1) * s.m - s.pad[1]
    grid = []
    for dy in range(s.m + 2):
        row = []
        for dx in range(s.m + 2):
            inside = [t < s.tiles] if s.padded_tiles > s.tiles else []
            inside += [top + dy >= 0] if dy < s.pad[0] else []
            inside += [top + dy < s.height] if last_top + dy >= s.height else []
            inside += [left + dx >= 0] if dx < s.pad[1] else []
            inside += [left + dx < s.width] if last_left + dx >= s.width else []
            value = data[n, top + dy, left + dx, c]
            if s.whole:
                value = T.cast(value, "int16")
            if inside:
                zero = tirx.const(0, "int16" if s.whole else s.dtype)
                value = T.if_then_else(tirx.all(*inside), value, zero)
            row.append(T.bind(value))
        grid.append(row)
    return grid


def _separably(transform: Callable[[Values], Values], grid: list[Values]) -> list[Values]:
    """Apply a transform to the columns of a matrix, then to its rows; bind every value."""
    columns = [[T.bind(v) for v in transform(list(column))] for column in zip(*grid, strict=True)]
    return [transform(list(row)) for row in zip(*columns, strict=True)]


def _const(value: float) -> tirx.PrimExpr:
    return tirx.const(value, "float32")


def _data_2(d: Values) -> Values:
    return [d[0] - d[2], d[1] + d[2], d[2] - d[1], d[3] - d[1]]


def _sum_2(p: Values) -> Values:
    return [(p[0] + p[1]) + p[2], (p[1] - p[2]) + p[3]]


def _data_4(d: Values) -> Values:
    even_a, odd_a = T.bind(d[4] - _const(_B * _B) * d[2]), T.bind(d[3] - _const(_B * _B) * d[1])
    even_b, odd_b = T.bind(d[4] - _const(_A * _A) * d[2]), T.bind(d[3] - _const(_A * _A) * d[1])
    both = _const(_A * _A + _B * _B)
    return [
        (d[0] - both * d[2]) + d[4],
        even_a + _const(_A) * odd_a,
        even_a - _const(_A) * odd_a,
        even_b + _const(_B) * odd_b,
        even_b - _const(_B) * odd_b,
        (d[1] - both * d[3]) + d[5],
    ]


def _sum_4(p: Values) -> Values:
    sum_a, difference_a = T.bind(p[1] + p[2]), T.bind(p[1] - p[2])
    sum_b, difference_b = T.bind(p[3] + p[4]), T.bind(p[3] - p[4])
    return [
        (p[0] + sum_a) + sum_b,
        _const(_A) * difference_a + _const(_B) * difference_b,
        _const(_A**2) * sum_a + _const(_B**2) * sum_b,
        (_const(_A**3) * difference_a + _const(_B**3) * difference_b) + p[5],
    ]


def _sum_2_whole(p: Values) -> Values:
    """Return twice the sums, modulo 2^32."""
    return [modulo.add(modulo.add(p[0], p[1]), p[2]), modulo.add(modulo.subtract(p[1], p[2]), p[3])]


def _data_4_whole(d: Values) -> Values:
    two, four = tirx.const(2, "int16"), tirx.const(4, "int16")
    even_a, odd_a = T.bind(d[4] - d[2] * four), T.bind(d[3] - d[1] * four)
    even_b, odd_b = T.bind(d[4] - d[2]), T.bind(d[3] - d[1])
    twice = T.bind(odd_b * two)
    return [
        (d[0] - d[2]) * four + even_b,
        even_a + odd_a,
        even_a - odd_a,
        even_b + twice,
        even_b - twice,
        (d[5] - d[3]) - odd_b * four,
    ]


def _sum_4_whole(p: Values) -> Values:
    """Return 24, 12, 6 and 6 times the sums, modulo 2^32."""
    sum_a, difference_a = T.bind(modulo.add(p[1], p[2])), T.bind(modulo.subtract(p[1], p[2]))
    sum_b, difference_b = T.bind(modulo.add(p[3], p[4])), T.bind(modulo.subtract(p[3], p[4]))
    return [
        modulo.add(_twice(modulo.add(p[0], _twice(sum_a))), sum_b),
        modulo.add(_twice(difference_a), difference_b),
        modulo.add(sum_a, sum_b),
        modulo.add(difference_a, _twice(modulo.add(difference_b, p[5]))),
    ]


def _without_factor(value: tirx.PrimExpr, m: int, i: int, j: int) -> tirx.PrimExpr:
    """Return the sum at row i and column j of a tile; ``value`` is it times what the transforms left in it."""
    bits = 2
    if m == 4:
        bits = _BITS_4[i] + _BITS_4[j]
        value = modulo.multiply(value, tirx.const(_NINTH, "int32"))
    return T.shift_right(value, tirx.const(bits, "int32"))


def _twice(a: tirx.PrimExpr) -> tirx.PrimExpr:
    return modulo.add(a, a)


# What evaluates a row or column of data, and what interpolates one, by m and by whether numbers are whole.
_TRANSFORMS = {
    (2, False): (_data_2, _sum_2),
    (2, True): (_data_2, _sum_2_whole),
    (4, False): (_data_4, _sum_4),
    (4, True): (_data_4_whole, _sum_4_whole),
}
