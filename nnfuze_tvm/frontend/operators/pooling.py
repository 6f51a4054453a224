"""Pooling."""

from __future__ import annotations

from typing import Any

from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.graph import ir


def _global_average(node: Node, inputs: Operands) -> Any:
    """Return a mean, where TVM's kernel for one and three axes has loops of varying length."""
    rank = len(ir.static_shape(inputs[0]))
    return NotImplemented if rank == 4 else relax.op.mean(inputs[0], list(range(2, rank)), keepdims=True)


CONVERTERS: dict[str, Converter] = {
    "GlobalAveragePool": _global_average,
}
