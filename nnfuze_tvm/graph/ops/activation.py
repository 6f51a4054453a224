"""Activation functions, element by element; PReLU has a slope per channel."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import tvm
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.channels import Coupling, Labels, Removal
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers, number
from nnfuze_tvm.graph.integers.values import Known
from nnfuze_tvm.graph.ops import _onnx_maths as onnx
from nnfuze_tvm.graph.ops.elementwise import erf, operator
from nnfuze_tvm.graph.ops.operator import Example, Operator, Train, always, grows, proportional_to


def _relu(context: Integers, call: Call, _: str) -> Known | None:
    return context.clamp(call.args[0], 0.0, np.inf)


def _relu6(context: Integers, call: Call, _: str) -> Known | None:
    return context.clamp(call.args[0], 0.0, 6.0)


def _clip(context: Integers, call: Call, _: str) -> Known | None:
    return context.clamp(call.args[0], number(call.args[1]), number(call.args[2]))


def _sigmoid(x: np.ndarray) -> np.ndarray:
    # exp of what is not positive can't overflow.
    small = np.exp(-np.abs(x))
    return np.where(x >= 0, 1 / (1 + small), small / (1 + small))


def _leaky(call: Call, x: np.ndarray) -> np.ndarray:
    return np.where(x > 0, x, x * x.dtype.type(float(call.attrs.alpha)))


def _softplus(call: Call, x: np.ndarray) -> np.ndarray:
    beta, threshold = float(call.attrs.beta), float(call.attrs.threshold)
    return np.where(x * beta > threshold, x, np.logaddexp(0, x * beta) / beta)


def _selu(x: np.ndarray) -> np.ndarray:
    scale, alpha = 1.0507009873554804934193349852946, 1.6732632423543772848170429916717
    return scale * np.where(x > 0, x, alpha * np.expm1(np.minimum(x, 0)))


def _gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + erf(x * math.sqrt(0.5)))


def _gelu_tanh(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def _prelu(call: Call, x: np.ndarray, slope: np.ndarray) -> np.ndarray:
    shape = [-1 if axis == int(call.attrs.axis) % x.ndim else 1 for axis in range(x.ndim)]
    return np.where(x >= 0, x, x * slope.reshape(shape))


def couple_prelu(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels | None:
    """Hand the labels on, if the slopes can be cut."""
    return coupling.tensor(call.args[0]) if isinstance(call.args[1], GenericConst) else None


def cut_prelu(removal: Removal, _: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    """Cut the slopes."""
    labels = removal.coupling.tensor(call.args[0])[int(call.attrs.axis)]
    return Call(call.op, [args[0], removal.cut(args[1], [labels])], call.attrs, call.ty_args)


def _torch_prelu(torch: Any, call: Call, x: Any, slope: Any) -> Any:
    shape = [-1 if axis == int(call.attrs.axis) % x.ndim else 1 for axis in range(x.ndim)]
    return torch.where(x >= 0, x, x * slope.reshape(shape))


def _clipped(x: Any) -> Value:
    return op.clip(x, -0.5, 0.75)


def _evaluate_clip(_: Call, x: np.ndarray, low: float, high: float) -> np.ndarray:
    return np.clip(x, np.asarray(low, x.dtype), np.asarray(high, x.dtype))


def _with_attributes(evaluate: Any, call: Any, **facts: Any) -> Operator:
    """Return an operator whose function reads the call's attributes."""
    return operator(np.positive, 1, call, evaluate=evaluate, **facts)


def _torch(name: str, **options: Any) -> Train:
    """Return how PyTorch computes a function of one tensor that it has itself."""
    return lambda torch, _, x: getattr(torch.nn.functional, name)(x, **options)


OPERATORS = {
    "nn.relu": operator(
        lambda x: np.maximum(x, 0),
        1,
        op.nn.relu,
        train=_torch("relu"),
        integer=_relu,
        nonnegative=always,
        bounds=True,
        exact=True,
        half=True,
        proportional=proportional_to(0),
    ),
    "nn.relu6": operator(
        lambda x: np.clip(x, 0, 6),
        1,
        op.nn.relu6,
        train=_torch("relu6"),
        integer=_relu6,
        nonnegative=always,
        bounds=True,
        exact=True,
        limits=lambda _: (0.0, 6.0),
        half=True,
    ),
    "clip": _with_attributes(
        _evaluate_clip,
        _clipped,
        train=lambda torch, _, x, low, high: torch.clamp(x, low, high),
        integer=_clip,
        nonnegative=lambda call, _: number(call.args[1]) >= 0,
        bounds=True,
        exact=True,
        limits=lambda call: (number(call.args[1]), number(call.args[2])),
        half=True,
    ),
    "sigmoid": operator(_sigmoid, 1, op.sigmoid, train=_torch("sigmoid"), nonnegative=always, of_one=True),
    "nn.silu": operator(lambda x: x * _sigmoid(x), 1, op.nn.silu, train=_torch("silu"), degrees=grows(1)),
    "nn.gelu": operator(_gelu, 1, op.nn.gelu, train=_torch("gelu"), degrees=grows(1)),
    "nn.gelu_tanh": operator(
        _gelu_tanh, 1, op.nn.gelu_tanh, train=_torch("gelu", approximate="tanh"), degrees=grows(1)
    ),
    "nn.selu": operator(_selu, 1, op.nn.selu, train=_torch("selu"), degrees=grows(1)),
    "nn.leakyrelu": _with_attributes(
        _leaky,
        op.nn.leakyrelu,
        train=lambda torch, call, x: torch.nn.functional.leaky_relu(x, float(call.attrs.alpha)),
        degrees=grows(1),
        half=True,
        proportional=proportional_to(0),
    ),
    "nn.softplus": _with_attributes(
        _softplus,
        op.nn.softplus,
        train=lambda torch, call, x: torch.nn.functional.softplus(
            x, float(call.attrs.beta), float(call.attrs.threshold)
        ),
    ),
    "nn.prelu": Operator(
        effect="maps",
        evaluate=_prelu,
        examples=(Example(((2, 8, 6, 6), (8,)), lambda x, slope: op.nn.prelu(x, slope, axis=1), constants=1),),
        train=_torch_prelu,
        couple=couple_prelu,
        cut=cut_prelu,
        degrees=grows(1, None),
        kernels=("elementwise",),
        proportional=proportional_to(0),
    ),
}

ONNX = {
    "nn.relu": "Relu",
    "nn.relu6": onnx.relu6,
    "clip": onnx.clip,
    "sigmoid": "Sigmoid",
    "nn.silu": onnx.silu,
    "nn.gelu": onnx.gelu("none"),
    "nn.gelu_tanh": onnx.gelu("tanh"),
    "nn.selu": "Selu",
    "nn.leakyrelu": onnx.leaky_relu,
    "nn.softplus": onnx.softplus,
    "nn.prelu": onnx.prelu,
}
