"""Sums, averages and extremes over axes."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import tvm
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.batching import along
from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers, checked, scaled
from nnfuze_tvm.graph.integers.values import Known, Quantized
from nnfuze_tvm.graph.integers.windows import reduce_sum
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops.operator import Example, Operator, grows, proportional_to

Function = Callable[..., np.ndarray]


def axes_of(value: Any, rank: int) -> list[int]:
    """Return what an attribute that names axes means: one, several, or all for None."""
    if value is None:
        return list(range(rank))
    axes = value if isinstance(value, Iterable) else [value]
    return [int(axis) % rank for axis in axes]


def _reduced(function: Function) -> Callable[..., np.ndarray]:
    def evaluate(call: Call, data: np.ndarray) -> np.ndarray:
        axes = tuple(axes_of(call.attrs.axis, data.ndim))
        return function(data, axis=axes, keepdims=bool(call.attrs.keepdims))

    return evaluate


def _position_of(function: Function) -> Callable[..., np.ndarray]:
    def evaluate(call: Call, data: np.ndarray) -> np.ndarray:
        axis = None if call.attrs.axis is None else int(call.attrs.axis)
        return function(data, axis=axis, keepdims=bool(call.attrs.keepdims))

    return evaluate


def couple(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
    """Keep the axes that are reduced whole; others pass."""
    labels = coupling.tensor(call.args[0])
    axes = axes_of(call.attrs.axis, len(labels))
    for axis in axes:
        coupling.channels.fix(labels[axis])
    if call.attrs.keepdims:
        return [np.full(1, FIXED) if axis in axes else each for axis, each in enumerate(labels)]
    return [each for axis, each in enumerate(labels) if axis not in axes]


def _integer_mean(context: Integers, call: Call, _: str) -> Known | None:
    data = context.value(call.args[0])
    if not isinstance(data, Quantized):
        return None
    axes = sorted(axes_of(call.attrs.axis, len(data.shape)))
    count = int(np.prod([data.shape[axis] for axis in axes]))
    return checked(scaled(reduce_sum(context, data, axes, bool(call.attrs.keepdims)), 1.0 / count))


def _position(call: Call, axis: int) -> int | None:
    if call.attrs.axis is None:
        return None
    reduced = set(axes_of(call.attrs.axis, len(static_shape(call.args[0]))))
    if axis in reduced:
        return None
    return axis if call.attrs.keepdims else axis - sum(one < axis for one in reduced)


def _transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    if not call.attrs.keepdims or call.attrs.axis is None:
        return None
    return op.mean(sources[0], sorted(axes[int(axis)] for axis in call.attrs.axis), keepdims=True)


def _operator(function: Function, call: Any, **facts: Any) -> Operator:
    base: dict[str, Any] = {
        "effect": "mixes",
        "evaluate": _reduced(function),
        "examples": tuple(
            Example(((2, 8, 6, 6),), lambda x, axes=axes: call(x, axes, keepdims=True), low=0.5, high=1.5)
            for axes in ([2, 3], [-1])
        ),
        "couple": couple,
        "kernels": ("pooling", "reduction"),
    }
    return Operator(**{**base, **facts})


OPERATORS = {
    "mean": _operator(
        np.mean, op.mean, effect="averages", integer=_integer_mean, batch=along(_position), transposed=_transposed
    ),
    "sum": _operator(np.sum, op.sum, degrees=grows(1), proportional=proportional_to(0), batch=along(_position)),
    "max": _operator(np.max, op.max, degrees=grows(1), proportional=proportional_to(0), batch=along(_position)),
    "min": _operator(np.min, op.min, degrees=grows(1), proportional=proportional_to(0), batch=along(_position)),
    "prod": _operator(np.prod, op.prod),
    "std": _operator(np.std, op.std, degrees=grows(1), kernels=("pooling", "reduction", "fallback")),
    "variance": _operator(np.var, op.variance, degrees=grows(2), kernels=("pooling", "reduction", "fallback")),
    "argmax": Operator(
        effect="mixes",
        evaluate=_position_of(np.argmax),
        examples=(Example(((4, 16),), lambda x: op.argmax(x, -1)),),
        kernels=("reduction",),
    ),
    "argmin": Operator(
        effect="mixes",
        evaluate=_position_of(np.argmin),
        examples=(Example(((4, 16),), lambda x: op.argmin(x, -1)),),
        kernels=("reduction",),
    ),
}
