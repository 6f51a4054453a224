"""Matrix products."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

# The number of products grows with the factorial.
_LARGEST_DETERMINANT = 4


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


def _determinant(node: Node, inputs: Operands) -> Any:
    """Expand small matrices row by row."""
    data = inputs[0]
    *batch, rows, columns = ir.static_shape(data)
    if rows != columns or not 1 <= rows <= _LARGEST_DETERMINANT:
        raise ValueError(f"a matrix of {rows}×{columns} is not supported, only square ones up to 4×4")
    axes = [len(batch), len(batch) + 1]

    @cache
    def minor(row: int, kept: tuple[int, ...]) -> Value:
        total = None
        for place, column in enumerate(kept):
            cell = relax.op.strided_slice(data, axes, [row, column], [row + 1, column + 1])
            others = (*kept[:place], *kept[place + 1 :])
            term = relax.op.multiply(cell, minor(row + 1, others)) if others else cell
            combine = relax.op.subtract if place % 2 else relax.op.add
            total = term if total is None else combine(total, term)
        return node.emit(total)

    return relax.op.reshape(minor(0, tuple(range(rows))), batch)


CONVERTERS: dict[str, Converter] = {
    "Det": _determinant,
    "Gemm": _gemm,
}
