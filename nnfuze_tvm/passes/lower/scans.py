"""Sums and products that accumulate along an axis: rows that are added to the one before, side by side.

TVM's own kernel goes along the axis one number at a time, however far its neighbours are apart, and is not one that
schedules see.
"""

from __future__ import annotations

from math import prod
from typing import Any

from tvm import relax, tirx
from tvm.ir import Call
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.dataflow import op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.keep_nan import Legalize

ATTRIBUTE = "nnfuze.scan"
"""A kernel that has it consists of loops whose steps wait for each other."""


def legalizations() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write what accumulates."""
    return {f"relax.{name}": _scan for name in ("cumsum", "cumprod")}


def _scan(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    shape, result = static_shape(call.args[0]), static_shape(call)
    if 0 in shape:
        return call
    axis = None if call.attrs.axis is None else int(call.attrs.axis) % len(shape)
    sizes = (1, prod(shape), 1) if axis is None else (prod(shape[:axis]), shape[axis], prod(shape[axis + 1 :]))
    types = str(call.args[0].ty.dtype), str(call.ty.dtype)
    kernel = _kernel((shape, result), sizes, types, op_name(call) == "cumprod", bool(call.attrs.exclusive))
    return relax.call_tir(builder.add_func(kernel, op_name(call)), relax.Tuple([call.args[0]]), call.ty)


def _kernel(
    shapes: tuple[tuple[int, ...], tuple[int, ...]],
    sizes: tuple[int, int, int],
    types: tuple[str, str],
    product: bool,
    exclusive: bool,
) -> tirx.PrimFunc:
    """Return the kernel for what lies in front of the axis, along it and behind it."""
    outer, steps, inner = sizes
    source, dtype = types
    shape, result = ([T.int64(size) for size in own] for own in shapes)
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({ATTRIBUTE: 1, "tirx.noalias": True})
            data = T.arg("data", T.buffer(shape, source))
            total = T.arg("total", T.buffer(result, dtype))

            def store(row: Any, step: Any, place: Any, value: Any) -> None:
                T.buffer_store(total, value, _indices(result, (row * steps + step) * inner + place))

            def load(buffer: Any, row: Any, step: Any, place: Any) -> Any:
                own = shape if buffer is data else result
                return buffer[tuple(_indices(own, (row * steps + step) * inner + place))]

            with T.sblock("scan"):
                T.reads(data[tuple(slice(0, int(size)) for size in shape)])
                T.writes(total[tuple(slice(0, int(size)) for size in result)])
                with T.serial(T.int64(0), T.int64(outer)) as row:
                    with T.serial(T.int64(0), T.int64(inner)) as place:
                        first = tirx.const(int(product), dtype)
                        start = first if exclusive else tirx.Cast(dtype, load(data, row, T.int64(0), place))
                        store(row, T.int64(0), place, start)
                    with T.serial(T.int64(0), T.int64(steps - 1)) as step:
                        with T.serial(T.int64(0), T.int64(inner)) as place:
                            before = load(total, row, step, place)
                            value = tirx.Cast(dtype, load(data, row, step if exclusive else step + 1, place))
                            store(row, step + 1, place, before * value if product else before + value)
    return builder.get()


def _indices(shape: list[Any], flat: Any) -> list[Any]:
    """Return the place in a tensor of the element ``flat`` of all."""
    found = []
    for size in reversed(shape[1:]):
        found.append(flat % size)
        flat = flat // size
    return [flat, *reversed(found)]
