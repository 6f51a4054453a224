"""Convolutions, transposed ones, and sums of overlapping blocks."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.windows import Windows, halves, ints, pads
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

_SPATIAL = {1: "W", 2: "HW", 3: "DHW"}


def _conv(node: Node, inputs: Operands) -> Any:
    data, weight = inputs[0], inputs[1]
    rank = _spatial_rank(node, data, weight)
    windows = Windows.of(node, ir.static_shape(data)[2:], ir.static_shape(weight)[2:])
    result = getattr(relax.op.nn, f"conv{rank}d")(
        data,
        weight,
        strides=list(windows.strides),
        padding=[*windows.before, *windows.behind],
        dilation=list(windows.dilations),
        groups=int(node.attributes.get("group", 1)),
    )
    return biased(result, inputs[2], rank)


def _spatial_rank(node: Node, data: Value, weight: Value) -> int:
    """Return the number of spatial axes of a convolution.

    Raises
    ------
    ValueError
        If there is no such convolution.
    """
    rank = len(ir.static_shape(data)) - 2
    if rank not in _SPATIAL:
        raise ValueError(f"{rank} spatial dimensions are not supported")
    if len(ir.static_shape(weight)) != rank + 2:
        raise ValueError(f"its kernel has {len(ir.static_shape(weight)) - 2} spatial dimensions, its data {rank}")
    stated, kernel = node.attributes.get("kernel_shape"), ir.static_shape(weight)[2:]
    if stated and tuple(stated) != kernel:
        raise ValueError(f"its kernel_shape is {list(stated)}, its kernel is {list(kernel)}")
    return rank


def biased(value: Value, bias: Value | None, rank: int) -> Value:
    """Add one number per channel to an image of ``rank`` spatial axes."""
    return value if bias is None else relax.op.add(value, relax.op.reshape(bias, [1, -1, *[1] * rank]))


def _conv_transpose(node: Node, inputs: Operands) -> Any:
    """Settle how much is cut off in front and how large the result is, which ONNX states in four ways."""
    data, weight = inputs[0], inputs[1]
    rank = _spatial_rank(node, data, weight)
    extent, kernel = ir.static_shape(data)[2:], ir.static_shape(weight)[2:]
    strides, dilations = ints(node, "strides", rank), ints(node, "dilations", rank)
    extra = [int(each) for each in node.attributes.get("output_padding") or [0] * rank]
    natural = [
        (size - 1) * stride + (taps - 1) * dilation + 1 + more
        for size, stride, taps, dilation, more in zip(extent, strides, kernel, dilations, extra, strict=True)
    ]
    given = [int(each) for each in node.attributes.get("output_shape") or []]
    mode = node.text("auto_pad", "NOTSET") or "NOTSET"
    if mode not in ("NOTSET", "VALID", "SAME_UPPER", "SAME_LOWER"):
        raise ValueError(f"auto_pad {mode!r} is not supported")
    if mode.startswith("SAME") and not given:
        # No padding makes more of it, as ONNX Runtime has it.
        given = [min(size * stride, whole) for size, stride, whole in zip(extent, strides, natural, strict=True)]
    if given:
        # Some exporters write the batch and the channels, too.
        sizes = given[-rank:]
        cut = [max(whole - size, 0) for whole, size in zip(natural, sizes, strict=True)]
        front, _ = halves(cut, more_in_front=mode != "SAME_UPPER")
    else:
        front, behind = pads(node, rank) if mode == "NOTSET" else ((0,) * rank, (0,) * rank)
        sizes = [whole - a - b for whole, a, b in zip(natural, front, behind, strict=True)]
    if min(sizes) < 1:
        raise ValueError(f"its result would have the shape {sizes}")
    result = _transposed(node, data, weight, front, sizes, int(node.attributes.get("group", 1)))
    return biased(result, inputs[2], rank)


def _transposed(
    node: Node, data: Value, weight: Value, front: Sequence[int], sizes: Sequence[int], groups: int
) -> Value:
    """Return ``sizes`` positions of a transposed convolution, behind the first ``front`` ones.

    Parameters
    ----------
    node : Node
        Has ``strides`` and ``dilations``.
    data, weight : Expr
        ``[N, I, …]`` and ``[I, O / groups, …]``.
    front, sizes : sequence of int
        Of each spatial axis; what lies behind the last product is 0.
    groups : int
        Number of groups.
    """
    extent, kernel = ir.static_shape(data)[2:], ir.static_shape(weight)[2:]
    rank = len(extent)
    strides, dilations = ints(node, "strides", rank), ints(node, "dilations", rank)
    spans = [(taps - 1) * dilation + 1 for taps, dilation in zip(kernel, dilations, strict=True)]
    if max(dilations) > 1 and known(weight) is None:
        # TVM's kernels have no dilation; those of constant weights are not used.
        weight, dilations = _dilated(node, weight, dilations), (1,) * rank
    # TVM pads its data by what a window reaches beyond: that can't be negative.
    cut = [min(a, span - 1) for a, span in zip(front, spans, strict=True)]
    left = [(n - 1) * stride + span - a for n, stride, span, a in zip(extent, strides, spans, cut, strict=True)]
    skipped = [a - b for a, b in zip(front, cut, strict=True)]
    wanted = [min(size + skip, have) for size, skip, have in zip(sizes, skipped, left, strict=True)]
    behind = [min(have - want, span - 1) for have, want, span in zip(left, wanted, spans, strict=True)]
    made = [have - b for have, b in zip(left, behind, strict=True)]
    letters = _SPATIAL[rank]
    result = getattr(relax.op.nn, f"conv{rank}d_transpose")(
        data,
        weight,
        strides=list(strides),
        padding=[*cut, *behind],
        dilation=list(dilations),
        groups=groups,
        data_layout=f"NC{letters}",
        kernel_layout=f"IO{letters}",
    )
    if any(skipped) or made != wanted:
        result = relax.op.strided_slice(result, list(range(2, rank + 2)), skipped, wanted)
    missing = [size + skip - want for size, skip, want in zip(sizes, skipped, wanted, strict=True)]
    if any(missing):
        widths = [0, 0, 0, 0, *(width for each in missing for width in (0, each))]
        result = relax.op.nn.pad(result, widths)
    return result


def _dilated(node: Node, weight: Value, dilations: Sequence[int]) -> Value:
    """Return a kernel with zeros between its taps."""
    shape = list(ir.static_shape(weight))
    for axis, dilation in enumerate(dilations, start=2):
        if dilation == 1 or shape[axis] == 1:
            continue
        apart = relax.op.reshape(weight, [*shape[: axis + 1], 1, *shape[axis + 1 :]])
        widths = [0] * (2 * (len(shape) + 1))
        widths[2 * (axis + 1) + 1] = dilation - 1
        span = (shape[axis] - 1) * dilation + 1
        shape[axis] *= dilation
        weight = relax.op.reshape(relax.op.nn.pad(apart, widths), shape)
        shape[axis] = span
        weight = node.emit(relax.op.strided_slice(weight, [axis], [0], [span]))
    return weight


def _col2im(node: Node, inputs: Operands) -> Any:
    """Add up blocks that overlap: a transposed convolution in which every weight is 1 at one tap."""
    image, block = known(inputs[1]), known(inputs[2])
    if image is None or block is None:
        raise ValueError("a shape of the image or of its blocks that is computed from data is not supported")
    sizes, kernel = [int(each) for each in image], [int(each) for each in block]
    if len(sizes) not in _SPATIAL:
        raise ValueError(f"{len(sizes)} spatial dimensions are not supported")
    windows, shape, taps = Windows.of(node, sizes, kernel), ir.static_shape(inputs[0]), prod(kernel)
    channels, dtype = shape[1] // taps, str(inputs[0].ty.dtype)
    if shape[1] % taps or shape[2] != prod(windows.count):
        raise ValueError(f"{list(shape)} are no blocks of {kernel} of an image of {sizes}")
    data = relax.op.reshape(inputs[0], [shape[0], shape[1], *windows.count])
    ones = np.tile(np.eye(taps, dtype=dtype), (channels, 1)).reshape(channels * taps, 1, *kernel)
    return _transposed(node, node.emit(data), constant(ones), windows.before, sizes, channels)


CONVERTERS: dict[str, Converter] = {
    "Conv": _conv,
    "ConvTranspose": _conv_transpose,
    "Col2Im": _col2im,
}
