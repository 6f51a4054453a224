"""Rows of a matrix side by side: what dot products want of a right-hand side that is computed, in whole vectors."""

from __future__ import annotations

from functools import cache

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T


@cache
def interleaving(dtype: str, rows: int, lanes: int) -> str:
    """Return the name of the intrinsic that copies ``source[rows, lanes]`` to ``packed[lanes, rows]``."""
    name = f"nnfuze_interleave_{dtype}_{rows}x{lanes}"
    TensorIntrin.register(
        name, _function(dtype, rows, lanes, vectors=False), _function(dtype, rows, lanes, vectors=True)
    )
    return name


def _function(dtype: str, rows: int, lanes: int, *, vectors: bool) -> tirx.PrimFunc:
    """Return the copy number by number, or as one shuffle of all rows."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            a, b = (T.arg(name, T.handle()) for name in "ab")
            source = T.match_buffer(a, (rows, lanes), dtype, offset_factor=1, strides=[T.int32(), 1])
            packed = T.match_buffer(b, (lanes, rows), dtype, offset_factor=1)
            with T.sblock("root"):
                T.reads(source[0:rows, 0:lanes])
                T.writes(packed[0:lanes, 0:rows])
                if vectors:
                    loaded = [source.vload([row, 0], f"{dtype}x{lanes}") for row in range(rows)]
                    order = [row * lanes + lane for lane in range(lanes) for row in range(rows)]
                    T.buffer_store(packed, tirx.Shuffle(loaded, order), [0, T.ramp(T.int32(0), 1, lanes * rows)])
                else:
                    with T.grid(lanes, rows) as (lane, row), T.sblock("copy"):
                        k, i = T.axis.spatial(rows, row), T.axis.spatial(lanes, lane)
                        T.buffer_store(packed, source[k, i], [i, k])
    return builder.get()
