"""Operators that put values in other places."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir


def _pad(node: Node, inputs: Operands) -> Any:
    """R.nn.pad for constant padding by constant amounts."""
    if node.text("mode", "constant") != "constant":
        return NotImplemented
    rank = len(ir.static_shape(inputs[0]))
    if node.opset < 11:
        pads, fill = (
            np.array(node.attributes.get("pads", node.attributes.get("paddings"))),
            node.attributes.get("value", 0.0),
        )
        axes: list[int] = list(range(rank))
    else:
        amounts, value = known(inputs[1]), known(inputs[2])
        if amounts is None or (inputs[2] is not None and value is None):
            return NotImplemented
        pads, fill = amounts, 0 if value is None else value.item()
        chosen = known(inputs[3])
        if inputs[3] is not None and chosen is None:
            return NotImplemented
        axes = list(range(rank)) if chosen is None else [int(axis) % rank for axis in chosen]
    if pads is None or (pads < 0).any():
        return NotImplemented
    width = [0] * (2 * rank)
    for index, axis in enumerate(axes):
        width[2 * axis], width[2 * axis + 1] = int(pads[index]), int(pads[index + len(axes)])
    return relax.op.nn.pad(inputs[0], width, "constant", float(fill))


CONVERTERS: dict[str, Converter] = {
    "Pad": _pad,
}
