"""AVX2, AVX-512 and VNNI: dot products of four (or, of signed data, two) int8 pairs per int32 lane."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import dot2_desc, dot4_desc, with_short_stack, words_desc


def _maddubs(lanes: int, maddubs: str, maddwd: str) -> tirx.PrimFunc:
    """Data uint8 (0..127): pairs to int16 without saturation (2 · 127 · 127 < 2^15), then to int32."""
    n8, n16 = lanes * 4, lanes * 2
    bytes_type, words_type, sums_type = f"int8x{n8}", f"int16x{n16}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], dtype=sums_type) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(maddwd),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id(maddubs),
                    T.reinterpret(
                        T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), lanes),
                        dtype=bytes_type,
                    ),
                    B.vload([0, 0], dtype=bytes_type),
                    dtype=words_type,
                ),
                T.broadcast(T.int16(1), n16),
                dtype=sums_type,
            )

    return impl


def _maddwd(lanes: int, weights: str, maddwd: str) -> tirx.PrimFunc:
    """Data of int16, or int8 already widened to it, on AVX2 and AVX-512: pairs of products, exact in int32."""
    n16 = lanes * 2
    loaded_type, words_type, sums_type = f"{weights}x{n16}", f"int16x{n16}", f"int32x{lanes}"

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((2,), "int16", offset_factor=1),
        B: T.Buffer((lanes, 2), weights, offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = C.vload([0], dtype=sums_type) + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(maddwd),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "int16x2"), dtype="int32"), lanes), dtype=words_type
                ),
                T.cast(B.vload([0, 0], dtype=loaded_type), words_type),
                dtype=sums_type,
            )

    return impl


def _vpdpbusd(lanes: int) -> tirx.PrimFunc:
    """Data uint8 on AVX-512 VNNI. LLVM types the byte operands as int8."""
    intrinsic, sums_type, bytes_type = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}", f"int32x{lanes}", f"int8x{4 * lanes}"

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            C[T.ramp(T.int32(0), 1, lanes)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id(intrinsic),
                C.vload([0], dtype=sums_type),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), lanes), dtype=bytes_type
                ),
                B.vload([0, 0], dtype=bytes_type),
                dtype=sums_type,
            )

    return impl


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
    TensorIntrin.register("nnfuze_dot4_vnni_u8", dot4_desc(16, "uint8"), _vpdpbusd(16))
    TensorIntrin.register("nnfuze_dot4_vnni256_u8", dot4_desc(8, "uint8"), _vpdpbusd(8))
    TensorIntrin.register(
        "nnfuze_dot4_avx512_u8",
        dot4_desc(16, "uint8"),
        _maddubs(16, "llvm.x86.avx512.pmaddubs.w.512", "llvm.x86.avx512.pmaddw.d.512"),
    )
    TensorIntrin.register(
        "nnfuze_dot4_avx2_u8",
        dot4_desc(8, "uint8"),
        _maddubs(8, "llvm.x86.avx2.pmadd.ub.sw", "llvm.x86.avx2.pmadd.wd"),
    )
    TensorIntrin.register("nnfuze_dot2_avx2_i8", dot2_desc(8), _maddwd(8, "int8", "llvm.x86.avx2.pmadd.wd"))
    TensorIntrin.register("nnfuze_dot2_avx512_i8", dot2_desc(16), _maddwd(16, "int8", "llvm.x86.avx512.pmaddw.d.512"))
    TensorIntrin.register("nnfuze_dot16_avx2", words_desc(8), _maddwd(8, "int16", "llvm.x86.avx2.pmadd.wd"))
    TensorIntrin.register("nnfuze_dot16_avx512", words_desc(16), _maddwd(16, "int16", "llvm.x86.avx512.pmaddw.d.512"))


with_short_stack(_register)
