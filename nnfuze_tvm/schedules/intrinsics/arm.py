"""AArch64 with the dot-product extension: four int8 pairs per int32 lane."""

from __future__ import annotations

from tvm import tirx
from tvm.s_tir import TensorIntrin
from tvm.script import tirx as T

from nnfuze_tvm.schedules.intrinsics.description import dot4_desc, with_short_stack


def _sdot(dtype: str) -> tirx.PrimFunc:
    """Return sdot on int8 data; uint8 data hold values up to 127 and so are int8 as well."""

    @T.prim_func(s_tir=True)
    def impl(
        A: T.Buffer((4,), dtype, offset_factor=1),
        B: T.Buffer((4, 4), "int8", offset_factor=1),
        C: T.Buffer((4,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:4], A[0:4], B[0:4, 0:4])
            T.writes(C[0:4])
            C[T.ramp(T.int32(0), 1, 4)] = T.call_llvm_pure_intrin(
                T.llvm_lookup_intrinsic_id("llvm.aarch64.neon.sdot"),
                C.vload([0], dtype="int32x4"),
                B.vload([0, 0], dtype="int8x16"),
                T.reinterpret(
                    T.broadcast(T.reinterpret(A.vload([0], dtype + "x4"), dtype="int32"), 4), dtype="int8x16"
                ),
                dtype="int32x4",
            )

    return impl


# (feature, dtype of the data, name, lanes, depth, multiplications, dtype of the widened data), best first.
DOTS = (
    ("dotprod", "uint8", "nnfuze_dot4_sdot_u8", 4, 4, 1, "uint8"),
    ("dotprod", "int8", "nnfuze_dot4_sdot_i8", 4, 4, 1, "int8"),
)


def _register() -> None:
    TensorIntrin.register("nnfuze_dot4_sdot_u8", dot4_desc(4, "uint8"), _sdot("uint8"))
    TensorIntrin.register("nnfuze_dot4_sdot_i8", dot4_desc(4, "int8"), _sdot("int8"))


with_short_stack(_register)
