"""All slices of a tensor side by side are that tensor."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

from tvm import relax

from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.ir import static_shape


def whole(parts: Sequence[Value], axis: int, bound: Callable[[Value], Value]) -> Value | None:
    """Return the tensor whose elements the parts hold, all and in its order; None if they are no such slices.

    Parameters
    ----------
    parts : Sequence[Value]
        Side by side along ``axis``; each may be a slice that was reshaped.
    axis : int
        Where they are joined.
    bound : callable
        Returns what a Var is bound to, None if it is bound to nothing.
    """
    origins = [_origin(part, bound) for part in parts]
    first = origins[0]
    if first is None or any(
        each is None or each.index != place or not each.tuple_value.same_as(first.tuple_value)
        for place, each in enumerate(origins)
    ):
        return None
    split = bound(first.tuple_value)
    if op_name(split) != "split" or len(split.ty.fields) != len(parts):
        return None
    data = split.args[0]
    before = static_shape(data)[: int(split.attrs.axis) % len(static_shape(data))]
    # Where something longer than one lies in front of the axis, slices are interleaved in memory.
    return data if prod(before) == prod(static_shape(parts[0])[:axis]) == 1 else None


def _origin(part: Value, bound: Callable[[Value], Value]) -> relax.TupleGetItem | None:
    value = bound(part)
    while op_name(value) in ("reshape", "squeeze", "expand_dims", "flatten"):
        value = bound(value.args[0])
    return value if isinstance(value, relax.TupleGetItem) else None
