"""Deformable convolution: every tap of a window has an offset of its own, which the network computes."""

from __future__ import annotations

from functools import partial
from typing import Any

from tvm import relax, te, tirx

from nnfuze_tvm.frontend.operators.convolution import biased
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.frontend.operators.windows import Windows
from nnfuze_tvm.graph import ir


def _deform_conv(node: Node, inputs: Operands) -> Any:
    """Sample what the windows see into columns; the rest is a matrix product."""
    data, weight, offset, bias, mask = inputs[0], inputs[1], inputs[2], inputs[3], inputs[4]
    batch, channels, *extent = ir.static_shape(data)
    outputs, depth, *kernel = ir.static_shape(weight)
    if len(extent) != 2:
        raise ValueError(f"{len(extent)} spatial dimensions are not supported")
    groups, fields = (int(node.attributes.get(name, 1)) for name in ("group", "offset_group"))
    windows = Windows.of(node, extent, kernel)
    if ir.static_shape(offset) != (batch, fields * windows.taps * 2, *windows.count) or channels % fields:
        raise ValueError(f"offsets of shape {list(ir.static_shape(offset))} are not supported")
    operands = [data, offset] + ([] if mask is None else [mask])
    sampled = partial(_columns, windows, fields)
    columns = node.builder.emit_te(sampled, *operands, primfunc_name_hint="deformed_columns")
    columns = relax.op.reshape(columns, [batch, groups, depth * windows.taps, -1])
    rows = relax.op.reshape(weight, [1, groups, outputs // groups, depth * windows.taps])
    result = relax.op.reshape(relax.op.matmul(rows, columns), [batch, outputs, *windows.count])
    return biased(result, bias, 2)


def _columns(windows: Windows, fields: int, data: te.Tensor, offset: te.Tensor, *mask: te.Tensor) -> te.Tensor:
    """Return what every tap of every window sees, ``[N, C, taps, rows, columns]``, interpolated linearly.

    Parameters
    ----------
    windows : Windows
        The windows without offsets.
    fields : int
        Groups of channels that have offsets of their own.
    data, offset : te.Tensor
        ``[N, C, H, W]`` and ``[N, fields · taps · (y, x), rows, columns]``.
    *mask : te.Tensor
        Perhaps a factor per tap, ``[N, fields · taps, rows, columns]``.
    """
    batch, channels, *extent = data.shape
    width, taps, dtype = windows.kernel[1], windows.taps, data.dtype
    per_field = int(channels) // fields

    def place(axis: int, at: Any, tap: Any, shift: Any) -> tuple[Any, Any]:
        """Return the pixel in front of a sample, and how far the sample lies behind it."""
        start = at * windows.strides[axis] + tap * windows.dilations[axis] - windows.before[axis]
        exact = start.astype(dtype) + shift
        low = te.floor(exact)
        return low.astype("int32"), exact - low

    def value(n: Any, c: Any, tap: Any, row: Any, column: Any) -> Any:
        field = tirx.floordiv(c, per_field) * taps + tap
        low_y, share_y = place(0, row, tirx.floordiv(tap, width), offset[n, 2 * field, row, column])
        low_x, share_x = place(1, column, tirx.floormod(tap, width), offset[n, 2 * field + 1, row, column])
        zero, one = tirx.const(0.0, dtype), tirx.const(1.0, dtype)
        total = zero
        for y, weight_y in ((low_y, one - share_y), (low_y + 1, share_y)):
            for x, weight_x in ((low_x, one - share_x), (low_x + 1, share_x)):
                inside = tirx.all(y >= 0, y < extent[0], x >= 0, x < extent[1])
                total = total + weight_y * weight_x * tirx.if_then_else(inside, data[n, c, y, x], zero)
        return total * mask[0][n, field, row, column] if mask else total

    return te.compute((batch, channels, taps, *windows.count), value, name="deformed_columns")


CONVERTERS: dict[str, Converter] = {
    "DeformConv": _deform_conv,
}
