"""Convolutions."""

from __future__ import annotations

from typing import Any

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.graph import ir


def _conv(node: Node, inputs: Operands) -> Any:
    """Turn ``auto_pad`` into numbers, where TVM's converter emits a dynamic pad."""
    mode = node.text("auto_pad", "NOTSET")
    if mode not in ("SAME_UPPER", "SAME_LOWER"):
        return NotImplemented
    sizes = ir.static_shape(inputs[0])[2:]
    kernel = ir.static_shape(inputs[1])[2:]
    strides = node.attributes.get("strides", [1] * len(sizes))
    dilations = node.attributes.get("dilations", [1] * len(sizes))
    before, after = [], []
    for size, taps, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        total = max((-(-size // stride) - 1) * stride + (taps - 1) * dilation + 1 - size, 0)
        small, large = total // 2, total - total // 2
        before.append(small if mode == "SAME_UPPER" else large)
        after.append(large if mode == "SAME_UPPER" else small)
    node.attributes["pads"] = (*before, *after)
    node.attributes["auto_pad"] = b"NOTSET"
    return NotImplemented


CONVERTERS: dict[str, Converter] = {
    "Conv": _conv,
}
