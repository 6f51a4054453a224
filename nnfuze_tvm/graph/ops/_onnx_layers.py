"""ONNX forms of layers, of windows over images, and of the way to 8 bits and back."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm.ir import Call

from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.onnx_form import Form, Writer, dtype_of, require

_BYTES, _SHORTS = ("int8", "uint8"), ("int16", "uint16")


def _widened(write: Writer, call: Call, names: Sequence[str]) -> list[str]:
    """Return operands in the type of the sums."""
    kinds = [dtype_of(arg) for arg in call.args]
    return [write.cast(name, kind, dtype_of(call)) for name, kind in zip(names, kinds, strict=True)]


def _multiplies_bytes(call: Call) -> bool:
    return dtype_of(call) == "int32" and all(dtype_of(arg) in _BYTES for arg in call.args[:2])


def matmul(write: Writer, call: Call, left: str, right: str) -> str:
    """Multiply matrices."""
    if _multiplies_bytes(call):
        return write("MatMulInteger", left, right)
    return write("MatMul", *_widened(write, call, [left, right]))


def _ints(values: Any) -> list[int]:
    return [int(value) for value in values]


def _require_channels_first(call: Call, kernel: str) -> None:
    attrs = call.attrs
    layouts = str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout)
    require(
        layouts[0][:2] == "NC" and layouts[1][:2] == kernel and layouts[2] == layouts[0],
        f"has the layouts {', '.join(layouts)}",
    )


def _require_real(call: Call) -> None:
    kinds = " and ".join(dtype_of(arg) for arg in call.args)
    require("float" in dtype_of(call), f"multiplies {kinds} with sums in {dtype_of(call)}")


def _window(call: Call) -> dict[str, Any]:
    attrs = call.attrs
    facts = {"pads": _ints(attrs.padding), "strides": _ints(attrs.strides), "dilations": _ints(attrs.dilation)}
    return {**facts, "group": int(attrs.groups), "kernel_shape": list(static_shape(call.args[1])[2:])}


def convolution(write: Writer, call: Call, data: str, weight: str) -> str:
    """Convolve."""
    _require_channels_first(call, "OI")
    if _multiplies_bytes(call):
        return write("ConvInteger", data, weight, **_window(call))
    _require_real(call)
    return write("Conv", *_widened(write, call, [data, weight]), **_window(call))


def transposed_convolution(write: Writer, call: Call, data: str, weight: str) -> str:
    """Add products to windows of the output."""
    _require_channels_first(call, "IO")
    _require_real(call)
    facts = {**_window(call), "output_padding": _ints(call.attrs.output_padding)}
    return write("ConvTranspose", *_widened(write, call, [data, weight]), **facts)


def _require_image(call: Call) -> None:
    layout, out = str(call.attrs.layout), str(getattr(call.attrs, "out_layout", "") or call.attrs.layout)
    require(layout[:2] == "NC" and out == layout, f"has the layouts {layout}, {out}")


def pooling(operator: str) -> Form:
    """Return the form of a pooling; what is padded behind is as much as its windows reach."""

    def form(write: Writer, call: Call, x: str) -> str:
        _require_image(call)
        attrs, shape, count = call.attrs, static_shape(call.args[0])[2:], static_shape(call)[2:]
        sizes, strides, dilation = map(_ints, (attrs.pool_size, attrs.strides, attrs.dilation))
        spans = [(size - 1) * step + 1 for size, step in zip(sizes, dilation, strict=True)]
        before = _ints(attrs.padding)[: len(sizes)]
        parts = zip(count, strides, spans, before, shape, strict=True)
        behind = [max(0, (n - 1) * stride + span - b - size) for n, stride, span, b, size in parts]
        facts: dict[str, Any] = {"kernel_shape": sizes, "strides": strides, "pads": [*before, *behind]}
        if max(dilation) > 1:
            facts["dilations"] = dilation
        if operator == "AveragePool" and attrs.count_include_pad:
            facts["count_include_pad"] = 1
        reach = zip(before, behind, sizes, strict=True)
        require(not any(max(pads) >= size for *pads, size in reach), "has padding as wide as its windows")
        return write(operator, x, **facts)

    return form


def adaptive_average(write: Writer, call: Call, x: str) -> str:
    """Average windows that divide an image evenly; where they overlap, by matrices axis by axis."""
    _require_image(call)
    shape, count = static_shape(call.args[0]), static_shape(call)
    if all(size == 1 for size in count[2:]):
        return write("GlobalAveragePool", x)
    if not any(size % n for size, n in zip(shape[2:], count[2:], strict=True)):
        sizes = [size // n for size, n in zip(shape[2:], count[2:], strict=True)]
        return write("AveragePool", x, kernel_shape=sizes, strides=sizes)
    sizes = list(shape)
    for axis in range(2, len(shape)):
        length, n = shape[axis], count[axis]
        parts = np.zeros((n, length))
        for i in range(n):
            first, last = i * length // n, -(-(i + 1) * length // n)
            parts[i, first:last] = 1 / (last - first)
        rows = write.reshaped(x, [int(np.prod(sizes[:axis])), length, int(np.prod(sizes[axis + 1 :]))])
        sizes[axis] = n
        x = write.reshaped(write("MatMul", write.constant(parts, dtype_of(call)), rows), sizes)
    return x


_COORDINATES = {"half_pixel", "align_corners", "asymmetric", "pytorch_half_pixel"}


def resized(write: Writer, call: Call, x: str, *_: Any) -> str:
    """Resize an image."""
    attrs, before, after = call.attrs, static_shape(call.args[0]), static_shape(call)
    method, mode = str(attrs.method), str(attrs.coordinate_transformation_mode)
    require(str(attrs.layout) == "NCHW", f"has the layout {attrs.layout}")
    require(mode in _COORDINATES, f"has the coordinates {mode!r}")
    require(dtype_of(call) == dtype_of(call.args[0]), "changes the type")
    facts: dict[str, Any] = {"mode": method, "coordinate_transformation_mode": mode}
    if method == "nearest_neighbor":
        rounding = str(attrs.rounding_method)
        whole = all(size % pixels == 0 for pixels, size in zip(before, after, strict=True))
        sharp = whole and (rounding, mode) == ("floor", "asymmetric")
        sizes = zip(before[2:], after[2:], strict=True)
        require(sharp or not any(_is_near(mode, rounding, *pair) for pair in sizes), "rounds between two pixels")
        facts |= {"mode": "nearest", "nearest_mode": "round_prefer_floor" if rounding == "round" else rounding}
    elif method == "cubic":
        facts |= {"cubic_coeff_a": float(attrs.cubic_alpha), "exclude_outside": int(attrs.cubic_exclude)}
    return write("Resize", x, "", "", write.integers(after), **facts)


def _is_near(mode: str, rounding: str, before: int, after: int) -> bool:
    """Tell whether rounding decides which pixel is the nearest."""
    at = np.arange(after)
    if mode == "align_corners":
        places = at * (before - 1) / max(after - 1, 1)
    elif mode == "asymmetric":
        places = at * before / after
    else:
        places = (at + 0.5) * before / after - 0.5
    edge = 0.0 if rounding in ("floor", "ceil") else 0.5
    distance = np.abs((places - edge) - np.rint(places - edge))
    return before != after and bool((distance < 1e-4).any())


def _coded(write: Writer, operator: str, call: Call, data: str, scale: str, zero: str) -> str:
    shape, kind = static_shape(call.args[1]), dtype_of(call.args[2])
    if kind in _SHORTS:
        write.opset = 21
    if np.prod(shape) != 1:
        if static_shape(call.args[2]) != shape:
            # One for all channels; engines want as many as scales.
            known = write.constants.get(zero)
            zero = (
                write("Expand", zero, write.integers(shape))
                if known is None
                else write.constant(np.resize(known, shape))
            )
        return write(operator, data, scale, zero, axis=int(call.attrs.axis))
    return write(operator, data, *(write.reshaped(each, []) if shape else each for each in (scale, zero)))


def quantize(write: Writer, call: Call, data: str, scale: str, zero: str) -> str:
    """Round to codes."""
    kind = str(call.attrs.out_dtype)
    require(kind in _BYTES + _SHORTS, f"rounds to {kind}")
    require(dtype_of(call.args[2]) == kind, f"has a zero point in {dtype_of(call.args[2])}")
    return _coded(write, "QuantizeLinear", call, data, scale, zero)


def dequantize(write: Writer, call: Call, data: str, scale: str, zero: str) -> str:
    """Return what codes stand for."""
    kind = dtype_of(call.args[0])
    require(dtype_of(call.args[2]) == kind, f"has a zero point in {dtype_of(call.args[2])}")
    real = _coded(write, "DequantizeLinear", call, data, scale, zero)
    return write.cast(real, dtype_of(call.args[1]), dtype_of(call))
