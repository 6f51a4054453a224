"""Operators on regions of an image that are found while the network runs."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax, te, tirx

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.frontend.operators.values import nonnegative
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.ir import static_shape


def _roi_align(node: Node, inputs: Operands) -> Any:
    """Scale and shift the regions here: TVM's kernel shifts before it scales."""
    data, rois, images = inputs[0], inputs[1], inputs[2]
    dtype = str(data.ty.dtype)
    mode = node.text("mode", "avg")
    # There was no choice before opset 16.
    transformation = node.text(
        "coordinate_transformation_mode", "half_pixel" if node.opset >= 16 else "output_half_pixel"
    )
    if transformation not in ("half_pixel", "output_half_pixel"):
        raise ValueError(f"coordinate_transformation_mode {transformation!r} is not supported")
    if mode not in ("avg", "max"):
        raise ValueError(f"mode {mode!r} is not supported")
    if dtype != "float32":
        raise ValueError(f"data of type {dtype} is not supported")
    aligned = transformation == "half_pixel"
    scale = float(node.attributes.get("spatial_scale", 1.0))
    rois = relax.op.multiply(rois, constant(np.array(scale), dtype))
    if aligned:
        rois = relax.op.subtract(rois, constant(np.array(0.5), dtype))
    size = (int(node.attributes.get("output_height", 1)), int(node.attributes.get("output_width", 1)))
    ratio = max(int(node.attributes.get("sampling_ratio", 0)), 0)
    images = node.emit(nonnegative(images, static_shape(data)[0]))
    column = relax.op.astype(relax.op.expand_dims(images, 1), dtype)
    placed = node.emit(relax.op.concat([column, rois], 1))
    if mode == "max":
        return node.builder.emit_te(
            _largest_products, data, placed, size, ratio, aligned, primfunc_name_hint="roi_align_max"
        )
    return relax.op.vision.roi_align(
        data, placed, pooled_size=size, spatial_scale=1.0, sample_ratio=ratio, aligned=aligned, mode="avg"
    )


def _largest_products(data: te.Tensor, rois: te.Tensor, size: tuple[int, int], ratio: int, aligned: bool) -> te.Tensor:
    """Return per bin the largest of all products of a pixel and its weight in a sample.

    Parameters
    ----------
    data, rois : te.Tensor
        ``[N, C, H, W]`` and ``[regions, (image, x, y, x, y)]``.
    size : tuple of int
        Bins per region, vertically and horizontally.
    ratio : int
        Samples per bin and axis; 0 for one per pixel.
    aligned : bool
        Regions may be smaller than a pixel.
    """
    _, channels, *extent = data.shape
    dtype = data.dtype

    def samples(region: Any, bin_index: Any, axis: int) -> tuple[Any, Any, Any]:
        """Return where the first sample lies, the samples' distance and their number."""
        start, end = rois[region, 2 - axis], rois[region, 4 - axis]
        length = end - start if aligned else te.max(end - start, tirx.const(1.0, dtype))
        step = length / tirx.const(size[axis], dtype)
        count = tirx.const(ratio, "int32") if ratio else te.ceil(step).astype("int32")
        distance = step / count.astype(dtype)
        return start + bin_index.astype(dtype) * step + distance * tirx.const(0.5, dtype), distance, count

    def weights(place: Any, axis: int) -> tuple[Any, Any, Any, Any]:
        """Return the two pixels of a sample along an axis and their weights."""
        last = extent[axis] - 1
        inside = tirx.all(place >= -1.0, place <= extent[axis].astype(dtype))
        place = te.max(place, tirx.const(0.0, dtype))
        low = te.min(place.astype("int32"), last)
        share = tirx.if_then_else(low >= last, tirx.const(0.0, dtype), place - low.astype(dtype))
        return inside, low, te.min(low + 1, last), share

    def value(region: Any, channel: Any, row: Any, column: Any) -> Any:
        first_y, step_y, count_y = samples(region, row, 0)
        first_x, step_x, count_x = samples(region, column, 1)
        iy, ix = te.reduce_axis((0, count_y), "iy"), te.reduce_axis((0, count_x), "ix")
        inside_y, low_y, high_y, share_y = weights(first_y + iy.var.astype(dtype) * step_y, 0)
        inside_x, low_x, high_x, share_x = weights(first_x + ix.var.astype(dtype) * step_x, 1)
        image, one = rois[region, 0].astype("int32"), tirx.const(1.0, dtype)
        products = [
            weight_y * weight_x * data[image, channel, y, x]
            for y, weight_y in ((low_y, one - share_y), (high_y, share_y))
            for x, weight_x in ((low_x, one - share_x), (high_x, share_x))
        ]
        largest = te.max(te.max(products[0], products[1]), te.max(products[2], products[3]))
        inside = tirx.all(inside_y, inside_x)
        return te.max(tirx.if_then_else(inside, largest, tirx.const(0.0, dtype)), axis=[iy, ix])

    shape = (rois.shape[0], channels, *size)
    found = te.compute(shape, value, name="roi_align_max")
    # A region without a sample.
    nothing = te.min_value(dtype)
    return te.compute(
        shape, lambda *at: tirx.if_then_else(found[at] == nothing, tirx.const(0.0, dtype), found[at]), name="found"
    )


def _non_max_suppression(node: Node, inputs: Operands) -> Any:
    raise ValueError("how many boxes it selects depends on data, which is not supported: end the network before it")


CONVERTERS: dict[str, Converter] = {
    "RoiAlign": _roi_align,
    "NonMaxSuppression": _non_max_suppression,
}
