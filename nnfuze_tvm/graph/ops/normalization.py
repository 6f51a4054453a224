"""Normalization: by stored moments (batch norm) or by those of the values themselves; softmax."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.batching import along
from nnfuze_tvm.graph.channels import Coupling, Labels, Removal
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_maths as onnx
from nnfuze_tvm.graph.ops._axes import axes_of
from nnfuze_tvm.graph.ops.operator import Example, Operator, always


def _vector(values: Any, axis: int, rank: int) -> Any:
    return values.reshape([-1 if one == axis % rank else 1 for one in range(rank)])


def _batch_norm(call: Call, x: np.ndarray, *moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    assert not call.attrs.training
    gamma, beta, mean, variance = (_vector(each, int(call.attrs.axis), x.ndim) for each in moments)
    result = (x - mean) / np.sqrt(variance + x.dtype.type(float(call.attrs.epsilon)))
    if call.attrs.scale:
        result = result * gamma
    return result + beta if call.attrs.center else result, moments[2], moments[3]


def _normalized(x: np.ndarray, axes: tuple[int, ...], epsilon: float) -> np.ndarray:
    wide = x.astype(np.result_type(x.dtype, np.float32))
    centered = wide - wide.mean(axes, keepdims=True)
    return centered / np.sqrt(np.square(centered).mean(axes, keepdims=True) + epsilon)


def _layer_norm(call: Call, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    axes = axes_of(call.attrs.axes, x.ndim)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    return _normalized(x, tuple(axes), float(call.attrs.epsilon)) * gamma.reshape(shape) + beta.reshape(shape)


def _instance_norm(call: Call, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    axis, axes = int(call.attrs.channel_axis), tuple(axes_of(call.attrs.axes, x.ndim))
    return _normalized(x, axes, float(call.attrs.epsilon)) * _vector(gamma, axis, x.ndim) + _vector(beta, axis, x.ndim)


def _group_norm(call: Call, x: np.ndarray, gamma: np.ndarray, beta: np.ndarray) -> np.ndarray:
    axis, count = int(call.attrs.channel_axis) % x.ndim, int(call.attrs.num_groups)
    axes = [one + (one >= axis) for one in axes_of(call.attrs.axes, x.ndim) if one != axis]
    apart = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    normal = _normalized(apart, (axis + 1, *axes), float(call.attrs.epsilon)).reshape(x.shape)
    return normal * _vector(gamma, axis, x.ndim) + _vector(beta, axis, x.ndim)


def _rms_norm(call: Call, x: np.ndarray, weight: np.ndarray) -> np.ndarray:
    axes = tuple(axes_of(call.attrs.axes, x.ndim))
    wide = x.astype(np.result_type(x.dtype, np.float32))
    return wide / np.sqrt(np.square(wide).mean(axes, keepdims=True) + float(call.attrs.epsilon)) * weight


def _torch_batch_norm(torch: Any, call: Call, x: Any, *moments: Any) -> tuple[Any, Any, Any]:
    assert not call.attrs.training
    gamma, beta, mean, variance = (_vector(each, int(call.attrs.axis), x.ndim) for each in moments)
    result = (x - mean) * torch.rsqrt(variance + float(call.attrs.epsilon))
    if call.attrs.scale:
        result = result * gamma
    return result + beta if call.attrs.center else result, moments[2], moments[3]


def _torch_normalized(torch: Any, x: Any, axes: Sequence[int], epsilon: float) -> Any:
    variance, mean = torch.var_mean(x, axes, correction=0, keepdim=True)
    return (x - mean) * torch.rsqrt(variance + epsilon)


def _torch_layer_norm(torch: Any, call: Call, x: Any, gamma: Any, beta: Any) -> Any:
    axes = axes_of(call.attrs.axes, x.ndim)
    shape = [size if axis in axes else 1 for axis, size in enumerate(x.shape)]
    normal = _torch_normalized(torch, x, axes, float(call.attrs.epsilon))
    return normal * gamma.reshape(shape) + beta.reshape(shape)


def _torch_instance_norm(torch: Any, call: Call, x: Any, gamma: Any, beta: Any) -> Any:
    axis = int(call.attrs.channel_axis)
    normal = _torch_normalized(torch, x, axes_of(call.attrs.axes, x.ndim), float(call.attrs.epsilon))
    return normal * _vector(gamma, axis, x.ndim) + _vector(beta, axis, x.ndim)


def _torch_group_norm(torch: Any, call: Call, x: Any, gamma: Any, beta: Any) -> Any:
    axis, count = int(call.attrs.channel_axis) % x.ndim, int(call.attrs.num_groups)
    axes = [one + (one >= axis) for one in axes_of(call.attrs.axes, x.ndim) if one != axis]
    apart = x.reshape(*x.shape[:axis], count, -1, *x.shape[axis + 1 :])
    normal = _torch_normalized(torch, apart, [axis + 1, *axes], float(call.attrs.epsilon)).reshape(x.shape)
    return normal * _vector(gamma, axis, x.ndim) + _vector(beta, axis, x.ndim)


def _torch_rms_norm(torch: Any, call: Call, x: Any, weight: Any) -> Any:
    square = torch.square(x).mean(axes_of(call.attrs.axes, x.ndim), keepdim=True)
    return x * torch.rsqrt(square + float(call.attrs.epsilon)) * weight


def _softmax(call: Call, x: np.ndarray) -> np.ndarray:
    powers = np.exp(x - x.max(int(call.attrs.axis), keepdims=True))
    return powers / powers.sum(int(call.attrs.axis), keepdims=True)


def _log_softmax(call: Call, x: np.ndarray) -> np.ndarray:
    shifted = x - x.max(int(call.attrs.axis), keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(int(call.attrs.axis), keepdims=True))


def _fixed_axes(attribute: str) -> Callable[[Coupling, tvm.ir.Var, Call], Labels]:
    """Return how labels pass where values are computed across some axes: those stay whole."""

    def couple(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
        labels = coupling.tensor(call.args[0])
        for axis in axes_of(getattr(call.attrs, attribute), len(labels)):
            coupling.channels.fix(labels[axis])
        return labels

    return couple


def couple_per_channel(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels | tuple | None:
    """Hand the labels on where all constants along one axis can be cut."""
    if not all(isinstance(arg, GenericConst) for arg in call.args[1:]):
        return None
    labels = coupling.tensor(call.args[0])
    if op_name(call) == "nn.batch_norm":
        if call.attrs.training:
            return None
        channel = labels[call.attrs.axis]
        return (labels, [channel], [channel])
    for axis in axes_of(call.attrs.axes, len(labels)):
        coupling.channels.fix(labels[axis])
    return labels


def cut_per_channel(removal: Removal, _: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    """Cut the constants along the axis of the channels."""
    attrs = call.attrs
    axis = attrs.axis if op_name(call) == "nn.batch_norm" else attrs.channel_axis
    labels = removal.coupling.tensor(call.args[0])[int(axis)]
    return Call(call.op, [args[0], *(removal.cut(arg, [labels]) for arg in args[1:])], attrs, call.ty_args)


def _position(call: Call, axis: int) -> int | None:
    return axis if int(call.attrs.axis) % len(static_shape(call)) != axis else None


def _gains(call: Call) -> tuple[int, Sequence[int]]:
    """Return the axis of a normalization's constants; several axes have none of their own."""
    own = getattr(call.attrs, "channel_axis", None)
    axes = axes_of(call.attrs.axes, len(static_shape(call))) if own is None else [int(own)]
    return axes[0] % len(static_shape(call)), range(1, len(call.args)) if len(axes) == 1 else ()


