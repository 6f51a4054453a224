"""AVX2, AVX-512 and VNNI: dot products of four (or, of signed data, two) int8 pairs per int32 lane."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import products_desc, sums_of_products

# An expression of TVM's of several lanes.
Vector = Any


def _implementation(
    lanes: int, depth: int, data: str, weights: str, total: Callable[[Vector, Vector, Vector], Vector]
) -> tirx.PrimFunc:
    """Return what computes ``total`` of the sums, the data in 32 bits for every lane, and the weights."""
    with IRBuilder() as builder:
        with sums_of_products(lanes, depth, data, weights) as (factors, packed, sums):
            word = T.reinterpret("int32", factors.vload([0], f"{data}x{depth}"))
            loaded = packed.vload([0, 0], f"{weights}x{lanes * depth}")
            new = total(sums.vload([0], f"int32x{lanes}"), T.broadcast(word, lanes), loaded)
            T.buffer_store(sums, new, [T.ramp(T.int32(0), 1, lanes)])
    return builder.get()


def _call(name: str, dtype: str, *args: Vector) -> Vector:
    return T.call_llvm_pure_intrin(dtype, f"llvm.x86.{name}", *args)


def _maddubs(lanes: int, maddubs: str, maddwd: str) -> tirx.PrimFunc:
    """Data uint8 (0..127): pairs to int16 without saturation (2 · 127 · 127 < 2^15), then to int32."""

    def total(sums: Vector, data: Vector, weights: Vector) -> Vector:
        words = _call(maddubs, f"int16x{lanes * 2}", T.reinterpret(f"int8x{lanes * 4}", data), weights)
        return sums + _call(maddwd, f"int32x{lanes}", words, T.broadcast(T.int16(1), lanes * 2))

    return _implementation(lanes, 4, "uint8", "int8", total)


def _maddwd(lanes: int, weights_type: str, maddwd: str) -> tirx.PrimFunc:
    """Data of int16, or int8 already widened to it, on AVX2 and AVX-512: pairs of products, exact in int32."""
    words = f"int16x{lanes * 2}"

    def total(sums: Vector, data: Vector, weights: Vector) -> Vector:
        return sums + _call(maddwd, f"int32x{lanes}", T.reinterpret(words, data), T.cast(weights, words))

    return _implementation(lanes, 2, "int16", weights_type, total)


def _vpdpbusd(lanes: int) -> tirx.PrimFunc:
    """Data uint8 on AVX-512 VNNI. LLVM types the byte operands as int8."""

    def total(sums: Vector, data: Vector, weights: Vector) -> Vector:
        name = f"avx512.vpdpbusd.{32 * lanes}"
        return _call(name, f"int32x{lanes}", sums, T.reinterpret(f"int8x{lanes * 4}", data), weights)

    return _implementation(lanes, 4, "uint8", "int8", total)


# (feature, dtype of the data, name, lanes, depth, multiplications, dtype of the widened data), best first. Signed data
# are multiplied as int16: moving their sign to the weights for the 8-bit multiply takes an instruction per product.
DOTS = (
    ("avx512vnni", "uint8", "nnfuze_dot4_vnni_u8", 16, 4, 1, "uint8"),
    # All CPUs with VNNI have its short form, too (AVX-512VL): for channels that fill no long vector.
    ("avx512vnni", "uint8", "nnfuze_dot4_vnni256_u8", 8, 4, 1, "uint8"),
    ("avx512bw", "uint8", "nnfuze_dot4_avx512_u8", 16, 4, 2, "uint8"),
    ("avx512bw", "int8", "nnfuze_dot2_avx512_i8", 16, 2, 1, "int16"),
    ("avx2", "uint8", "nnfuze_dot4_avx2_u8", 8, 4, 2, "uint8"),
    ("avx2", "int8", "nnfuze_dot2_avx2_i8", 8, 2, 1, "int16"),
)

# Features whose dot products take all values of uint8.
ANY_UNSIGNED = ("avx512vnni",)


# (feature, name, lanes) of the int16 pairs' instruction, best first.
WORDS = (
    ("avx512bw", "nnfuze_dot16_avx512", 16),
    ("avx2", "nnfuze_dot16_avx2", 8),
)


def _register() -> None:
    TensorIntrin.register("nnfuze_dot4_vnni_u8", products_desc(16, 4, "uint8", "int8"), _vpdpbusd(16))
    TensorIntrin.register("nnfuze_dot4_vnni256_u8", products_desc(8, 4, "uint8", "int8"), _vpdpbusd(8))
    TensorIntrin.register(
        "nnfuze_dot4_avx512_u8",
        products_desc(16, 4, "uint8", "int8"),
        _maddubs(16, "avx512.pmaddubs.w.512", "avx512.pmaddw.d.512"),
    )
    TensorIntrin.register(
        "nnfuze_dot4_avx2_u8",
        products_desc(8, 4, "uint8", "int8"),
        _maddubs(8, "avx2.pmadd.ub.sw", "avx2.pmadd.wd"),
    )
    TensorIntrin.register(
        "nnfuze_dot2_avx2_i8", products_desc(8, 2, "int16", "int8", narrow="int8"), _maddwd(8, "int8", "avx2.pmadd.wd")
    )
    TensorIntrin.register(
        "nnfuze_dot2_avx512_i8",
        products_desc(16, 2, "int16", "int8", narrow="int8"),
        _maddwd(16, "int8", "avx512.pmaddw.d.512"),
    )
    TensorIntrin.register(
        "nnfuze_dot16_avx2", products_desc(8, 2, "int16", "int16"), _maddwd(8, "int16", "avx2.pmadd.wd")
    )
    TensorIntrin.register(
        "nnfuze_dot16_avx512", products_desc(16, 2, "int16", "int16"), _maddwd(16, "int16", "avx512.pmaddw.d.512")
    )


_register()
