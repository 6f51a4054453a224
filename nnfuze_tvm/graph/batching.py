"""Branches side by side: the vocabulary in which operators say how several calls become one.

The values of the branches are *joined*: concatenated along one axis, the channels as a rule. An operator takes the
calls of the branches and says which operands have to be joined along which axis, what the joined call is, and along
which axis its result is joined; None where there is no such call. It changes no result: every element is computed from
the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm.ir import Call

from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape

Axes = Sequence[int | None]
"""For each argument along which axis it is joined already, None where it is not."""


@dataclass(frozen=True)
class Join:
    """An operand made of one value per branch, side by side along ``axis``."""

    values: tuple[Value, ...]
    axis: int


@dataclass(frozen=True)
class JoinedCall:
    """One call in place of several.

    Attributes
    ----------
    operands
        What ``build`` wants: joined values, or expressions that are used as they are.
    build
        Makes the call from the operands.
    axis, sizes
        The branches' results lie side by side along ``axis``, ``sizes[i]`` elements of branch ``i``.
    lanes_before, lanes_after
        For a layer: channels that one kernel's vectors can run over, of one branch and joined. Else 0.
    macs
        Multiply-accumulates of all branches together.
    grouped_bytes
        Size of the joined input of a grouped kernel, of which every group reads a part of each row. Else 0.
    fuses
        Whether the operator costs no kernel of its own, because it ends up in that of its producer.
    """

    operands: list[Join | Value]
    build: Callable[[list[Value]], Value]
    axis: int
    sizes: tuple[int, ...]
    lanes_before: int = 0
    lanes_after: int = 0
    macs: int = 0
    grouped_bytes: int = 0
    fuses: bool = False


Batch = Callable[[Sequence[Call], Axes], JoinedCall | None]


def size_in_bytes(value: Value) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(static_shape(value))) * np.dtype(str(value.ty.dtype)).itemsize


def differ_only_along(shapes: Sequence[tuple[int, ...]], axis: int) -> bool:
    """Tell whether shapes are equal but for one axis."""
    return len({shape[:axis] + shape[axis + 1 :] for shape in shapes}) == 1


def same_call(call: Call) -> Callable[[list[Value]], Value]:
    """Return what makes ``call`` with other tensors; arguments that are no tensors stay."""

    def build(operands: list[Value]) -> Value:
        rest = list(call.args)[len(operands) :]
        return Call(call.op, [*operands, *rest], call.attrs, call.ty_args)

    return build


def along(position: Callable[[Call, int], int | None], fuses: bool = False) -> Batch:
    """Return how operators of one tensor are batched that leave every slice along the joined axis alone.

    Parameters
    ----------
    position : callable
        Returns where that axis is in the result, or None where the operator mixes its slices.
    fuses : bool
        See `JoinedCall`.
    """

    def batch(calls: Sequence[Call], axes: Axes) -> JoinedCall | None:
        axis = axes[0]
        if axis is None:
            return None
        target = position(calls[0], axis)
        shapes = [static_shape(call) for call in calls]
        if target is None or not differ_only_along(shapes, target):
            return None
        sizes = tuple(shape[target] for shape in shapes)
        if sizes != tuple(static_shape(call.args[0])[axis] for call in calls):
            return None
        operand = Join(tuple(call.args[0] for call in calls), axis)
        return JoinedCall([operand], same_call(calls[0]), target, sizes, fuses=fuses)

    return batch
