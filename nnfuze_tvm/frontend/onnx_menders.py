"""Converters that replace TVM's where its result is refused later, or hides the structure from our passes.

Each takes ``(builder, inputs, attributes, opset)`` and returns a Relax expression, or ``NotImplemented`` to
leave the node to TVM's converter.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import GenericConst

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Value

Mender = Callable[[relax.BlockBuilder, list[Value], dict[str, Any], int], Any]


def _constant(value: Value | None) -> np.ndarray | None:
    return value.value.numpy() if isinstance(value, GenericConst) else None


def _clip(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """R.clip, R.nn.relu or a single bound, where TVM's converter calls anonymous TE functions."""
    data = inputs[0]
    dtype = str(data.ty.dtype)
    if opset < 11:
        bounds = [relax.const(attrs[key], dtype) if key in attrs else None for key in ("min", "max")]
    else:
        bounds = [inputs[1], inputs[2]]
    # Scalars by definition, some exporters write a vector of one.
    least, most = (None if value is None else value.item() for value in map(_constant, bounds))
    if any(value is not None and np.isnan(value) for value in (least, most)):
        return NotImplemented
    if least is not None and most is not None and np.isfinite([least, most]).all() and least <= most:
        return relax.op.clip(data, least, most)
    low, high = bounds
    if least == 0 and high is None:
        return relax.op.nn.relu(data)
    if low is not None:
        data = relax.op.maximum(data, low)
    return data if high is None else relax.op.minimum(data, high)


def _pairwise(combine: Callable[[Value, Value], Value]) -> Mender:
    """Convert an n-ary elementwise operator into a chain, where TVM's converter stacks and reduces."""

    def mend(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
        return reduce(combine, inputs)

    return mend


def _mean(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    total = reduce(relax.op.add, inputs)
    return relax.op.multiply(total, relax.const(1 / len(inputs), str(inputs[0].ty.dtype)))


def _dropout(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """Nothing: inference keeps every element."""
    if attrs["tvm_custom"]["num_outputs"] == 1:
        return inputs[0]
    shape = ir.static_shape(inputs[0])
    mask = np.ones(shape, dtype=bool) if opset >= 10 else np.ones(shape, dtype=str(inputs[0].ty.dtype))
    return relax.Tuple([inputs[0], relax.const(mask)])


def _gemm(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """Scale the constant weight instead of the activations."""
    weight = _constant(inputs[1])
    alpha = attrs.get("alpha", 1.0)
    if weight is None or alpha == 1.0:
        return NotImplemented
    inputs[1] = relax.const((weight * np.float32(alpha)).astype(weight.dtype))
    attrs["alpha"] = 1.0
    return NotImplemented


def _pad(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """R.nn.pad for constant padding by constant amounts."""
    if attrs.get("mode", b"constant") != b"constant":
        return NotImplemented
    rank = len(ir.static_shape(inputs[0]))
    if opset < 11:
        pads, fill = np.array(attrs.get("pads", attrs.get("paddings"))), attrs.get("value", 0.0)
        axes: list[int] = list(range(rank))
    else:
        amounts, value = _constant(inputs[1]), _constant(inputs[2])
        if amounts is None or (inputs[2] is not None and value is None):
            return NotImplemented
        pads, fill = amounts, 0 if value is None else value.item()
        chosen = _constant(inputs[3])
        if inputs[3] is not None and chosen is None:
            return NotImplemented
        axes = list(range(rank)) if chosen is None else [int(axis) % rank for axis in chosen]
    if pads is None or (pads < 0).any():
        return NotImplemented
    width = [0] * (2 * rank)
    for index, axis in enumerate(axes):
        width[2 * axis], width[2 * axis + 1] = int(pads[index]), int(pads[index + len(axes)])
    return relax.op.nn.pad(inputs[0], width, "constant", float(fill))


def _conv(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """Turn ``auto_pad`` into numbers, where TVM's converter emits a dynamic pad."""
    mode = attrs.get("auto_pad", b"NOTSET")
    mode = mode.decode() if isinstance(mode, bytes) else mode
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return NotImplemented
    sizes = ir.static_shape(inputs[0])[2:]
    kernel = ir.static_shape(inputs[1])[2:]
    strides = attrs.get("strides", [1] * len(sizes))
    dilations = attrs.get("dilations", [1] * len(sizes))
    before, after = [], []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    attrs["pads"] = (*before, *after)
    attrs["auto_pad"] = b"NOTSET"
    return NotImplemented


def _global_average(_: relax.BlockBuilder, inputs: list[Value], attrs: dict[str, Any], opset: int) -> Any:
    """Return a mean, where TVM's kernel for one and three axes has loops of varying length."""
    rank = len(ir.static_shape(inputs[0]))
    return NotImplemented if rank == 4 else relax.op.mean(inputs[0], list(range(2, rank)), keepdims=True)


MENDERS: dict[str, Mender] = {
    "Clip": _clip,
    "Sum": _pairwise(relax.op.add),
    "Min": _pairwise(relax.op.minimum),
    "Max": _pairwise(relax.op.maximum),
    "Mean": _mean,
    "Dropout": _dropout,
    "Gemm": _gemm,
    "Pad": _pad,
    "Conv": _conv,
    "GlobalAveragePool": _global_average,
}
