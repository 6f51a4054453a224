"""Quantize, dequantize, and operators that take 8-bit tensors with their scales.

The latter become dequantize, the float operator and quantize: what ``RealizeInteger`` makes integer kernels of. Their
answers are within one step of ONNX Runtime's, which rounds its multipliers in other ways.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax

from nnfuze_tvm.frontend.operators import block_weights
from nnfuze_tvm.frontend.operators.expansion import Expansion, in_float32
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import dtype_of
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value

_CODES = ("int8", "uint8", "int16", "uint16", "int32")
_FLOATS = ("float32", "float16")


def _axis(node: Node, data: Value, scale: Value) -> int:
    """Return the axis that has the scales."""
    shape, rank = ir.static_shape(scale), len(ir.static_shape(data))
    if np.prod(shape) == 1 or not rank:
        return 0
    if len(shape) > 1:
        raise ValueError(f"a scale of shape {list(shape)} is not supported")
    axis = node.attributes.get("axis", 1 if rank > 1 else 0)
    return axis % rank if -rank <= axis < rank else 0


def _parameter(value: Value) -> Value:
    """Return a scale or zero point of one number as a scalar."""
    shape = ir.static_shape(value)
    if not shape or np.prod(shape) != 1:
        return value
    number = known(value)
    return relax.op.reshape(value, []) if number is None else constant(number.reshape(()))


def _type_attribute(node: Node, name: str) -> str | None:
    value = node.attributes.get(name, 0)
    return str(helper.tensor_dtype_to_np_dtype(value)) if value else None


def _quantize_blocks(node: Node, data: Value, scale: Value, zero: Value | None, dtype: str) -> Value:
    scale, zero = block_weights.spread(node, data, scale, zero)
    limits = np.iinfo(dtype)
    rounded = relax.op.add(relax.op.round(relax.op.divide(in_float32(node, data), scale)), zero)
    return relax.op.astype(relax.op.clip(rounded, int(limits.min), int(limits.max)), dtype)


def _quantize(node: Node, inputs: Operands) -> Any:
    data, scale, zero = inputs[0], inputs[1], inputs[2]
    asked = _type_attribute(node, "output_dtype")
    dtype = dtype_of(zero) if zero is not None else asked or "uint8"
    if dtype not in _CODES or asked not in (None, dtype):
        raise ValueError(f"quantizing to {asked or dtype} is not supported")
    if node.attributes.get("block_size", 0):
        return _quantize_blocks(node, data, scale, zero, dtype)
    axis = _axis(node, data, scale)
    zero = constant(np.zeros((), dtype)) if zero is None else _parameter(zero)
    data, scale = in_float32(node, data), in_float32(node, _parameter(scale))
    return relax.op.quantize(data, scale, zero, axis=axis, out_dtype=dtype)


def _dequantize(node: Node, inputs: Operands) -> Any:
    data, scale, zero = inputs[0], inputs[1], inputs[2]
    if dtype_of(data) not in _CODES:
        raise ValueError(f"dequantizing {dtype_of(data)} is not supported")
    wanted = _type_attribute(node, "output_dtype") or dtype_of(scale)
    if wanted not in _FLOATS:
        raise ValueError(f"dequantizing to {wanted} is not supported")
    if node.attributes.get("block_size", 0):
        real = block_weights.dequantized(node, data, scale, zero)
    else:
        axis = _axis(node, data, scale)
        zero = constant(np.zeros((), dtype_of(data))) if zero is None else _parameter(zero)
        real = relax.op.dequantize(data, in_float32(node, _parameter(scale)), zero, axis=axis, out_dtype="float32")
    return real if wanted == "float32" else relax.op.astype(node.emit(real), wanted)


def _dynamic_quantize(node: Node, inputs: Operands) -> Any:
    return dynamically_quantized(node, inputs[0])


def dynamically_quantized(node: Node, data: Value) -> list[Value]:
    """Quantize by the range of the data, zero included; return codes in uint8, their scale and their zero point."""
    zero = relax.const(0.0, "float32")
    high = node.emit(relax.op.maximum(relax.op.max(data), zero))
    low = node.emit(relax.op.minimum(relax.op.min(data), zero))
    span = node.emit(relax.op.divide(relax.op.subtract(high, low), relax.const(255.0, "float32")))
    # All zero: any scale will do but zero.
    scale = node.emit(relax.op.where(relax.op.equal(span, zero), relax.const(1.0, "float32"), span))
    point = relax.op.round(relax.op.clip(relax.op.subtract(zero, relax.op.divide(low, scale)), 0, 255))
    point = node.emit(relax.op.astype(point, "uint8"))
    return [relax.op.quantize(data, scale, point, axis=0, out_dtype="uint8"), scale, point]


# Products of two such numbers and any int8 fit int16, where CPUs add pairs of them.
_LARGEST = 127
_WINDOW = ("auto_pad", "pads", "strides", "dilations", "kernel_shape")


def _channels(expansion: Expansion, value: str, rank: int, first: bool) -> str:
    """Bring channels to the front, or back to the end, where the node has them there."""
    if not expansion.node.attributes.get("channels_last", 0):
        return value
    order = [0, rank - 1, *range(1, rank - 1)] if first else [0, *range(2, rank), 1]
    return expansion.add("Transpose", value, perm=order)


def _conv(node: Node, inputs: Operands) -> Any:
    data, scale, zero, weight, weight_scale, weight_zero, out_scale, out_zero, bias = (inputs[k] for k in range(9))
    expansion, rank = Expansion(node), len(ir.static_shape(data))
    operands = [
        _channels(expansion, expansion.real(data, scale, zero), rank, first=True),
        expansion.real(weight, weight_scale, weight_zero),
    ]
    if bias is not None:
        operands.append(expansion.bias(bias, scale, weight_scale))
    result = expansion.add("Conv", *operands, **expansion.attributes("group", *_WINDOW))
    return expansion.codes(_channels(expansion, result, rank, first=False), out_scale, out_zero)


def _columns(scale: Value, rank: int, axis: int) -> tuple[Value, int]:
    """Return scales of a matrix's rows or columns as a vector, and their axis.

    Parameters
    ----------
    scale : Value
        One, ``[N]``, or ``[..., 1, N]`` or ``[..., M, 1]``.
    rank : int
        The matrix's.
    axis : int
        -1 for columns, -2 for rows.
    """
    shape, number = ir.static_shape(scale), known(scale)
    if len(shape) <= 1 or np.prod(shape) == 1:
        return scale, rank + axis
    if number is None or shape[axis] != np.prod(shape):
        raise ValueError(f"a scale of shape {list(shape)} is not supported")
    return constant(number.reshape(-1)), rank + axis


def _matmul(node: Node, inputs: Operands) -> Any:
    expansion = Expansion(node)
    sides = []
    for first, axis in ((0, -2), (3, -1)):
        data, scale, zero = inputs[first : first + 3]
        vector, place = _columns(scale, len(ir.static_shape(data)), axis)
        point = None if zero is None else _columns(zero, 0, axis)[0]
        sides.append(expansion.real(data, vector, point, place))
    return expansion.codes(expansion.add("MatMul", *sides), inputs[6], inputs[7])


def _gemm(node: Node, inputs: Operands) -> Any:
    data, scale, zero, weight, weight_scale, weight_zero, bias, out_scale, out_zero = (inputs[k] for k in range(9))
    expansion = Expansion(node)
    own = expansion.attributes("alpha", "transA", "transB")
    operands = [
        expansion.real(data, scale, zero),
        expansion.real(weight, weight_scale, weight_zero, 0 if own.get("transB", 0) else 1),
    ]
    if bias is not None:
        alpha = constant(np.asarray(own.get("alpha", 1.0), "float32"))
        operands.append(expansion.bias(bias, scale, weight_scale, alpha))
    result = expansion.add("Gemm", *operands, **own)
    return expansion.results(result) if out_scale is None else expansion.codes(result, out_scale, out_zero)


def _binary(operator: str) -> Converter:
    def convert(node: Node, inputs: Operands) -> Any:
        expansion = Expansion(node)
        sides = [expansion.real(*(inputs[k] for k in range(first, first + 3))) for first in (0, 3)]
        return expansion.codes(expansion.add(operator, *sides), inputs[6], inputs[7])

    return convert


def _unary(operator: str, *attributes: str) -> Converter:
    def convert(node: Node, inputs: Operands) -> Any:
        expansion, rank = Expansion(node), len(ir.static_shape(inputs[0]))
        value = _channels(expansion, expansion.real(*(inputs[k] for k in range(3))), rank, first=True)
        value = expansion.add(operator, value, **expansion.attributes(*attributes))
        return expansion.codes(_channels(expansion, value, rank, first=False), inputs[3], inputs[4])

    return convert


def _concat(node: Node, inputs: Operands) -> Any:
    expansion = Expansion(node)
    parts = [expansion.real(*(inputs[k] for k in range(first, first + 3))) for first in range(2, len(inputs), 3)]
    return expansion.codes(expansion.add("Concat", *parts, **expansion.attributes("axis")), inputs[0], inputs[1])


def _where(node: Node, inputs: Operands) -> Any:
    expansion = Expansion(node)
    condition = expansion.operand(inputs[0])
    sides = [expansion.real(*(inputs[k] for k in range(first, first + 3))) for first in (1, 4)]
    return expansion.codes(expansion.add("Where", condition, *sides), inputs[7], inputs[8])


def without_zero(node: Node, codes: Value, zero: Value | None, shape: Sequence[int] | None = None) -> Value:
    """Return codes without their zero point, in int16: exact, and what CPUs multiply by pairs."""
    number, point = known(codes), None if zero is None else known(zero)
    if zero is not None and shape is not None:
        zero = relax.op.reshape(zero, list(shape))
        point = None if point is None else point.reshape(tuple(shape))
    if number is not None and (zero is None or point is not None):
        return constant(number.astype("int16") - (0 if point is None else point.astype("int16")))
    wide = relax.op.astype(codes, "int16")
    if zero is None or (point is not None and not point.any()):
        return node.emit(wide)
    below = relax.op.astype(zero, "int16") if point is None else constant(point.astype("int16"))
    return node.emit(relax.op.subtract(wide, below))


def _matmul_integer(node: Node, inputs: Operands) -> Any:
    """Return the exact int32 sums."""
    left, right, left_zero, right_zero = (inputs[k] for k in range(4))
    rows = None if left_zero is None or len(ir.static_shape(left_zero)) != 1 else [-1, 1]
    weights, zero = known(right), known(right_zero)
    if weights is not None and weights.ndim == 2 and (right_zero is None or zero is not None):
        shifted = weights.astype("int32") - (0 if zero is None else zero.astype("int32"))
        if np.abs(shifted).max(initial=0) <= _LARGEST:
            return _product_of_bytes(node, left, left_zero, rows, shifted)
    return relax.op.matmul(
        without_zero(node, left, left_zero, rows), without_zero(node, right, right_zero), out_dtype="int32"
    )


def _product_of_bytes(
    node: Node, left: Value, zero: Value | None, rows: Sequence[int] | None, weights: np.ndarray
) -> Any:
    """Return the sums of data that stay 8 bits: what their zero point adds to all products of a column is subtracted.

    Parameters
    ----------
    node : Node
        Where calls are bound.
    left : Value
        uint8 or int8 ``[..., K]``.
    zero : Value, optional
        Its zero point, or one per row.
    rows : sequence of int, optional
        The shape that aligns the latter with rows.
    weights : numpy.ndarray
        ``[K, N]``, int32, of at most 127.
    """
    offset, data = 0, left
    if str(left.ty.dtype) == "uint8":
        offset = 128
        wide = relax.op.subtract(relax.op.astype(left, "int16"), relax.const(np.int16(offset)))
        data = node.emit(relax.op.astype(wide, "int8"))
    sums = node.emit(relax.op.matmul(data, constant(weights, "int8"), out_dtype="int32"))
    below = constant(np.asarray(-offset, "int32"))
    if zero is not None:
        point = known(zero)
        own = relax.op.astype(zero, "int32") if point is None else constant(point.astype("int32"))
        below = relax.op.add(relax.op.reshape(own, list(rows or ())), below)
    elif not offset:
        return sums
    return relax.op.subtract(sums, relax.op.multiply(below, constant(weights.sum(0, dtype="int32"))))


def _conv_integer(node: Node, inputs: Operands) -> Any:
    """Return the exact int32 sums, by the conversion of a convolution."""
    data, weight, zero, weight_zero = (inputs[k] for k in range(4))
    rank = len(ir.static_shape(weight))
    per_channel = weight_zero is not None and np.prod(ir.static_shape(weight_zero)) != 1
    operands = [
        without_zero(node, data, zero, [1] * rank),
        without_zero(node, weight, weight_zero, [-1] + [1] * (rank - 1) if per_channel else [1] * rank),
    ]
    expansion = Expansion(node, f"{node.proto.name}/int32")
    wide = [expansion.add("Cast", expansion.operand(value), to=onnx.TensorProto.INT32) for value in operands]
    (result,) = expansion.results(expansion.add("Conv", *wide, **expansion.attributes("group", *_WINDOW)))
    call = node.builder.lookup_binding(result)
    if getattr(getattr(call, "op", None), "name", "") != "relax.nn.conv2d":
        return result
    # The same on int16, which kernels know.
    places = "strides", "padding", "dilation", "groups", "data_layout", "kernel_layout", "out_layout"
    return relax.op.nn.conv2d(*operands, **{name: getattr(call.attrs, name) for name in places}, out_dtype="int32")


def _scaled_sums(expansion: Expansion, sums: str, scale: str, bias: Value | None) -> list[Value]:
    real = expansion.add("Mul", expansion.add("Cast", sums, to=onnx.TensorProto.FLOAT), scale)
    return expansion.results(real if bias is None else expansion.add("Add", real, expansion.operand(bias)))


def _matmul_to_float(node: Node, inputs: Operands) -> Any:
    expansion = Expansion(node)
    left, right, left_scale, right_scale, left_zero, right_zero = (expansion.operand(inputs[k]) for k in range(6))
    sums = expansion.add("MatMulInteger", left, right, left_zero, right_zero)
    return _scaled_sums(expansion, sums, expansion.add("Mul", left_scale, right_scale), inputs[6])


def _dynamic_matmul(node: Node, inputs: Operands) -> Any:
    return dynamic_product(node, *(inputs[k] for k in range(5)))


def dynamic_product(
    node: Node, data: Value, right: Value, scale: Value, zero: Value | None, bias: Value | None = None
) -> list[Value]:
    """Return the product of data, quantized by their range, and an 8-bit matrix of one scale, or one per column."""
    expansion = Expansion(node)
    names = ["codes", "scale", "zero"]
    left, matrix, matrix_scale, matrix_zero = map(expansion.operand, (data, right, scale, zero))
    expansion.extend("DynamicQuantizeLinear", [left], names)
    sums = expansion.add("MatMulInteger", names[0], matrix, names[2], matrix_zero)
    return _scaled_sums(expansion, sums, expansion.add("Mul", names[1], matrix_scale), bias)


_MICROSOFT: dict[str, Converter] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "QLinearConv": _conv,
    "QLinearAdd": _binary("Add"),
    "QLinearMul": _binary("Mul"),
    "QLinearAveragePool": _unary("AveragePool", "ceil_mode", "count_include_pad", *_WINDOW),
    "QLinearGlobalAveragePool": _unary("GlobalAveragePool"),
    "QLinearConcat": _concat,
    "QLinearLeakyRelu": _unary("LeakyRelu", "alpha"),
    "QLinearSigmoid": _unary("Sigmoid"),
    "QLinearSoftmax": _unary("Softmax", "axis"),
    "QLinearReduceMean": _unary("ReduceMean", "axes", "keepdims"),
    "QLinearWhere": _where,
    "QGemm": _gemm,
    "MatMulIntegerToFloat": _matmul_to_float,
    "DynamicQuantizeMatMul": _dynamic_matmul,
}

CONVERTERS: dict[str, Converter] = {
    "QuantizeLinear": _quantize,
    "DequantizeLinear": _dequantize,
    "DynamicQuantizeLinear": _dynamic_quantize,
    "QLinearConv": _conv,
    "QLinearMatMul": _matmul,
    "MatMulInteger": _matmul_integer,
    "ConvInteger": _conv_integer,
    **{f"com.microsoft.{name}": converter for name, converter in _MICROSOFT.items()},
}
