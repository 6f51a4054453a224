"""AVX2, AVX-512 and VNNI: dot products of four (or, of signed data, two) int8 pairs per int32 lane."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import (
    Dot,
    NarrowSums,
    Step,
    products_desc,
    steps_desc,
    sums_of_products,
)


def _wide(data: Any, lanes: int, dtype: str) -> Any:
    """Return four bytes of data in every lane of 32 bits."""
    return T.reinterpret(T.broadcast(T.reinterpret(data, dtype="int32"), lanes), dtype=dtype)


def maddubs(lanes: int, bytes_name: str, words_name: str, sign_name: str = "") -> tuple[Step, NarrowSums]:
    """Pairs of products in int16, then in int32, or first many of them in int16.

    Data are uint8 (0..127: 2 · 127 · 127 < 2^15, so pairs don't saturate), or int8, whose sign goes to the weights.
    """
    bytes_type, words_type, sums_type = f"int8x{4 * lanes}", f"int16x{2 * lanes}", f"int32x{lanes}"

    def pairs(data: Any, weights: Any) -> Any:
        wide = _wide(data, lanes, bytes_type)
        if sign_name:
            wide, weights = (T.call_llvm_pure_intrin(bytes_type, sign_name, own, wide) for own in (wide, weights))
        return T.call_llvm_pure_intrin(words_type, bytes_name, wide, weights)

    def widen(words: Any) -> Any:
        return T.call_llvm_pure_intrin(sums_type, words_name, words, T.broadcast(T.int16(1), 2 * lanes))

    def step(total: Any, data: Any, weights: Any, _: int = 0) -> Any:
        return total + widen(pairs(data, weights))

    def multiply(narrow: Any | None, data: Any, weights: Any, _: int = 0) -> Any:
        return pairs(data, weights) if narrow is None else narrow + pairs(data, weights)

    return step, NarrowSums(2 * lanes, multiply, widen)


def maddwd(lanes: int, name: str) -> Step:
    """Data of int16, or int8 already widened to it, on AVX2 and AVX-512: pairs of products, exact in int32."""
    words_type, sums_type = f"int16x{2 * lanes}", f"int32x{lanes}"

    def step(total: Any, data: Any, weights: Any, _: int = 0) -> Any:
        wide = T.cast(weights, words_type)
        return total + T.call_llvm_pure_intrin(sums_type, name, _wide(data, lanes, words_type), wide)

    return step


def vpdpbusd(lanes: int) -> Step:
    """Data uint8 on AVX-512 VNNI, exact for all of them. LLVM types the byte operands as int8."""
    name, sums_type, bytes_type = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", f"int32x{lanes}", f"int8x{4 * lanes}"

    def step(total: Any, data: Any, weights: Any, _: int = 0) -> Any:
        return T.call_llvm_pure_intrin(sums_type, name, total, _wide(data, lanes, bytes_type), weights)

    return step


def _implementation(step: Step, lanes: int, depth: int, data: str, weights: str) -> tirx.PrimFunc:
    """Return the implementation of an intrinsic of one step: data (depth,), weights (lanes, depth), sums (lanes,)."""
    with IRBuilder() as builder:
        with sums_of_products(lanes, depth, data, weights) as (own, matrix, sums):
            numbers = (own.vload([0], f"{data}x{depth}"), matrix.vload([0, 0], f"{weights}x{lanes * depth}"))
            total = step(sums.vload([0], f"int32x{lanes}"), *numbers)
            T.buffer_store(sums, total, [T.ramp(T.int32(0), 1, lanes)])
    return builder.get()


def _implementation_of_two(dot: Dot, narrow: NarrowSums) -> tirx.PrimFunc:
    """Return the implementation of an intrinsic of two steps, whose products are added in int16 first."""
    number = f"{dot.weights}x{dot.lanes * dot.depth}"
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            a, b, c = (T.arg(name, T.handle()) for name in "abc")
            data = T.match_buffer(a, (dot.steps * dot.depth,), dot.data, offset_factor=1)
            strides = [T.int32(), dot.depth, 1]
            weights = T.match_buffer(b, dot.packed, dot.weights, offset_factor=1, strides=strides)
            sums = T.match_buffer(c, (dot.lanes,), dot.sums, offset_factor=1)
            with T.sblock("root"):
                whole = tuple(slice(0, extent) for extent in dot.packed)
                T.reads(sums[0 : dot.lanes], data[0 : dot.steps * dot.depth], weights[whole])
                T.writes(sums[0 : dot.lanes])
                words = None
                for step in range(dot.steps):
                    own = data.vload([dot.depth * step], f"{dot.data}x{dot.depth}")
                    words = narrow.multiply(words, own, weights.vload([step, 0, 0], number))
                total = sums.vload([0], f"{dot.sums}x{dot.lanes}") + narrow.widen(words)
                T.buffer_store(sums, total, [T.ramp(T.int32(0), 1, dot.lanes)])
    return builder.get()


# (feature, dtype of the data, name, lanes, depth, multiplications, dtype of the widened data), best first. Signed data
# are multiplied as int16: moving their sign to the weights for the 8-bit multiply takes an instruction per product.
DOTS = (
    ("avx512vnni", "uint8", "nnfuze_dot4_vnni_u8", 16, 4, 1, "uint8"),
    # All CPUs with VNNI have its short form, too (AVX-512VL): for channels that fill no long vector.
    ("avx512vnni", "uint8", "nnfuze_dot4_vnni256_u8", 8, 4, 1, "uint8"),
    ("avx512bw", "uint8", "nnfuze_dot4_avx512_u8", 16, 4, 2, "uint8"),
    ("avx512bw", "int8", "nnfuze_dot2_avx512_i8", 16, 2, 1, "int16"),
    ("avx2", "uint8", "nnfuze_dot4_avx2_u8", 8, 4, 2, "uint8"),
    ("avx2", "int8", "nnfuze_signs_8", 8, 4, 3, "int8"),
    ("avx2", "int8", "nnfuze_dot2_avx2_i8", 8, 2, 1, "int16"),
)
# Of these, what is worth it only for small weights, see `NARROW`.
FOR_SMALL = ("nnfuze_signs_8",)


# Features whose dot products take all values of uint8.
ANY_UNSIGNED = ("avx512vnni",)


# (feature, name, lanes) of the int16 pairs' instruction, best first.
WORDS = (
    ("avx512bw", "nnfuze_dot16_avx512", 16),
    ("avx2", "nnfuze_dot16_avx2", 8),
)


_MADDWD = {4: "llvm.x86.sse2.pmadd.wd", 8: "llvm.x86.avx2.pmadd.wd", 16: "llvm.x86.avx512.pmaddw.d.512"}
# (feature, lanes, LLVM's name of the multiplication, and of what moves a sign) of the products of signed data whose
# sign moves to the weights: an instruction more, which pays where weights are read once, so that half the bytes and no
# widening count.
_SIGNS = (
    ("avx2", 8, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.psign.b"),
    ("ssse3", 4, "llvm.x86.ssse3.pmadd.ub.sw.128", "llvm.x86.ssse3.psign.b.128"),
)
SIGNED = tuple((feature, Dot(f"nnfuze_signs_{lanes}", lanes, 4, 3, "int8")) for feature, lanes, *_ in _SIGNS)
_BYTES = {
    **{f"nnfuze_signs_{lanes}": maddubs(lanes, name, _MADDWD[lanes], sign) for _, lanes, name, sign in _SIGNS},
    "nnfuze_dot4_avx512_u8": maddubs(16, "llvm.x86.avx512.pmaddubs.w.512", _MADDWD[16]),
    "nnfuze_dot4_avx2_u8": maddubs(8, "llvm.x86.avx2.pmadd.ub.sw", _MADDWD[8]),
}
STEPS: dict[str, Step] = {
    **{name: step for name, (step, _) in _BYTES.items()},
    "nnfuze_dot4_vnni_u8": vpdpbusd(16),
    "nnfuze_dot4_vnni256_u8": vpdpbusd(8),
    "nnfuze_dot2_avx512_i8": maddwd(16, _MADDWD[16]),
    "nnfuze_dot2_avx2_i8": maddwd(8, _MADDWD[8]),
    "nnfuze_dot16_avx512": maddwd(16, _MADDWD[16]),
    "nnfuze_dot16_avx2": maddwd(8, _MADDWD[8]),
}
"""What each intrinsic adds to its sums: of data of as many numbers as it has products per lane, and packed weights."""

NARROW = {name: narrow for name, (_, narrow) in _BYTES.items()}
"""The intrinsics whose products can be added in int16 first, by name."""

# Of signed data this gains nothing: signs take as long as what it spares.
FEW = {
    name: Dot(f"{name}_2", lanes, 4, 1.5, "uint8", steps=2)
    for name, lanes in (("nnfuze_dot4_avx512_u8", 16), ("nnfuze_dot4_avx2_u8", 8))
}
"""What adds the products of two steps in int16, by the name of the intrinsic in whose place."""


def _register() -> None:
    for name, dot in FEW.items():
        TensorIntrin.register(dot.name, steps_desc(dot), _implementation_of_two(dot, NARROW[name]))
    for _, dtype, name, lanes, depth, _, taken_as in DOTS:
        narrow = dtype if taken_as != dtype else None
        desc = products_desc(lanes, depth, taken_as, "int8", narrow=narrow)
        TensorIntrin.register(name, desc, _implementation(STEPS[name], lanes, depth, taken_as, "int8"))
    for _, name, lanes in WORDS:
        desc = products_desc(lanes, 2, "int16", "int16")
        TensorIntrin.register(name, desc, _implementation(STEPS[name], lanes, 2, "int16", "int16"))


_register()
