"""What the instruction sets share: what a dot product computes.

Written with TVM's IR builder: TVMScript would take its parser 20 ms a function, in each process that imports this.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from tvm import tirx
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
    multiplies : float
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
    narrow : int
        Products per sum that are added in int16 before they are in int32, see ``narrow_sums``; 0: none.
    """

    name: str
    lanes: int
    depth: int
    multiplies: float
    data: str
    steps: int = 1
    prepare: int = 0
    paired: bool = False
    weights: str = "int8"
    sums: str = "int32"
    rows: int = 1
    narrow: int = 0

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


@dataclass(frozen=True)
class NarrowSums:
    """How products with small weights are added in int16 first, instead of an intrinsic's own steps.

    Attributes
    ----------
    lanes : int
        The int16 sums that stand for a vector of sums.
    multiply : Step
        Adds the products of a step to them; they must have room.
    widen : callable
        From these sums to those of int32 that they make.
    """

    lanes: int
    multiply: Step
    widen: Callable[[Any], Any]


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


@contextmanager
def sums_of_products(lanes: int, depth: int, data: str, weights: str) -> Iterator[tuple[tirx.Buffer, ...]]:
    """Describe what adds ``depth`` products to each sum, around its body.

    Yields
    ------
    tuple of tvm.tirx.Buffer
        The data (depth,), the weights (lanes, depth) and the sums (lanes,) in int32.
    """
    with B.prim_func(s_tir=True):
        a, b, c = (B.arg(name, B.handle()) for name in "abc")
        factors = B.match_buffer(a, (depth,), data, offset_factor=1)
        packed = B.match_buffer(b, (lanes, depth), weights, offset_factor=1)
        sums = B.match_buffer(c, (lanes,), "int32", offset_factor=1)
        with B.sblock("root"):
            B.reads(sums[0:lanes], factors[0:depth], packed[0:lanes, 0:depth])
            B.writes(sums[0:lanes])
            yield factors, packed, sums


def products_desc(lanes: int, depth: int, data: str, weights: str, narrow: str | None = None) -> tirx.PrimFunc:
    """Return what an intrinsic of one step computes: data (depth,), weights (lanes, depth), int32 sums (lanes,).

    ``narrow`` is the dtype that holds the data's values, where they are given in a wider one.
    """
    with IRBuilder() as builder:
        with (
            sums_of_products(lanes, depth, data, weights) as (factors, packed, sums),
            B.serial(0, lanes) as lane,
            B.serial(0, depth) as product,
            B.sblock("update"),
        ):
            i, k = B.axis.spatial(lanes, lane), B.axis.reduce(depth, product)
            factor = B.cast(factors[k], narrow) if narrow else factors[k]
            B.buffer_store(sums, sums[i] + B.cast(factor, "int32") * B.cast(packed[i, k], "int32"), [i])
    return builder.get()
