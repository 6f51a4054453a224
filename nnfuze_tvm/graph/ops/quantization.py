"""Quantize and dequantize: where a graph of real numbers says which of them are integers."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.integers.context import IntegerForm, Integers, Unsupported, along, dtype_of
from nnfuze_tvm.graph.integers.sums import stored
from nnfuze_tvm.graph.integers.values import Codes, Constant, ConstantCodes, Known, Parts, Quantized, Sum
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops.operator import Evaluate, Operator, Train


def _quantized(call: Call, data: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    limits, axis = np.iinfo(str(call.attrs.out_dtype)), int(call.attrs.axis)
    with np.errstate(over="ignore"):
        rounded = np.rint(data / along(scale, axis, data.ndim).astype(data.dtype))
    # In kernels, too, on every machine: NaN has the code of zero.
    rounded = np.where(np.isnan(rounded), 0, rounded)
    return np.clip(rounded + along(zero_point, axis, data.ndim).astype("float64"), limits.min, limits.max)


def _dequantized(call: Call, codes: np.ndarray, scale: np.ndarray, zero_point: np.ndarray) -> np.ndarray:
    axis = int(call.attrs.axis)
    shifted = codes.astype("int64") - along(zero_point, axis, codes.ndim).astype("int64")
    return shifted.astype("float32") * along(scale, axis, codes.ndim).astype("float32")


def _quantize(context: Integers, call: Call, _: str) -> Known | None:
    dtype = str(call.attrs.out_dtype)
    scale, zero_point = _parameters(context, call)
    source = context.value(call.args[0])
    if isinstance(source, Constant):
        limits = np.iinfo(dtype)
        axis = int(call.attrs.axis)
        rounded = np.rint(source.values / along(scale, axis, source.values.ndim))
        shifted = rounded + along(zero_point, axis, source.values.ndim)
        return ConstantCodes(np.clip(shifted, limits.min, limits.max).astype("int64"), dtype)
    if dtype not in ("int8", "uint8") or scale.size != 1 or zero_point.size != 1:
        return None
    step, zero = float(scale.flat[0]), int(zero_point.flat[0])
    if isinstance(source, Quantized):
        if source.codes.dtype == dtype and np.isclose(source.scale, step, rtol=1e-6, atol=0):
            if source.zero_point == stored(dtype, zero)[0]:
                return source.codes
        source = context.widen(source)
    if isinstance(source, Sum):
        return context.requantize(source, step, zero, dtype)
    if isinstance(source, Parts):
        return context.requantize_parts(source, step, zero, dtype)
    data = context.as_float(call.args[0])
    if dtype_of(data) != "float32":
        return None
    return context.quantize(data, step, zero, dtype, data in context.nonnegative, data in context.inexact)


def _dequantize(context: Integers, call: Call, _: str) -> Known | None:
    scale, zero_point = _parameters(context, call)
    source = context.value(call.args[0])
    if isinstance(source, ConstantCodes):
        rank, axis = source.codes.ndim, int(call.attrs.axis)
        wide = along(scale, axis, rank)
        codes = source.codes - along(zero_point, axis, rank)
        return Constant(codes * wide, codes.astype("int64"), wide)
    if not isinstance(source, Codes) or scale.size != 1 or zero_point.size != 1:
        return None
    return Quantized(source, float(scale.flat[0]), int(zero_point.flat[0]) - source.offset)


def _parameters(context: Integers, call: Call) -> tuple[np.ndarray, np.ndarray]:
    scale, zero_point = (context.value(arg) for arg in call.args[1:])
    if not isinstance(scale, Constant) or not isinstance(zero_point, ConstantCodes):
        raise Unsupported("its scale or zero point is not a constant")
    return scale.values, zero_point.codes


def _transposed(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value:
    function = op.quantize if op_name(call) == "quantize" else op.dequantize
    return function(sources[0], *call.args[1:3], axes[int(call.attrs.axis)], call.attrs.out_dtype)


def _torch_quantize(torch: Any, call: Call, data: Any, scale: Any, zero_point: Any) -> Any:
    """Return codes in floats; the gradient of rounding is one (Bengio et al. 2013), that of saturation zero."""
    limits, axis = np.iinfo(str(call.attrs.out_dtype)), int(call.attrs.axis)
    scale, zero_point = (along(each, axis, data.ndim) for each in (scale, zero_point))
    exact = data / scale
    rounded = exact + (torch.round(exact) - exact).detach() + zero_point
    return rounded.clamp(int(limits.min), int(limits.max))


def _torch_dequantize(_: Any, call: Call, codes: Any, scale: Any, zero_point: Any) -> Any:
    axis = int(call.attrs.axis)
    scale, zero_point = (along(each, axis, codes.ndim) for each in (scale, zero_point))
    return (codes.to(scale.dtype) - zero_point.to(scale.dtype)) * scale


def _operator(evaluate: Evaluate, train: Train, integer: IntegerForm) -> Operator:
    return Operator(
        effect="maps",
        evaluate=evaluate,
        train=train,
        integer=integer,
        transposed=_transposed,
        retypes=True,
        exact=True,
        kernels=("elementwise",),
    )


OPERATORS = {
    "quantize": _operator(_quantized, _torch_quantize, _quantize),
    "dequantize": _operator(_dequantized, _torch_dequantize, _dequantize),
}

ONNX = {"quantize": onnx.quantize, "dequantize": onnx.dequantize}
