"""Transposed convolutions: every input pixel adds its products to a window of the output.

They have no integer form of their own: `TransposedConvolutions` makes convolutions of them before.
"""

from __future__ import annotations

from functools import partial
from math import prod
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call

from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops import convolution
from nnfuze_tvm.graph.ops._windows import accumulator, channels_first, from_channels_first, padded_to, to_channels_first
from nnfuze_tvm.graph.ops.operator import Example, Operator


def evaluate(call: Call, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the result of a transposed convolution; integers are summed exactly."""
    attrs, kind = call.attrs, accumulator(data.dtype)
    out_layout = str(attrs.out_layout or attrs.data_layout)
    # [N, I, *spatial] and [O of one group, I of all groups, *kernel]
    data = to_channels_first(data, str(attrs.data_layout)).astype(kind)
    weight = to_channels_first(weight, str(attrs.kernel_layout)).astype(kind)
    strides, dilation, padding = ([int(e) for e in f] for f in (attrs.strides, attrs.dilation, attrs.padding))
    images, groups, outputs, shape = data.shape[0], int(attrs.groups), weight.shape[0], data.shape[2:]
    sizes = [size for size, letter in zip(static_shape(call), out_layout, strict=True) if letter not in "NC"]

    def places(tap: tuple[int, ...]) -> list[slice]:
        """Return where the products of one weight per channel go."""
        starts = [t * d for t, d in zip(tap, dilation, strict=True)]
        return [slice(a, a + (n - 1) * s + 1, s) for a, n, s in zip(starts, shape, strides, strict=True)]

    reach = [place.stop for place in places(tuple(k - 1 for k in weight.shape[2:]))]
    whole = [max(r, b + size) for r, b, size in zip(reach, padding, sizes, strict=False)]
    result = np.zeros((images, outputs * groups, *whole), kind)
    own = data.reshape(images, groups, -1, *shape)
    taps = weight.reshape(outputs, groups, -1, *weight.shape[2:])
    for tap in np.ndindex(*weight.shape[2:]):
        products = np.einsum("ngi...,ogi->ngo...", own, taps[(..., *tap)], optimize=True)
        result[(slice(None), slice(None), *places(tap))] += products.reshape(images, -1, *shape)
    inside = [slice(b, b + size) for b, size in zip(padding, sizes, strict=False)]
    return from_channels_first(result[(slice(None), slice(None), *inside)], out_layout)


def train(torch: Any, call: Call, data: Any, weight: Any) -> Any:
    """Return what `evaluate` does."""
    attrs, out_layout = call.attrs, str(call.attrs.out_layout or call.attrs.data_layout)
    data = data.permute(channels_first(str(attrs.data_layout)))
    weight = weight.permute(channels_first(str(attrs.kernel_layout))).transpose(0, 1)
    strides, dilation, padding = ([int(e) for e in field] for field in (attrs.strides, attrs.dilation, attrs.padding))
    function = getattr(torch.nn.functional, f"conv_transpose{data.ndim - 2}d")
    result = function(data, weight, None, strides, 0, 0, int(attrs.groups), dilation)
    order = channels_first(out_layout)
    before = [-pad for pad in padding[: data.ndim - 2]]
    inside = padded_to(torch, result, before, [static_shape(call)[axis] for axis in order[2:]])
    return inside.permute(np.argsort(order).tolist())


def macs(call: Call) -> int:
    """Return the multiply-accumulates of a transposed convolution."""
    weight = static_shape(call.args[1])
    return prod(static_shape(call.args[0])) * prod(weight) // weight[str(call.attrs.kernel_layout).index("I")]


def _example(rank: int, groups: int, stride: int, kernel: int) -> Example:
    call = getattr(relax.op.nn, f"conv{rank}d_transpose")
    shapes = ((1, 16, *[6] * rank), (16, 16 // groups, *[kernel] * rank))
    return Example(shapes, partial(call, strides=stride, padding=1, groups=groups), constants=1)


def _operator(rank: int, kernels: tuple[str, ...]) -> Operator:
    return Operator(
        effect="layer",
        evaluate=evaluate,
        train=train,
        examples=(_example(rank, 1, 2, 4), _example(rank, 1, 1, 3), _example(rank, 4, 2, 3)),
        layer=convolution.layer,
        macs=macs,
        couple=convolution.couple,
        cut=convolution.cut,
        quantizes=True,
        half=True,
        kernels=kernels,
    )


OPERATORS = {
    "nn.conv1d_transpose": _operator(1, ("conv2d", "depthwise", "winograd")),
    "nn.conv2d_transpose": _operator(2, ("conv2d", "depthwise", "winograd")),
    "nn.conv3d_transpose": _operator(3, ("conv2d", "depthwise", "winograd")),
}

ONNX = dict.fromkeys(OPERATORS, onnx.transposed_convolution)
