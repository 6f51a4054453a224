"""Concatenations whose parts are copied one after the other.

TVM asks of every element which part it comes from: with many parts that takes time that grows with their square, to
compile as well as to run, and where parts end within a vector, no vector is left.
"""

from __future__ import annotations

from math import gcd, prod
from typing import Any

from tvm import relax
from tvm.ir import Call
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc, Var

from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.keep_nan import Legalize, by_tvm

# As many parts are told from each other at compile time, and as many element by element if those are few.
_FEW, _FEW_TORN = 16, 4
_FEW_ELEMENTS = 2048
# Parts of a multiple of as many elements leave whole vectors.
_VECTOR = 8

ATTRIBUTE = "nnfuze.parts"
"""A kernel that has it writes its result part by part, and what reads the result can't be computed with it."""


def legalizations() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write concatenations."""
    return {"relax.concat": _concat}


def _concat(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    if not isinstance(call.args[0], relax.Tuple):
        return by_tvm(builder, call)
    parts = list(call.args[0].fields)
    shapes = [static_shape(part) for part in parts]
    axis = 0 if call.attrs.axis is None else int(call.attrs.axis) % len(shapes[0])
    sizes = [shape[axis] for shape in shapes]
    torn = gcd(*sizes) * prod(shapes[0][axis + 1 :]) % _VECTOR != 0
    few = _FEW if not torn else _FEW_TORN if prod(static_shape(call)) <= _FEW_ELEMENTS else 1
    if len(parts) <= few or 0 in static_shape(call):
        return by_tvm(builder, call)
    kernel = builder.add_func(_kernel(shapes, axis, str(call.ty.dtype)), "concatenate")
    return relax.call_tir(kernel, relax.Tuple(parts), call.ty)


def _kernel(shapes: list[tuple[int, ...]], axis: int, dtype: str) -> PrimFunc:
    """Return the kernel: a block per part."""
    whole = list(shapes[0])
    whole[axis] = sum(shape[axis] for shape in shapes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({ATTRIBUTE: len(shapes), "tirx.noalias": True})
            parts = [T.arg(f"part{n}", T.buffer(list(map(T.int64, shape)), dtype)) for n, shape in enumerate(shapes)]
            result = T.arg("joined", T.buffer(list(map(T.int64, whole)), dtype))
            start = 0
            for n, (part, shape) in enumerate(zip(parts, shapes, strict=True)):
                if shape[axis]:
                    with T.grid(*map(T.int64, shape)) as loops:
                        with T.sblock(f"part{n}"):
                            place = _listed(T.axis.remap("S" * len(shape), _listed(loops)))
                            moved = [*place[:axis], place[axis] + start, *place[axis + 1 :]]
                            T.reads(part[tuple(place)])
                            T.writes(result[tuple(moved)])
                            T.buffer_store(result, part[tuple(place)], moved)
                start += shape[axis]
    return builder.get()


def _listed(values: Any) -> list[Any]:
    """Return several Vars, or the only one, as a list."""
    return [values] if isinstance(values, Var) else list(values)
