"""Bounds, extremes and comparisons in kernels: what is NaN stays NaN, and is equal to nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx, topi
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import op_name
from nnfuze_tvm.graph.integers.context import number
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops.reduction import axes_of

Bound = Callable[[tirx.Expr, tirx.Expr, bool], tirx.Expr]
"""``(x, y, safe)`` → the larger or the smaller float, NaN where one is; ``safe`` says that ``x`` never is NaN."""

# A block so marked is a reduction that shall keep NaN, by LLVM's operation of this name if there is one: a rewrite of
# the scheduled kernel (``schedules/rewrites/extremes.py``) sees to it.
EXTREME = "nnfuze.extreme"

Legalize = Callable[[relax.BlockBuilder, Call], relax.Expr]


def legalizations(maximum: Bound, minimum: Bound) -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write the operators that bound floats.

    TVM's own kernels make a number of NaN.

    Parameters
    ----------
    maximum, minimum : callable
        As the machine has them, see `Bound`.
    """
    tables: dict[str, Legalize] = {
        "nn.relu": _clipped(maximum, minimum, lambda _: (0.0, np.inf)),
        "nn.relu6": _clipped(maximum, minimum, lambda _: (0.0, 6.0)),
        "clip": _clipped(maximum, minimum, lambda call: (number(call.args[1]), number(call.args[2]))),
        "maximum": _binary(maximum),
        "minimum": _binary(minimum),
    }
    return {f"relax.{name}": _if_float(legalize) for name, legalize in tables.items()}


def extremes(own: bool) -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write what looks for the largest or smallest of floats.

    TVM's own kernels lose NaN, and find no number beyond the largest finite one.

    Parameters
    ----------
    own : bool
        The machine's maximum and minimum keep NaN.
    """
    return {f"relax.{name}": _if_float(_extreme(name, own)) for name in ("max", "min")}


def comparisons() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write comparisons of floats.

    TVM's own ``!=`` is false of NaN, its simplifier makes ``>=`` of what is not less, and true of ``x == x``.
    """
    tables: dict[str, Legalize] = {"not_equal": _if_float(_not_equal), "logical_not": _not}
    tables |= {name: _if_float(_compared) for name in ("equal", "greater_equal", "less_equal")}
    return {f"relax.{name}": legalize for name, legalize in tables.items()}


def by_tvm(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    """Write a call as TVM does."""
    return tvm.ir.Op.get(f"relax.{op_name(call)}").get_attr("FLegalize")(builder, call)


def _if_float(legalize: Legalize) -> Legalize:
    def wrapped(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
        return (legalize if str(call.args[0].ty.dtype).startswith("float") else by_tvm)(builder, call)

    return wrapped


def _clipped(maximum: Bound, minimum: Bound, limits: Callable[[Call], tuple[float, float]]) -> Legalize:
    def legalize(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
        low, high = limits(call)

        def clip(data: te.Tensor) -> te.Tensor:
            def element(*index: tirx.Var) -> tirx.Expr:
                value = data(*index)
                if low > -np.inf:
                    value = maximum(tirx.const(low, data.dtype), value, True)
                return minimum(tirx.const(high, data.dtype), value, True) if high < np.inf else value

            return te.compute(data.shape, element)

        hint = op_name(call).removeprefix("nn.")
        return builder.call_te(clip, call.args[0], primfunc_name_hint="tir_clip" if hint == "clip" else hint)

    return legalize


def _binary(bound: Bound) -> Legalize:
    def legalize(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
        first, second = call.args
        if not _is_number(first) and _is_number(second):
            first, second = second, first
        safe = _is_number(first)

        def pairwise(*tensors: te.Tensor) -> te.Tensor:
            def element(*index: tirx.Var) -> tirx.Expr:
                return bound(_at(tensors[0], index) if len(tensors) > 1 else scalar, _at(tensors[-1], index), safe)

            return te.compute([int(dim) for dim in call.ty.shape], element)

        operands: list[Any] = [first, second]
        scalar = None
        if safe and array(first).ndim == 0:
            scalar = tirx.const(array(first).item(), str(first.ty.dtype))
            operands = [second]
        return builder.call_te(pairwise, *operands, primfunc_name_hint=op_name(call))

    return legalize


def _extreme(function: str, own: bool) -> Legalize:
    """Return how a reduction is written: as TVM does, which schedules know, and marked for what makes it right."""

    def legalize(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
        shape, result = static_shape(call.args[0]), static_shape(call)
        axes = sorted(axes_of(call.attrs.axis, len(shape)))
        if not axes:
            return by_tvm(builder, call)

        def reduced(data: te.Tensor) -> te.Tensor:
            taps = {axis: te.reduce_axis((0, shape[axis]), f"k{axis}") for axis in axes}

            def element(*index: tirx.Var) -> tirx.Expr:
                rest = iter(i for n, i in enumerate(index) if not (call.attrs.keepdims and n in taps))
                places = [taps[axis].var if axis in taps else next(rest) for axis in range(len(shape))]
                return getattr(te, function)(data(*places), axis=list(taps.values()))

            return te.compute(result, element, name=function, attrs={EXTREME: f"llvm.{function}imum" if own else ""})

        return builder.call_te(reduced, call.args[0], primfunc_name_hint=function)

    return legalize


def _compared(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    """Write a comparison; only of a value with itself not as TVM does, which finds that it holds always."""
    first, second = call.args
    if not first.same_as(second):
        return by_tvm(builder, call)
    return builder.call_te(
        lambda data: te.compute(data.shape, lambda *i: _other(tirx.isnan(data(*i)))),
        first,
        primfunc_name_hint=op_name(call),
    )


def _not_equal(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    first, second = call.args
    if first.same_as(second):
        return builder.call_te(topi.isnan, first, primfunc_name_hint="not_equal")
    known = [
        tirx.const(array(operand).item(), str(operand.ty.dtype))
        if isinstance(operand, GenericConst) and array(operand).ndim == 0
        else None
        for operand in call.args
    ]

    def differ(*tensors: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            rest = iter(tensors)
            left, right = (_at(next(rest), index) if value is None else value for value in known)
            return _other(tirx.EQ(left, right))

        return te.compute(static_shape(call), element)

    read = [operand for operand, value in zip(call.args, known, strict=True) if value is None]
    return builder.call_te(differ, *read, primfunc_name_hint="not_equal") if read else by_tvm(builder, call)


def _not(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    if str(call.args[0].ty.dtype) != "bool":
        return by_tvm(builder, call)
    return builder.call_te(
        lambda data: te.compute(data.shape, lambda *i: _other(data(*i))),
        call.args[0],
        primfunc_name_hint="tir_logical_not",
    )


def _other(truth: tirx.Expr) -> tirx.Expr:
    """Return the other truth value, in a form of which the simplifier makes no other comparison."""
    zero, one = (tirx.const(value, "int8") for value in (0, 1))
    return tirx.Cast("bool", tirx.Select(truth, zero, one))


def _is_number(value: relax.Expr) -> bool:
    """Tell whether a value is known, and nowhere NaN."""
    return isinstance(value, GenericConst) and not np.isnan(array(value)).any()


def _at(tensor: te.Tensor, index: tuple[tirx.Var, ...]) -> tirx.Expr:
    """Return the element that a tensor has at a place of a result that it is broadcast to."""
    own = index[len(index) - len(tensor.shape) :]
    return tensor(*[0 if int(dim) == 1 else place for place, dim in zip(own, tensor.shape, strict=True)])
