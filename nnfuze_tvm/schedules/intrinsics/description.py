"""What the instruction sets share: what a dot product computes, and how its TVMScript is read quickly."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

from tvm import tirx
from tvm.script import tirx as T


def dot4_desc(lanes: int, dtype: str) -> tirx.PrimFunc:
    """Return what a dot4 intrinsic computes: data (4,), weights (lanes, 4) int8, accumulators (lanes,) int32."""

    @T.prim_func(s_tir=True)
    def desc(
        A: T.Buffer((4,), dtype, offset_factor=1),
        B: T.Buffer((lanes, 4), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:4], B[0:lanes, 0:4])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 4):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return desc


def dot2_desc(lanes: int) -> tirx.PrimFunc:
    """Return what a dot2 intrinsic computes: int8 data (2,) widened to int16, weights (lanes, 2) int8, int32 sums."""

    @T.prim_func(s_tir=True)
    def desc(
        A: T.Buffer((2,), "int16", offset_factor=1),
        B: T.Buffer((lanes, 2), "int8", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 2):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(T.cast(A[vk], "int8"), "int32") * T.cast(B[vi, vk], "int32")

    return desc


def words_desc(lanes: int) -> tirx.PrimFunc:
    """Return what a pair of int16 products computes: data (2,), weights (lanes, 2), accumulators (lanes,) int32."""

    @T.prim_func(s_tir=True)
    def desc(
        A: T.Buffer((2,), "int16", offset_factor=1),
        B: T.Buffer((lanes, 2), "int16", offset_factor=1),
        C: T.Buffer((lanes,), "int32", offset_factor=1),
    ) -> None:
        with T.sblock("root"):
            T.reads(C[0:lanes], A[0:2], B[0:lanes, 0:2])
            T.writes(C[0:lanes])
            for i in T.serial(0, lanes):
                for k in T.serial(0, 2):
                    with T.sblock("update"):
                        vi, vk = T.axis.remap("SR", [i, k])
                        C[vi] = C[vi] + T.cast(A[vk], "int32") * T.cast(B[vi, vk], "int32")

    return desc


def with_short_stack(function: Callable[[], None]) -> None:
    """Call ``function`` in a thread of its own and wait for it.

    TVMScript's parser inspects every frame of the call stack for every function it reads. Below a dozen nested
    imports that takes seconds, in a new thread some milliseconds.
    """
    with ThreadPoolExecutor(1) as executor:
        executor.submit(function).result()
