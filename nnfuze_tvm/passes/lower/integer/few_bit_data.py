"""Floats that are few numbers, and that layers of few-bit weights read."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value, bindings
from nnfuze_tvm.graph.integers.context import few_codes
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.levels import Levels


def few_bit_data(func: relax.Function) -> dict[tvm.ir.Var, np.ndarray]:
    """Return the float Vars that layers of few-bit weights read, directly or moved, and the numbers each can hold.

    Such a layer was trained for it: its data are signs, or bounded and rounded, its weights few numbers per channel.
    """
    levels = Levels()
    bound: dict[Value, Value] = {}
    found: dict[tvm.ir.Var, np.ndarray] = {}
    for binding in bindings(func):
        levels.see(binding.var, binding.value)
        bound[binding.var] = binding.value
        own = ops.layer(binding.value)
        if own is None or not _has_few_weights(binding.value, own.filters.outer):
            continue
        data = binding.value.args[0]
        while ops.effect_of(bound.get(data)) == "moves" and levels.of(bound[data].args[0]) is not None:
            data = bound[data].args[0]
        numbers = levels.of(data)
        if numbers is not None and data in bound and str(data.ty.dtype) == "float32":
            found[data] = numbers.astype("float64")
    return found


def _has_few_weights(layer: Value, axis: int) -> bool:
    weights = layer.args[1]
    if not isinstance(weights, GenericConst) or 0 in static_shape(weights):
        return False
    values = array(weights)
    return values.dtype == np.float32 and few_codes(values.astype("float64"), axis) is not None
