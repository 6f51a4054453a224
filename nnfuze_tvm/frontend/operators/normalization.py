"""Normalization: by moments that the file stores, or by those of the values themselves."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.shapes import cast
from nnfuze_tvm.frontend.operators.values import dtype_of, scalar
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _wide(node: Node, value: Value) -> Value:
    """Return a value in the type that moments are computed in: at least float32."""
    return node.emit(cast(value, "float32")) if dtype_of(value) == "float16" else value


def _epsilon(node: Node, default: float = 1e-5) -> float:
    return float(node.attributes.get("epsilon", default))


def _axes_from(node: Node, data: Value) -> list[int]:
    """Return the axes from attribute ``axis`` on."""
    rank = len(ir.static_shape(data))
    axis = int(node.attributes.get("axis", -1))
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} of a tensor of {rank} dimensions is not supported")
    return list(range(axis % rank, rank))


def _spread(value: Value | None, shape: tuple[int, ...], fill: float, like: Value) -> Value | None:
    """Return a factor or summand of the normalized axes in the whole ``shape`` of these; None where it has others."""
    if value is None:
        return constant(np.full(shape, fill), dtype_of(like))
    own = ir.static_shape(value)
    if own == shape and dtype_of(value) == dtype_of(like):
        return value
    numbers = known(value)
    if numbers is None or len(own) > len(shape):
        return None
    return constant(np.broadcast_to(numbers, shape), dtype_of(like))


def _layer_norm(node: Node, inputs: Operands) -> Any:
    data, scale, bias = inputs[0], inputs[1], inputs[2]
    axes = _axes_from(node, data)
    wanted = [bool(name) for name in node.proto.output]
    stash = {1: "float32", 11: "float64", 10: "float16"}.get(int(node.attributes.get("stash_type", 1)))
    if stash is None:
        raise ValueError(f"stash_type {node.attributes['stash_type']} is not supported")
    result, mean, inverse = _standardized(node, data, scale, bias, axes, _epsilon(node), moments=any(wanted[1:]))
    return [result] if mean is None else [result, cast(mean, stash), cast(inverse, stash)]


def _standardized(
    node: Node,
    data: Value,
    scale: Value | None,
    bias: Value | None,
    axes: list[int],
    epsilon: float,
    moments: bool,
) -> tuple[Value, Value | None, Value | None]:
    """Return layer normalization over the last ``axes``, and with ``moments`` the mean and 1 / standard deviation."""
    wide, shape = _wide(node, data), ir.static_shape(data)
    # TVM's kernel knows no float64.
    if moments or dtype_of(wide) == "float64":
        mean = node.emit(relax.op.mean(wide, axes, keepdims=True))
        centered = node.emit(relax.op.subtract(wide, mean))
        variance = relax.op.mean(relax.op.multiply(centered, centered), axes, keepdims=True)
        deviation = relax.op.sqrt(relax.op.add(variance, scalar(epsilon, wide)))
        inverse = node.emit(relax.op.divide(scalar(1, wide), deviation))
        normal = relax.op.multiply(centered, inverse)
        return _scaled(node, normal, scale, bias, dtype_of(data)), mean, inverse
    normalized = tuple(shape[axis] for axis in axes)
    gamma, beta = _spread(scale, normalized, 1, wide), _spread(bias, normalized, 0, wide)
    whole = gamma is not None and beta is not None
    if gamma is None or beta is None:
        gamma, beta = _spread(None, normalized, 1, wide), _spread(None, normalized, 0, wide)
    # A kernel that reduces all axes has none to run over.
    rows = relax.op.reshape(wide, [1, *shape]) if len(axes) == len(shape) else wide
    normal = relax.op.nn.layer_norm(rows, gamma, beta, list(range(-len(axes), 0)), epsilon)
    normal = relax.op.reshape(normal, shape) if len(axes) == len(shape) else normal
    return _scaled(node, normal, None if whole else scale, None if whole else bias, dtype_of(data)), None, None


def _scaled(node: Node, value: Value, scale: Value | None, bias: Value | None, dtype: str) -> Value:
    """Multiply and shift, in whatever broadcasts to the value; the result is of ``dtype``."""
    value = node.emit(value)
    if scale is not None:
        value = node.emit(relax.op.multiply(value, cast(scale, dtype_of(value))))
    if bias is not None:
        value = node.emit(relax.op.add(value, cast(bias, dtype_of(value))))
    return cast(value, dtype)


def _rms_norm(node: Node, inputs: Operands) -> Any:
    scale = inputs[1]
    return _root_mean_square(node, inputs[0], scale, _axes_from(node, inputs[0]), _epsilon(node), dtype_of(scale))


def _root_mean_square(node: Node, data: Value, scale: Value, axes: list[int], epsilon: float, dtype: str) -> Value:
    wide, shape = _wide(node, data), ir.static_shape(data)
    normalized = tuple(shape[axis] for axis in axes)
    gamma = _spread(scale, normalized, 1, wide)
    rest = scale if gamma is None else None
    if gamma is None:
        gamma = _spread(None, normalized, 1, wide)
    rows = relax.op.reshape(wide, [1, *shape]) if len(axes) == len(shape) else wide
    normal = relax.op.nn.rms_norm(rows, gamma, list(range(-len(axes), 0)), epsilon)
    normal = relax.op.reshape(normal, shape) if len(axes) == len(shape) else normal
    return _scaled(node, normal, rest, None, dtype)


def _simplified(node: Node, inputs: Operands) -> Any:
    """RMS normalization as ONNX Runtime calls it."""
    if node.outputs > 1:
        raise ValueError("its second output is not supported")
    return _rms_norm(node, inputs)


def _skip_layer_norm(node: Node, inputs: Operands) -> Any:
    """Normalize the sum of two tensors and perhaps a bias along the last axis."""
    return _skipped(node, inputs[0], inputs[1], inputs[4], inputs[2], inputs[3], root_only=False)


def _skip_rms_norm(node: Node, inputs: Operands) -> Any:
    return _skipped(node, inputs[0], inputs[1], inputs[3], inputs[2], None, root_only=True)


def _skipped(
    node: Node,
    data: Value,
    skip: Value,
    summand: Value | None,
    gamma: Value,
    beta: Value | None,
    root_only: bool,
) -> list[Value]:
    if any(node.proto.output[1:3]):
        raise ValueError("its outputs mean and inv_std_var are not supported")
    total = relax.op.add(data, skip)
    total = node.emit(total if summand is None else relax.op.add(total, summand))
    axes, epsilon = [len(ir.static_shape(total)) - 1], _epsilon(node, 1e-12)
    if root_only:
        result = _root_mean_square(node, total, gamma, axes, epsilon, dtype_of(data))
    else:
        result, _, _ = _standardized(node, total, gamma, beta, axes, epsilon, moments=False)
    # Those in between have no name.
    return [result, total, total, total][: node.outputs]


def _batch_norm(node: Node, inputs: Operands) -> Any:
    if node.attributes.get("training_mode", 0) or any(node.proto.output[1:]):
        raise ValueError("training mode is not supported: export the network for inference")
    if not node.attributes.get("spatial", 1):
        raise ValueError("spatial 0 is not supported")
    data = _wide(node, inputs[0])
    if len(ir.static_shape(data)) < 2:
        raise ValueError("a tensor of one dimension is not supported")
    moments = [cast(each, dtype_of(data)) for each in list(inputs)[1:5]]
    normal = relax.op.nn.batch_norm(data, *moments, axis=1, epsilon=_epsilon(node), training=False)
    return [cast(node.emit(relax.TupleGetItem(node.emit(normal), 0)), dtype_of(inputs[0]))]


def _instance_norm(node: Node, inputs: Operands) -> Any:
    data = _wide(node, inputs[0])
    rank = len(ir.static_shape(data))
    normal = _normal(node, data, list(range(2, rank)), _epsilon(node))
    scale, bias = (relax.op.reshape(cast(each, dtype_of(data)), [-1, *[1] * (rank - 2)]) for each in list(inputs)[1:3])
    return cast(node.emit(relax.op.add(relax.op.multiply(normal, scale), bias)), dtype_of(inputs[0]))


def _normal(node: Node, data: Value, axes: list[int], epsilon: float) -> Value:
    """Return ``data`` less its mean over some axes, divided by its standard deviation."""
    centered = node.emit(relax.op.subtract(data, relax.op.mean(data, axes, keepdims=True)))
    variance = relax.op.mean(relax.op.multiply(centered, centered), axes, keepdims=True)
    return relax.op.divide(centered, relax.op.sqrt(relax.op.add(variance, scalar(epsilon, data))))


def _group_norm(node: Node, inputs: Operands) -> Any:
    """Normalize groups of channels; up to opset 20 scale and bias are of groups."""
    data, groups = _wide(node, inputs[0]), int(node.attributes["num_groups"])
    batch, channels, *spatial = ir.static_shape(data)
    if groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels are no {groups} groups")
    rows = node.emit(relax.op.reshape(data, [batch, groups, channels // groups * prod(spatial)]))
    normal = _normal(node, rows, [2], _epsilon(node))
    per = (groups, channels // groups)
    normal = relax.op.reshape(normal, [batch, *per, prod(spatial)])
    shape = [groups, 1, 1] if node.opset < 21 else [*per, 1]
    scale, bias = (relax.op.reshape(cast(each, dtype_of(data)), shape) for each in list(inputs)[1:3])
    result = relax.op.reshape(relax.op.add(relax.op.multiply(normal, scale), bias), [batch, channels, *spatial])
    return cast(node.emit(result), dtype_of(inputs[0]))


def _lp_normalization(node: Node, inputs: Operands) -> Any:
    data, p = _wide(node, inputs[0]), int(node.attributes.get("p", 2))
    if p not in (1, 2):
        raise ValueError(f"p {p} is not supported")
    axis = [int(node.attributes.get("axis", -1))]
    if p == 1:
        norm = relax.op.sum(relax.op.abs(data), axis, keepdims=True)
    else:
        norm = relax.op.sqrt(relax.op.sum(relax.op.multiply(data, data), axis, keepdims=True))
    norm = node.emit(norm)
    # Where all values are 0, so is the result.
    one = relax.op.where(relax.op.equal(norm, scalar(0, norm)), scalar(1, norm), norm)
    return cast(node.emit(relax.op.divide(data, one)), dtype_of(inputs[0]))


def _mean_variance(node: Node, inputs: Operands) -> Any:
    data = _wide(node, inputs[0])
    axes = [int(axis) for axis in node.attributes.get("axes", (0, 2, 3))]
    centered = node.emit(relax.op.subtract(data, relax.op.mean(data, axes, keepdims=True)))
    variance = relax.op.mean(relax.op.multiply(centered, centered), axes, keepdims=True)
    deviation = relax.op.add(relax.op.sqrt(variance), scalar(1e-9, data))
    return cast(node.emit(relax.op.divide(centered, deviation)), dtype_of(inputs[0]))


def _lrn(node: Node, inputs: Operands) -> Any:
    """Divide by a power of the squares of neighbouring channels, summed channel by channel."""
    data, size = _wide(node, inputs[0]), int(node.attributes["size"])
    rank, channels = len(ir.static_shape(data)), ir.static_shape(data)[1]
    alpha, beta, bias = (
        float(node.attributes.get(name, default)) for name, default in (("alpha", 1e-4), ("beta", 0.75), ("bias", 1.0))
    )
    if size < 1:
        raise ValueError(f"size {size}")
    # What lies further away than there are channels is nothing.
    before, behind = (min(each, channels - 1) for each in ((size - 1) // 2, size // 2))
    widths = [0, 0, before, behind, *[0] * (2 * rank - 4)]
    squares = node.emit(relax.op.nn.pad(relax.op.multiply(data, data), widths))
    total = relax.op.strided_slice(squares, [1], [0], [channels])
    for first in range(1, 1 + before + behind):
        total = relax.op.add(total, relax.op.strided_slice(squares, [1], [first], [first + channels]))
    base = relax.op.add(relax.op.multiply(total, scalar(alpha / size, data)), scalar(bias, data))
    return cast(node.emit(relax.op.divide(data, relax.op.power(base, scalar(beta, data)))), dtype_of(inputs[0]))


CONVERTERS: dict[str, Converter] = {
    "BatchNormalization": _batch_norm,
    "InstanceNormalization": _instance_norm,
    "LayerNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "RMSNormalization": _rms_norm,
    "LpNormalization": _lp_normalization,
    "MeanVarianceNormalization": _mean_variance,
    "LRN": _lrn,
    "SimplifiedLayerNormalization": _simplified,
    "com.microsoft.SimplifiedLayerNormalization": _simplified,
    "com.microsoft.SkipLayerNormalization": _skip_layer_norm,
    "com.microsoft.SkipSimplifiedLayerNormalization": _skip_rms_norm,
}
