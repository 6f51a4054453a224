"""Matrix products: dense layers, whose right-hand side is a constant matrix, and products of activations."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.batching import Axes, Join, JoinedCall
from nnfuze_tvm.graph.channels import CoupledLayer, Coupling, Filters, Labels, Removal
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers, Unsupported, checked, dtype_of, weight_constant
from nnfuze_tvm.graph.integers.values import Known, Quantized, Sum
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops._windows import accumulator
from nnfuze_tvm.graph.ops.operator import Example, Layer, Operator

_FILTERS = Filters(groups=1, outer=1, inner=0, transposed=False)


def evaluate(_: Call, left: np.ndarray, right: np.ndarray) -> np.ndarray:
    """Return the product; integers are summed exactly."""
    kind = accumulator(left.dtype)
    return left.astype(kind) @ right.astype(kind)


def layer(call: Call) -> Layer | None:
    """Return where a dense layer has its channels; None where the right-hand side is no matrix."""
    if len(static_shape(call.args[1])) != 2:
        return None
    return Layer(len(static_shape(call.args[0])) - 1, len(static_shape(call)) - 1, _FILTERS)


def rows(_: Call, data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return some of the rows that a dense layer multiplies by its weights."""
    return data.reshape(-1, data.shape[-1])[places][None]


def macs(call: Call) -> int:
    """Return the multiply-accumulates of a matrix product."""
    return prod(static_shape(call)) * static_shape(call.args[0])[-1]


def couple(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    """Label the columns of the result anew."""
    data, weight = call.args
    if isinstance(data, GenericConst) or not isinstance(weight, GenericConst) or len(static_shape(weight)) != 2:
        return None
    labels = coupling.tensor(data)
    outputs = coupling.channels.fresh(static_shape(weight)[1])
    coupling.layers[var] = CoupledLayer(var.name, data, len(labels) - 1, array(weight), _FILTERS, labels[-1], outputs)
    return [*labels[:-1], outputs]


def cut(removal: Removal, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    """Write a product with a smaller matrix."""
    own = removal.coupling.layers.get(var)
    if own is not None:
        args = [args[0], removal.cut(args[1], [own.inputs, own.outputs])]
    return Call(call.op, args, call.attrs, call.ty_args)


def integer(context: Integers, call: Call, name: str) -> Known:
    """Multiply codes by an int8 matrix ``[K, N]``, or two tensors of codes."""
    data, right = context.quantized(call.args[0]), context.value(call.args[1])
    if isinstance(right, Quantized):
        return checked(_product_of_codes(context, data, right, name))
    weight = context.weight(call.args[1], 1)
    if weight.values.ndim != 2:
        raise Unsupported("its weights are no matrix")
    assert weight.codes is not None
    codes, matrix = data.codes.expr, weight_constant(weight.codes)
    if dtype_of(matrix) == "int16":  # CPUs multiply pairs of numbers of one type
        codes = context.emit(op.astype(codes, "int16"))
    product = context.emit(op.matmul(codes, matrix, out_dtype="int32"), name)
    return context.contraction(product, data, weight, 1, len(data.shape) - 1)


def _product_of_codes(context: Integers, left: Quantized, right: Quantized, name: str) -> Sum:
    codes = [side.codes.expr for side in (left, right)]
    if left.zero_point or right.zero_point:
        codes = [_shifted(context, side) for side in (left, right)]
    result = context.emit(op.matmul(*codes, out_dtype="int32"), name)
    one = np.ones((1,) * len(result.ty.shape))
    bound = left.magnitude * right.magnitude * left.shape[-1]
    return Sum(result, left.scale * right.scale * one, np.zeros(one.shape, "int64"), bound * one)


def _is_equal(left: GenericConst, right: GenericConst) -> bool:
    return bool(left.same_as(right)) or array(left).tobytes() == array(right).tobytes()


def _shifted(context: Integers, data: Quantized) -> Value:
    """Return codes without their zero point, in int16."""
    wide = context.emit(op.astype(data.codes.expr, "int16"))
    return context.emit(op.subtract(wide, relax.const(np.int16(data.zero_point)))) if data.zero_point else wide


def batch(calls: Sequence[Call], axes: Axes) -> JoinedCall | None:
    """One input: more columns. Several: more rows where the weights are equal, else one batched product."""
    data = [call.args[0] for call in calls]
    weights = [call.args[1] for call in calls]
    if not all(isinstance(weight, GenericConst) and len(static_shape(weight)) == 2 for weight in weights):
        return None
    shapes, source = [static_shape(weight) for weight in weights], static_shape(data[0])
    axis = len(source) - 1
    if axis < 1:
        return None
    sizes = tuple(shape[1] for shape in shapes)
    dtype = calls[0].attrs.out_dtype or None
    work = sum(map(macs, calls))
    if all(value.same_as(data[0]) for value in data):

        def wider(new: list[Value]) -> Value:
            weight = relax.const(np.concatenate([array(one) for one in weights], 1))
            return op.matmul(new[0], weight, out_dtype=dtype)

        return JoinedCall([data[0]], wider, axis, sizes, max(sizes), sum(sizes), work)
    if len(set(shapes)) != 1 or axes[0] not in (None, axis):
        return None
    if len({static_shape(value) for value in data}) != 1:
        return None
    count, rows, (depth, width) = len(calls), prod(source[:-1]), shapes[0]
    operand = Join(tuple(data), axis)
    if all(_is_equal(weight, weights[0]) for weight in weights[1:]):

        def taller(new: list[Value]) -> Value:
            product = op.matmul(op.reshape(new[0], [rows * count, depth]), weights[0], out_dtype=dtype)
            return op.reshape(product, [*source[:-1], count * width])

        return JoinedCall([operand], taller, axis, sizes, width, width, work)

    def build(new: list[Value]) -> Value:
        stacked = relax.const(np.stack([array(one) for one in weights]))
        if rows == 1:
            product = op.matmul(op.reshape(new[0], [count, 1, depth]), stacked, out_dtype=dtype)
        else:
            apart = op.permute_dims(op.reshape(new[0], [rows, count, depth]), [1, 0, 2])
            product = op.permute_dims(op.matmul(apart, stacked, out_dtype=dtype), [1, 0, 2])
        return op.reshape(product, [*source[:-1], count * width])

    return JoinedCall([operand], build, axis, sizes, width, width, work)


OPERATORS = {
    "matmul": Operator(
        effect="layer",
        evaluate=evaluate,
        train=lambda torch, _, left, right: torch.matmul(left, right),
        examples=(
            Example(((1, 32), (32, 24)), op.matmul, constants=1),
            Example(((5, 32), (32, 24)), op.matmul, constants=1),
            Example(((2, 5, 32), (32, 24)), op.matmul, constants=1),
            Example(((2, 9, 32), (2, 32, 24)), op.matmul),
        ),
        layer=layer,
        rows=rows,
        macs=macs,
        couple=couple,
        cut=cut,
        quantizes=True,
        integer=integer,
        half=True,
        batch=batch,
        kernels=("dense", "weight_only"),
    ),
}

ONNX = {"matmul": onnx.matmul}
