"""Matrix products."""

from __future__ import annotations

from typing import Any

import numpy as np

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph.constants import constant


def _gemm(node: Node, inputs: Operands) -> Any:
    """Scale the constant weight instead of the activations."""
    weight = known(inputs[1])
    alpha = node.attributes.get("alpha", 1.0)
    for name in ("alpha", "beta"):
        factor = node.attributes.get(name, 1.0)
        if factor != int(factor) and not str(inputs[0].ty.dtype).startswith("float"):
            raise ValueError(f"{name} {factor:g} of integers is not supported")
    if weight is None or alpha == 1.0:
        return NotImplemented
    inputs[1] = constant((weight * np.float32(alpha)).astype(weight.dtype))
    node.attributes["alpha"] = 1.0
    return NotImplemented


CONVERTERS: dict[str, Converter] = {
    "Gemm": _gemm,
}
