"""What the instruction sets share: what a dot product computes, and how its TVMScript is read quickly."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script import tirx as T
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as B

Step = Callable[..., Any]
"""``(sums, data, packed weights, step) ->`` the sums after one step of an intrinsic, of vectors."""


@dataclass(frozen=True)
class Dot:
    """A registered tensor intrinsic.

    Attributes
    ----------
    name : str
        TVM's name of it.
    lanes : int
        The sums it adds to.
    depth : int
        Products per sum and step.
    multiplies : int
        Instructions on the multiply ports per step.
    data : str
        Dtype in which it takes the data; ``int16`` where int8 data are to be widened before.
    steps : int
        Steps of the reduction that it takes at once, from one vector of data.
    prepare : int
        Instructions that bring one step's data into order, whatever number of intrinsics uses them.
    paired : bool
        Packed weights hold the first two inputs of all lanes, then the next two, and not all inputs of the first lane.
    weights, sums : str
        Dtypes.
    rows : int
        Rows of data that the instruction takes; see ``row_pairs`` where it is 2. Per row, it is ``multiplies``.
    """

    name: str
    lanes: int
    depth: int
    multiplies: int
    data: str
    steps: int = 1
    prepare: int = 0
    paired: bool = False
    weights: str = "int8"
    sums: str = "int32"
    rows: int = 1

    @property
    def packed(self) -> tuple[int, ...]:
        """The shape of the weights of one use; between its steps lie those of other lanes."""
        if self.paired:
            return (self.steps, 1, self.depth // 2, self.lanes, 2)
        return (self.steps, self.lanes, self.depth) if self.depth > 1 else (self.steps, self.lanes)

    def place(self, product: tirx.PrimExpr, lane: tirx.PrimExpr) -> list[tirx.PrimExpr]:
        """Return where in the packed weights a product's factor of a lane is."""
        step, within = tirx.floordiv(product, self.depth), tirx.floormod(product, self.depth)
        if self.paired:
            return [step, 0, tirx.floordiv(within, 2), lane, tirx.floormod(within, 2)]
        return [step, lane, within] if self.depth > 1 else [product, lane]


def steps_desc(dot: Dot) -> tirx.PrimFunc:
    """Return what an intrinsic of several steps computes: data (steps · depth,), packed weights, sums (lanes,)."""
    numbers = dot.steps * dot.depth
    with IRBuilder() as builder:
        with B.prim_func(s_tir=True):
            a, b, c = (B.arg(name, B.handle()) for name in "abc")
            data = B.match_buffer(a, (numbers,), dot.data, offset_factor=1)
            weights = B.match_buffer(b, dot.packed, dot.weights, offset_factor=1)
            sums = B.match_buffer(c, (dot.lanes,), dot.sums, offset_factor=1)
            with B.sblock("root"):
                B.reads(sums[0 : dot.lanes], data[0:numbers], weights[tuple(slice(0, n) for n in dot.packed)])
                B.writes(sums[0 : dot.lanes])
                extents = [n for n in (dot.steps, dot.lanes, dot.depth) if n > 1]
                with B.grid(*extents) as loops, B.sblock("update"):
                    step, lane, within = loops if len(loops) == 3 else (*loops, 0) if dot.depth == 1 else (0, *loops)
                    i = B.axis.spatial(dot.lanes, lane)
                    k = B.axis.reduce(numbers, step * dot.depth + within)
                    product = B.cast(data[k], dot.sums) * B.cast(weights[tuple(dot.place(k, i))], dot.sums)
                    B.buffer_store(sums, sums[i] + product, [i])
    return builder.get()


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
