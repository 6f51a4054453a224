"""The weights of a layer in another arrangement, be they floats or behind a dequantize."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
from tvm.ir import GenericConst, Var
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.ir import static_shape


def is_constant(weights: Value, bound: Mapping[Value, Value]) -> bool:
    """Tell whether weights are a constant or a dequantized constant; ``bound`` is what Vars are bound to."""
    source = _source(weights, bound)
    return isinstance(source, GenericConst) or (
        op_name(source) == "dequantize" and all(isinstance(arg, GenericConst) for arg in source.args)
    )


def rearranged(
    weights: Value,
    bound: Mapping[Value, Value],
    arrange: Callable[[np.ndarray, np.ndarray], np.ndarray],
    along_channels: Callable[[np.ndarray], np.ndarray],
    channel_axes: tuple[int, int],
) -> Value:
    """Return constant weights rearranged.

    Parameters
    ----------
    weights : relax expression
        A constant, or a Var bound to a dequantized one; see `is_constant`.
    bound : mapping
        What Vars are bound to.
    arrange : callable
        From the array and what stands for zero in it (of as many dimensions) to the new array.
    along_channels : callable
        From one value per output channel before to one per output channel after.
    channel_axes : tuple of int
        The axis of the output channels, before and after.
    """
    source = _source(weights, bound)
    if isinstance(source, GenericConst):
        values = array(source)
        return constant(arrange(values, np.zeros((1,) * values.ndim, values.dtype)))
    codes, scale, zero_point = (array(arg) for arg in source.args)
    before, after = channel_axes
    fill = zero_point.reshape([-1 if i == before else 1 for i in range(codes.ndim)])
    scale, zero_point = (p if p.size == 1 else along_channels(p.reshape(-1)) for p in (scale, zero_point))
    new = constant(arrange(codes, fill.astype(codes.dtype)))
    return op.dequantize(new, constant(scale), constant(zero_point), after, source.attrs.out_dtype)


def known_values(expr: Value, bound: Mapping[Value, Value]) -> np.ndarray | None:
    """Return the values of a constant, also of one behind a dequantize and reshapes (a bias), else None."""
    source = _source(expr, bound)
    if isinstance(source, GenericConst):
        return array(source)
    if op_name(source) == "reshape":
        values = known_values(source.args[0], bound)
        return None if values is None else values.reshape(static_shape(source))
    if op_name(source) != "dequantize" or not all(isinstance(arg, GenericConst) for arg in source.args):
        return None
    codes, scale, zero_point = (array(arg) for arg in source.args)
    axis = int(source.attrs.axis) % max(1, codes.ndim)
    wide = [p.reshape([-1 if i == axis else 1 for i in range(codes.ndim)]) for p in (scale, zero_point.astype("int64"))]
    return ((codes.astype("int64") - wide[1]) * wide[0]).astype(str(source.attrs.out_dtype))


def _source(weights: Value, bound: Mapping[Value, Value]) -> Value:
    while isinstance(weights, Var) and weights in bound:
        weights = bound[weights]
    return weights
