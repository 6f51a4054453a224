"""Sums, averages and extremes over axes."""

from __future__ import annotations

from collections.abc import Callable
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
from nnfuze_tvm.graph.ops import _onnx_maths as onnx
from nnfuze_tvm.graph.ops._axes import axes_of
from nnfuze_tvm.graph.ops.operator import Example, Operator, Train, grows, proportional_to

Function = Callable[..., np.ndarray]


def _reduced(function: Function) -> Callable[..., np.ndarray]:
    def evaluate(call: Call, data: np.ndarray) -> np.ndarray:
        axes = tuple(axes_of(call.attrs.axis, data.ndim))
        return function(data, axis=axes, keepdims=bool(call.attrs.keepdims))

    return evaluate


def _in_torch(name: str, **options: Any) -> Train:
    """Return how PyTorch reduces over several axes."""

    def train(torch: Any, call: Call, data: Any) -> Any:
        axes = axes_of(call.attrs.axis, data.ndim)
        return getattr(torch, name)(data, dim=axes, keepdim=bool(call.attrs.keepdims), **options)

    return train


def _torch_product(torch: Any, call: Call, data: Any) -> Any:
    for axis in sorted(axes_of(call.attrs.axis, data.ndim), reverse=True):
        data = torch.prod(data, dim=axis, keepdim=bool(call.attrs.keepdims))
    return data


def _torch_place(name: str) -> Train:
    def train(torch: Any, call: Call, data: Any) -> Any:
        axis = None if call.attrs.axis is None else int(call.attrs.axis)
        return getattr(torch, name)(data, dim=axis, keepdim=bool(call.attrs.keepdims))

    return train


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


_LINEAR: dict[str, Any] = {
    "degrees": grows(1),
    "proportional": proportional_to(0),
    "batch": along(_position),
}

OPERATORS = {
    "mean": _operator(
        np.mean,
        op.mean,
        train=_in_torch("mean"),
        effect="averages",
        integer=_integer_mean,
        batch=along(_position),
        transposed=_transposed,
    ),
    "sum": _operator(np.sum, op.sum, train=_in_torch("sum"), **_LINEAR),
    "max": _operator(np.max, op.max, train=_in_torch("amax"), **_LINEAR),
    "min": _operator(np.min, op.min, train=_in_torch("amin"), **_LINEAR),
    "prod": _operator(np.prod, op.prod, train=_torch_product),
    "std": _operator(
        np.std,
        op.std,
        train=_in_torch("std", correction=0),
        degrees=grows(1),
        kernels=("pooling", "reduction", "fallback"),
    ),
    "variance": _operator(
        np.var,
        op.variance,
        train=_in_torch("var", correction=0),
        degrees=grows(2),
        kernels=("pooling", "reduction", "fallback"),
    ),
    "argmax": Operator(
        effect="mixes",
        evaluate=_position_of(np.argmax),
        train=_torch_place("argmax"),
        examples=(Example(((4, 16),), lambda x: op.argmax(x, -1)),),
        kernels=("reduction",),
    ),
    "argmin": Operator(
        effect="mixes",
        evaluate=_position_of(np.argmin),
        train=_torch_place("argmin"),
        examples=(Example(((4, 16),), lambda x: op.argmin(x, -1)),),
        kernels=("reduction",),
    ),
}

ONNX = {
    "mean": onnx.reduced("ReduceMean"),
    "sum": onnx.reduced("ReduceSum"),
    "max": onnx.reduced("ReduceMax"),
    "min": onnx.reduced("ReduceMin"),
    "prod": onnx.reduced("ReduceProd"),
    "std": onnx.std,
    "variance": onnx.variance,
    "argmax": onnx.position("ArgMax"),
    "argmin": onnx.position("ArgMin"),
}
