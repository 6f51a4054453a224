"""Numbers of 4 bits, two in a byte: how a bundle's file has them, and the kernel that makes int8 of them."""

from __future__ import annotations

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

# Fewer are not worth a call.
_LEAST = 1024
_LOWEST, _HIGHEST = -8, 7


def packed(array: np.ndarray) -> np.ndarray | None:
    """Return int8 numbers as ``[1, n / 2]`` bytes; None if they are others, or an odd number of them, or few.

    The first half of the numbers is in the lower four bits, the second in the upper ones.
    """
    if array.dtype != np.int8 or array.size < _LEAST or array.size % 2:
        return None
    if array.min() < _LOWEST or array.max() > _HIGHEST:
        return None
    low, high = array.reshape(2, -1).astype("uint8") & 15
    return (low | high << 4)[None]


def prim_func() -> tirx.PrimFunc:
    """Return the PrimFunc ``(bytes [1, n], numbers [2, n])`` of the way back, for any n."""
    with IRBuilder() as builder:
        with T.prim_func(is_private=True, s_tir=True):
            T.func_name("whole_bytes")
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            size = tirx.Var("n", "int64")
            one, two = (tirx.IntImm("int64", n) for n in (1, 2))
            halves = T.arg("halves", T.Buffer([one, size], "uint8"))
            out = T.arg("out", T.Buffer([two, size], "int8"))
            with T.sblock("root"), T.grid(two, size) as loops, T.sblock("number"):
                half = T.axis.spatial(two, loops[0], dtype="int64")
                x = T.axis.spatial(size, loops[1], dtype="int64")
                T.reads(halves[0, x])
                T.writes(out[half, x])
                number = T.shift_right(halves[0, x], T.cast(half * 4, "uint8"))
                # The fourth bit is the sign.
                signed = T.cast(T.bitwise_xor(T.bitwise_and(number, T.uint8(15)), T.uint8(8)), "int8") - T.int8(8)
                T.buffer_store(out, signed, [half, x])
    return builder.get()
