"""AVX2, AVX-512 and VNNI: dot products of four int8 pairs per int32 lane."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import dot4_desc, with_short_stack


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


def _sign_maddubs() -> tirx.PrimFunc:
    """Data int8 on AVX2: the data's sign moves to the weights, so that vpmaddubsw sees |data| <= 128."""

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((4,), "int8", offset_factor=1),
        B: T.Buffer((8, 4), "int8", offset_factor=1),
        C: T.Buffer((8,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:8], A[0:4], B[0:8, 0:4])
            T.writes(C[0:8])
            data = T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], "int8x4"), dtype="int32"), 8), dtype="int8x32")
            C[T.ramp(T.int32(0), 1, 8)] = C.vload([0], dtype="int32x8") + T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.wd"),
                T.call_llvm_pure_intrin(
                    T.llvm_lookup_intrinsic_id("llvm.x86.avx2.pmadd.ub.sw"),
                    T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.x86.avx2.psign.b"), data, data, dtype="int8x32"
                    ),
                    T.call_llvm_pure_intrin(
                        T.llvm_lookup_intrinsic_id("llvm.x86.avx2.psign.b"),
                        B.vload([0, 0], dtype="int8x32"),
                        data,
                        dtype="int8x32",
                    ),
                    dtype="int16x16",
                ),
                T.broadcast(T.int16(1), 16),
                dtype="int32x8",
            )

    return impl


def _vpdpbusd() -> tirx.PrimFunc:
    """Data uint8 on AVX-512 VNNI. LLVM types the byte operands as int8x64."""

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((4,), "uint8", offset_factor=1),
        B: T.Buffer((16, 4), "int8", offset_factor=1),
        C: T.Buffer((16,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:16], A[0:4], B[0:16, 0:4])
            T.writes(C[0:16])
            C[T.ramp(T.int32(0), 1, 16)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.x86.avx512.vpdpbusd.512"),
                C.vload([0], dtype="int32x16"),
                T.reinterpret(T.broadcast(T.reinterpret(A.vload([0], "uint8x4"), dtype="int32"), 16), dtype="int8x64"),
                B.vload([0, 0], dtype="int8x64"),
                dtype="int32x16",
            )

    return impl


# (feature, dtype of the data, name, lanes, multiplications), best first. Signed data on AVX-512 take the AVX2 form: the
# instruction that moves a sign exists for 256 bits only.
DOT4 = (
    ("avx512vnni", "uint8", "nnfuze_dot4_vnni_u8", 16, 1),
    ("avx512bw", "uint8", "nnfuze_dot4_avx512_u8", 16, 2),
    ("avx2", "uint8", "nnfuze_dot4_avx2_u8", 8, 2),
    ("avx2", "int8", "nnfuze_dot4_avx2_i8", 8, 2),
)


def _register() -> None:
    TensorIntrin.register("nnfuze_dot4_vnni_u8", dot4_desc(16, "uint8"), _vpdpbusd())
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
    TensorIntrin.register("nnfuze_dot4_avx2_i8", dot4_desc(8, "int8"), _sign_maddubs())


with_short_stack(_register)
