"""Operators that compute element by element."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _clip(node: Node, inputs: Operands) -> Any:
    """R.clip, R.nn.relu or a single bound, where TVM's converter calls anonymous TE functions."""
    data = inputs[0]
    dtype = str(data.ty.dtype)
    if node.opset < 11:
        bounds = [
            relax.const(node.attributes[key], dtype) if key in node.attributes else None for key in ("min", "max")
        ]
    else:
        bounds = [inputs[1], inputs[2]]
    # Scalars by definition, some exporters write a vector of one.
    least, most = (None if value is None else value.item() for value in map(known, bounds))
    if any(value is not None and np.isnan(value) for value in (least, most)):
        return NotImplemented
    if least is not None and most is not None and np.isfinite([least, most]).all() and least <= most:
        return relax.op.clip(data, least, most)
    low, high = bounds
    if least == 0 and high is None:
        return relax.op.nn.relu(data)
    if low is not None:
        data = relax.op.maximum(data, low)
    return data if high is None else relax.op.minimum(data, high)


def _pairwise(combine: Callable[[Value, Value], Value]) -> Converter:
    """Convert an n-ary elementwise operator into a chain, where TVM's converter stacks and reduces."""

    def convert(node: Node, inputs: Operands) -> Any:
        return reduce(combine, inputs)

    return convert


def _mean(node: Node, inputs: Operands) -> Any:
    total = reduce(relax.op.add, inputs)
    return relax.op.multiply(total, relax.const(1 / len(inputs), str(inputs[0].ty.dtype)))


def _dropout(node: Node, inputs: Operands) -> Any:
    """Nothing: inference keeps every element."""
    if node.outputs == 1:
        return inputs[0]
    shape = ir.static_shape(inputs[0])
    mask = np.ones(shape, dtype=bool) if node.opset >= 10 else np.ones(shape, dtype=str(inputs[0].ty.dtype))
    return relax.Tuple([inputs[0], constant(mask)])


CONVERTERS: dict[str, Converter] = {
    "Clip": _clip,
    "Sum": _pairwise(relax.op.add),
    "Min": _pairwise(relax.op.minimum),
    "Max": _pairwise(relax.op.maximum),
    "Mean": _mean,
    "Dropout": _dropout,
}
