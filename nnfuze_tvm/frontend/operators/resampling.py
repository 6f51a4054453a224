"""Images of another size: Resize, Upsample, and what is cut off or added around the middle."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.interpolation import Axis, Kernel, cubic, linear, taps
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

# More taps than this per pixel are a matrix product.
_GATHERED_TAPS = 4


def _resize(node: Node, inputs: Operands) -> Any:
    if node.opset < 11:
        return _upsample(node, inputs)
    coordinates = node.text("coordinate_transformation_mode", "half_pixel")
    axes = _axes(node, inputs, with_roi=coordinates == "tf_crop_and_resize")
    rounding = node.text("nearest_mode", "round_prefer_floor")
    return _resized(node, inputs[0], axes, coordinates, node.text("mode", "nearest"), rounding)


def _upsample(node: Node, inputs: Operands) -> Any:
    """Resize as it was before opset 11."""
    scales = known(inputs[1]) if node.opset >= 9 else np.array(node.attributes["scales"], np.float32)
    if scales is None:
        raise ValueError("scales that are computed from data are not supported")
    axes = _scaled(ir.static_shape(inputs[0]), scales)
    return _resized(node, inputs[0], axes, "asymmetric", node.text("mode", "nearest"), "outwards")


def _scaled(shape: Sequence[int], scales: np.ndarray) -> list[Axis]:
    if len(scales) != len(shape):
        raise ValueError(f"{len(scales)} scales for {len(shape)} dimensions are not supported")
    # A product in float32 may be a whole number where that of exact ones is just below it.
    return [
        Axis(n, int(np.float32(n) * np.float32(scale)), float(scale)) for n, scale in zip(shape, scales, strict=True)
    ]


def _given(value: Value | None, what: str) -> np.ndarray | None:
    """Return an optional constant operand; one without elements is left out."""
    numbers = known(value)
    if value is not None and numbers is None:
        raise ValueError(f"{what} computed from data are not supported")
    return None if numbers is None or numbers.size == 0 else numbers


def _axes(node: Node, inputs: Operands, with_roi: bool) -> list[Axis]:
    """Return all axes of the data as `Resize` from opset 11 on wants them."""
    shape = ir.static_shape(inputs[0])
    rank = len(shape)
    chosen = [int(axis) % rank for axis in node.attributes.get("axes") or range(rank)]
    scales, sizes = _given(inputs[2], "scales"), _given(inputs[3], "sizes")
    own = [shape[axis] for axis in chosen]
    if sizes is not None:
        if len(sizes) != len(own):
            raise ValueError(f"{len(sizes)} sizes for {len(own)} axes are not supported")
        found = _sized(own, [int(size) for size in sizes], node.text("keep_aspect_ratio_policy", "stretch"))
    elif scales is not None:
        found = _scaled(own, scales)
    else:
        raise ValueError("neither scales nor sizes are given")
    roi = _given(inputs[1], "regions") if with_roi else None
    if roi is not None:
        count = len(own)
        found = [
            Axis(axis.length, axis.size, axis.scale, float(roi[n]), float(roi[count + n]))
            for n, axis in enumerate(found)
        ]
    result = [Axis(n, n, 1.0) for n in shape]
    for axis, each in zip(chosen, found, strict=True):
        result[axis] = each
    return result


def _sized(lengths: Sequence[int], sizes: Sequence[int], policy: str) -> list[Axis]:
    scales = [size / length for size, length in zip(sizes, lengths, strict=True)]
    if policy == "stretch":
        return [Axis(n, size, scale) for n, size, scale in zip(lengths, sizes, scales, strict=True)]
    if policy not in ("not_larger", "not_smaller"):
        raise ValueError(f"keep_aspect_ratio_policy {policy!r} is not supported")
    scale = min(scales) if policy == "not_larger" else max(scales)
    return [Axis(n, int(scale * n + 0.5), scale) for n in lengths]


def _resized(node: Node, data: Value, axes: list[Axis], coordinates: str, mode: str, rounding: str) -> Value:
    if any(axis.size < 1 for axis in axes):
        raise ValueError(f"its result would have the shape {[axis.size for axis in axes]}")
    if mode == "nearest":
        if node.attributes.get("antialias", 0):
            raise ValueError("antialias with mode 'nearest' is not supported")
        result = _nearest(node, data, axes, coordinates, rounding)
    elif mode in ("linear", "bilinear", "cubic"):
        kernel = cubic(float(node.attributes.get("cubic_coeff_a", -0.75))) if mode == "cubic" else linear()
        result = _interpolated(node, data, axes, coordinates, kernel)
    else:
        raise ValueError(f"mode {mode!r} is not supported")
    return _extrapolated(node, result, axes) if coordinates == "tf_crop_and_resize" else result


def _nearest(node: Node, data: Value, axes: list[Axis], coordinates: str, rounding: str) -> Value:
    """Return copies of pixels, by constant indices axis by axis."""
    indices = [axis.nearest(coordinates, rounding) for axis in axes]
    factors = [axis.size // axis.length for axis in axes]
    repeats = all(
        len(index) == axis.length * factor and np.array_equal(index, np.arange(len(index)) // factor)
        for index, axis, factor in zip(indices, axes, factors, strict=True)
        if factor
    )
    if repeats and len(axes) == 4 and factors[:2] == [1, 1] and min(factors) >= 1 and max(factors) > 1:
        return relax.op.image.resize2d(
            data,
            relax.ShapeExpr([axes[2].size, axes[3].size]),
            method="nearest_neighbor",
            coordinate_transformation_mode="asymmetric",
            rounding_method="floor",
        )
    for axis, index in enumerate(indices):
        if not np.array_equal(index, np.arange(axes[axis].length)):
            data = node.emit(relax.op.take(data, constant(index), axis, mode="clip"))
    return data


def _interpolated(node: Node, data: Value, axes: list[Axis], coordinates: str, kernel: Kernel) -> Value:
    """Return weighted sums of pixels, axis by axis: every mode is separable."""
    dtype = str(data.ty.dtype)
    if not dtype.startswith("float"):
        # The specification rounds, ONNX Runtime cuts off.
        raise ValueError(f"interpolation of {dtype} is not supported, runtimes disagree on it: use mode nearest")
    antialias, exclude = (bool(node.attributes.get(name, 0)) for name in ("antialias", "exclude_outside"))
    if _is_upsampling(axes, coordinates, kernel) and dtype == "float32" and not antialias:
        return relax.op.image.resize2d(
            data,
            relax.ShapeExpr([axes[2].size, axes[3].size]),
            method="linear",
            coordinate_transformation_mode="half_pixel",
        )
    wide = "float64" if dtype == "float64" else "float32"
    result = data if dtype == wide else node.emit(relax.op.astype(data, wide))
    for place, axis in enumerate(axes):
        weights = axis.weights(coordinates, kernel, antialias, exclude)
        if not np.array_equal(weights, np.eye(axis.length)):
            result = node.emit(_weighted(result, weights.astype(wide), place))
    return result if dtype == wide else relax.op.astype(result, dtype)


def _is_upsampling(axes: list[Axis], coordinates: str, kernel: Kernel) -> bool:
    """Tell whether it is what TVM has a good kernel for: images made larger by whole factors, linearly."""
    whole = all(axis.size % axis.length == 0 and axis.is_whole for axis in axes)
    kept = len(axes) == 4 and all(axis.size == axis.length for axis in axes[:2])
    return whole and kept and kernel.reach == 1 and coordinates in ("half_pixel", "pytorch_half_pixel")


def _weighted(data: Value, weights: np.ndarray, axis: int) -> Value:
    """Multiply an axis of the data by a matrix ``[size, length]``."""
    shape = ir.static_shape(data)
    index, factors = taps(weights)
    if index.shape[1] <= _GATHERED_TAPS:
        along = [-1 if place == axis else 1 for place in range(len(shape))]
        total = None
        for tap in range(index.shape[1]):
            part = relax.op.take(data, constant(index[:, tap]), axis, mode="clip")
            part = relax.op.multiply(part, constant(factors[:, tap].reshape(along)))
            total = part if total is None else relax.op.add(total, part)
        return total
    before, behind = prod(shape[:axis]), prod(shape[axis + 1 :])
    result = [*shape[:axis], len(weights), *shape[axis + 1 :]]
    # Matrices of three dimensions are no weights of a layer, which would be compressed.
    if behind == 1:
        rows = relax.op.reshape(data, [1, before, shape[axis]])
        return relax.op.reshape(relax.op.matmul(rows, constant(weights.T[None])), result)
    columns = relax.op.reshape(data, [before, shape[axis], behind])
    return relax.op.reshape(relax.op.matmul(constant(weights[None]), columns), result)


def _extrapolated(node: Node, value: Value, axes: list[Axis]) -> Value:
    """Return a constant where the coordinates are not in the data."""
    inside: np.ndarray = np.ones((), bool)
    for axis in axes:
        x = axis.coordinates("tf_crop_and_resize")
        inside = inside[..., None] & ((x >= 0) & (x <= axis.length - 1))
    if inside.all():
        return value
    value = node.emit(value)
    fill = constant(np.array(node.attributes.get("extrapolation_value", 0.0)), str(value.ty.dtype))
    return relax.op.where(constant(inside), value, fill)


def _center_crop_pad(node: Node, inputs: Operands) -> Any:
    """Cut off or add zeros on both sides, so that the middle stays there."""
    data, wanted = inputs[0], known(inputs[1])
    if wanted is None:
        raise ValueError("a shape that is computed from data is not supported")
    shape = ir.static_shape(data)
    rank = len(shape)
    chosen = [int(axis) % rank for axis in node.attributes.get("axes") or range(rank)]
    begins, ends, widths = [0] * rank, list(shape), [0] * (2 * rank)
    for axis, size in zip(chosen, map(int, wanted), strict=True):
        more = size - shape[axis]
        if more < 0:
            begins[axis] = -more // 2
            ends[axis] = begins[axis] + size
        else:
            widths[2 * axis], widths[2 * axis + 1] = more // 2, more - more // 2
    if ends != list(shape):
        data = node.emit(relax.op.strided_slice(data, list(range(rank)), begins, ends))
    return relax.op.nn.pad(data, widths) if any(widths) else data


CONVERTERS: dict[str, Converter] = {
    "Resize": _resize,
    "Upsample": _upsample,
    "CenterCropPad": _center_crop_pad,
}
