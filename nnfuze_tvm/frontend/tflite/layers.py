"""Operators with weights, pooling and resizing: in these files the channels come last, in ONNX networks first."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from nnfuze_tvm.frontend.tflite.file import Operator
from nnfuze_tvm.frontend.tflite.writer import FIRST, LAST, Writer

_SAME = 0


def _pads(op: Operator, window: tuple[int, int], dilation: tuple[int, int] = (1, 1)) -> list[int]:
    """Return what is padded before and after rows and columns."""
    assert op.inputs[0] is not None
    if op.options.Padding() != _SAME:
        return [0, 0, 0, 0]
    before, after = [], []
    sizes, strides = op.inputs[0].shape[1:3], (op.options.StrideH(), op.options.StrideW())
    for size, stride, taps, apart in zip(sizes, strides, window, dilation, strict=True):
        total = max((-(-size // stride) - 1) * stride + (taps - 1) * apart + 1 - size, 0)
        before.append(total // 2)
        after.append(total - total // 2)
    return [*before, *after]


def _bias(w: Writer, index: int) -> list[str]:
    if not w.has(index):
        return []
    if w.given(index).dtype == "int32" and w.given(index).quantization is None:
        raise ValueError("its bias is int32 without a scale")
    return [w.read(index)]


def convolution(depthwise: bool = False) -> Callable[[Writer, Operator], None]:
    """CONV_2D, with weights ``[out, rows, columns, in]``; DEPTHWISE_CONV_2D, with ``[1, rows, columns, out]``."""

    def convert(w: Writer, op: Operator) -> None:
        options, weights, depth = op.options, w.given(1).shape, w.given(0).shape[3]
        dilation = (options.DilationHFactor(), options.DilationWFactor())
        result = w.add(
            "Conv",
            [w.read(0, FIRST), w.read(1, (3, 0, 1, 2) if depthwise else FIRST), *_bias(w, 2)],
            kernel_shape=weights[1:3],
            strides=[options.StrideH(), options.StrideW()],
            dilations=dilation,
            pads=_pads(op, weights[1:3], dilation),  # type: ignore[arg-type]
            group=depth if depthwise else depth // weights[3],
        )
        w.write(w.activated(result, options.FusedActivationFunction()), order=LAST)

    return convert


def transposed(w: Writer, op: Operator) -> None:
    """TRANSPOSE_CONV of a shape, weights ``[out, rows, columns, in]`` and data."""
    options, weights, x = op.options, w.given(1), w.given(2)
    sizes = [int(size) for size in op.constant(0)[1:3]]
    before, after, extra = [], [], []
    strides = (options.StrideH(), options.StrideW())
    for out, size, stride, taps in zip(sizes, x.shape[1:3], strides, weights.shape[1:3], strict=True):
        total = (size - 1) * stride + taps - out
        # What lies beyond the last window is zeros.
        extra.append(max(-total, 0))
        first = max(total, 0) // 2 if options.Padding() == _SAME else 0
        before.append(first)
        after.append(max(total, 0) - first)
    result = w.add(
        "ConvTranspose",
        [w.read(2, FIRST), w.read(1, (3, 0, 1, 2)), *_bias(w, 3)],
        kernel_shape=weights.shape[1:3],
        strides=strides,
        pads=[*before, *after],
        output_padding=extra,
    )
    w.write(w.activated(result, options.FusedActivationFunction()), order=LAST)


def dense(w: Writer, op: Operator) -> None:
    """FULLY_CONNECTED, with weights ``[out, in]``."""
    options = op.options
    if options.WeightsFormat():
        raise ValueError("its weights are shuffled, which is not supported")
    rows = [-1, w.given(1).shape[1]]
    x = w.read(0) if len(w.given(0).shape) == 2 and w.given(0).shape[1] == rows[1] else w.read(0, shape=rows)
    result = w.add("Gemm", [x, w.read(1), *_bias(w, 2)], transB=1)
    shape = op.outputs[0].shape
    result = w.activated(result, options.FusedActivationFunction())
    w.write(result, shape=None if len(shape) == 2 else shape)


def pool(kind: str) -> Callable[[Writer, Operator], None]:
    """AVERAGE_POOL_2D and MAX_POOL_2D; the average is of what is inside."""

    def convert(w: Writer, op: Operator) -> None:
        options = op.options
        window = (options.FilterHeight(), options.FilterWidth())
        result = w.add(
            kind,
            [w.read(0, FIRST)],
            kernel_shape=window,
            strides=[options.StrideH(), options.StrideW()],
            pads=_pads(op, window),
        )
        w.write(w.activated(result, options.FusedActivationFunction()), order=LAST)

    return convert


def resize(mode: str) -> Callable[[Writer, Operator], None]:
    """RESIZE_BILINEAR and RESIZE_NEAREST_NEIGHBOR to a size that is known."""

    def convert(w: Writer, op: Operator) -> None:
        options = op.options
        nearest: dict[str, Any] = {"nearest_mode": "floor"} if mode == "nearest" else {}
        if options.AlignCorners():
            coordinates = "align_corners"
        else:
            coordinates = "half_pixel" if options.HalfPixelCenters() else "asymmetric"
        if nearest and coordinates != "asymmetric":
            nearest = {"nearest_mode": "round_prefer_ceil"}
        x = w.given(0)
        sizes = [x.shape[0], x.shape[3], *map(int, op.constant(1))]
        inputs = [w.read(0, FIRST), "", "", w.constant(sizes, "int64")]
        result = w.add("Resize", inputs, mode=mode, coordinate_transformation_mode=coordinates, **nearest)
        w.write(result, order=LAST)

    return convert


def space_to_depth(w: Writer, op: Operator) -> None:
    """SPACE_TO_DEPTH: blocks become channels, row by row."""
    value = w.moved(w.raw(0), FIRST)
    block = op.options.BlockSize()
    w.write(w.add("SpaceToDepth", [value], blocksize=block), order=LAST, stored=True)


def depth_to_space(w: Writer, op: Operator) -> None:
    """DEPTH_TO_SPACE: channels become blocks, row by row."""
    value = w.moved(w.raw(0), FIRST)
    w.write(w.add("DepthToSpace", [value], blocksize=op.options.BlockSize(), mode="DCR"), order=LAST, stored=True)


def space_to_batch(w: Writer, op: Operator) -> None:
    """SPACE_TO_BATCH_ND of images: what is a block apart becomes an image of its own."""
    (rows, columns), pads = map(int, op.constant(1)), op.constant(2)
    n, height, width, channels = w.given(0).shape
    (top, bottom), (left, right) = pads.tolist()
    value = _padded(w, 0, [0, top, left, 0, 0, bottom, right, 0])
    height, width = (height + top + bottom) // rows, (width + left + right) // columns
    value = w.moved(value, shape=[n, height, rows, width, columns, channels])
    value = w.moved(value, (2, 4, 0, 1, 3, 5))
    w.write(w.moved(value, shape=op.outputs[0].shape), stored=True)


def batch_to_space(w: Writer, op: Operator) -> None:
    """BATCH_TO_SPACE_ND of images: the way back."""
    (rows, columns), crops = map(int, op.constant(1)), op.constant(2)
    n, height, width, channels = w.given(0).shape
    value = w.moved(w.raw(0), shape=[rows, columns, n // (rows * columns), height, width, channels])
    value = w.moved(value, (2, 3, 0, 4, 1, 5))
    value = w.moved(value, shape=[n // (rows * columns), height * rows, width * columns, channels])
    ends = [height * rows - int(crops[0, 1]), width * columns - int(crops[1, 1])]
    if crops.any():
        bounds = (crops[:, 0], np.array(ends), np.array([1, 2]))
        value = w.add("Slice", [value, *(w.constant(bound, "int64") for bound in bounds)])
    w.write(value, stored=True)


def pad(w: Writer, op: Operator) -> None:
    """PAD and PADV2 with a constant."""
    pads = op.constant(1).astype("int64")
    value = op.constant(2).ravel()[0] if w.has(2) else None
    w.write(_padded(w, 0, [*pads[:, 0].tolist(), *pads[:, 1].tolist()], value), stored=True)


def mirror_pad(w: Writer, op: Operator) -> None:
    """MIRROR_PAD, with the rim (SYMMETRIC) or without (REFLECT)."""
    if op.options.Mode() != 0:
        raise ValueError("padding that repeats the rim is not supported")
    pads = op.constant(1).astype("int64")
    ends = w.constant([*pads[:, 0].tolist(), *pads[:, 1].tolist()], "int64")
    w.write(w.add("Pad", [w.raw(0), ends], mode="reflect"), stored=True)


def _padded(w: Writer, index: int, pads: list[int], value: object = None) -> str:
    """Return an input, as stored, with a rim of one value; by default what stands for zero."""
    if not any(pads):
        return w.raw(index)
    tensor = w.given(index)
    if value is None:
        value = tensor.quantization.zero_point[0] if tensor.quantization else 0
    return w.add("Pad", [w.raw(index), w.constant(pads, "int64"), w.constant(value, tensor.dtype)])
