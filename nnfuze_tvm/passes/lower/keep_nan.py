"""Bounds in kernels: what is NaN stays NaN."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import op_name
from nnfuze_tvm.graph.integers.context import number

Bound = Callable[[tirx.Expr, tirx.Expr, bool], tirx.Expr]
"""``(x, y, safe)`` → the larger or the smaller float, NaN where one is; ``safe`` says that ``x`` never is NaN."""

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


def by_tvm(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    """Write a call as TVM does."""
    return tvm.ir.Op.get(f"relax.{op_name(call)}").get_attr("FLegalize")(builder, call)


def _if_float(legalize: Legalize) -> Legalize:
    def wrapped(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
        return (legalize if str(call.ty.dtype).startswith("float") else by_tvm)(builder, call)

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


def _is_number(value: relax.Expr) -> bool:
    """Tell whether a value is known, and nowhere NaN."""
    return isinstance(value, GenericConst) and not np.isnan(array(value)).any()


def _at(tensor: te.Tensor, index: tuple[tirx.Var, ...]) -> tirx.Expr:
    """Return the element that a tensor has at a place of a result that it is broadcast to."""
    own = index[len(index) - len(tensor.shape) :]
    return tensor(*[0 if int(dim) == 1 else place for place, dim in zip(own, tensor.shape, strict=True)])