def _operator(evaluate: Any, *examples: Example, **facts: Any) -> Operator:
    return Operator(effect="mixes", evaluate=evaluate, examples=examples, **{"kernels": ("reduction",), **facts})


_DATA = (2, 8, 6, 6)

OPERATORS = {
    "nn.batch_norm": _operator(
        _batch_norm,
        Example(
            (_DATA, *[(8,)] * 4),
            lambda x, *rest: op.nn.batch_norm(x, *rest, axis=1, training=False)[0],
            constants=4,
            low=0.5,
            high=1.5,
        ),
        couple=couple_per_channel,
        train=_torch_batch_norm,
        cut=cut_per_channel,
        kernels=("elementwise",),
    ),
    "nn.instance_norm": _operator(
        _instance_norm,
        Example((_DATA, (8,), (8,)), lambda x, g, b: op.nn.instance_norm(x, g, b, 1, [2, 3]), constants=2),
        train=_torch_instance_norm,
        couple=couple_per_channel,
        cut=cut_per_channel,
        gains=_gains,
        kernels=("reduction", "fallback"),
    ),
    "nn.group_norm": _operator(
        _group_norm,
        Example((_DATA, (8,), (8,)), lambda x, g, b: op.nn.group_norm(x, g, b, 2, 1, [2, 3]), constants=2),
        train=_torch_group_norm,
        gains=_gains,
        kernels=("reduction", "fallback"),
    ),
    "nn.layer_norm": _operator(
        _layer_norm,
        Example(((2, 6, 32), (32,), (32,)), lambda x, g, b: op.nn.layer_norm(x, g, b, -1), constants=2),
        train=_torch_layer_norm,
        couple=_fixed_axes("axes"),
        gains=_gains,
    ),
    "nn.rms_norm": _operator(
        _rms_norm,
        Example(((2, 6, 32), (32,)), lambda x, g: op.nn.rms_norm(x, g, -1), constants=1),
        train=_torch_rms_norm,
        couple=_fixed_axes("axes"),
        gains=_gains,
    ),
    "nn.softmax": _operator(
        _softmax,
        Example(((2, 6, 32),), lambda x: op.nn.softmax(x, -1)),
        train=lambda torch, call, x: torch.softmax(x, int(call.attrs.axis)),
        couple=_fixed_axes("axis"),
        nonnegative=always,
        of_one=True,
        batch=along(_position),
    ),
    "nn.log_softmax": _operator(
        _log_softmax,
        Example(((2, 6, 32),), lambda x: op.nn.log_softmax(x, -1)),
        train=lambda torch, call, x: torch.log_softmax(x, int(call.attrs.axis)),
        couple=_fixed_axes("axis"),
    ),
}

ONNX = {
    "nn.batch_norm": onnx.batch_norm,
    "nn.instance_norm": onnx.instance_norm,
    "nn.group_norm": onnx.group_norm,
    "nn.layer_norm": onnx.layer_norm,
    "nn.rms_norm": onnx.rms_norm,
    "nn.softmax": onnx.over_axis("Softmax"),
    "nn.log_softmax": onnx.over_axis("LogSoftmax"),
}
