"""Layers take signed bytes as unsigned ones, 128 larger, where a machine's dot products want them so."""

from __future__ import annotations

from math import prod

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import (
    Emitter,
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    substitute,
    with_rewritten,
)
from nnfuze_tvm.graph.integers.context import dtype_of
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.integers.values import INT32_MAX
from nnfuze_tvm.graph.ir import static_shape

# What stands for zero, and the largest number there is.
ZERO, _LARGEST = 128, 255
# The machine adds so many products at once to so many channels; matrix products of others stay as they are.
_DEPTH, _CHANNELS = 4, 8


@module_pass(opt_level=0, name="UnsignedBytes")
class UnsignedBytes:
    """Add 128 to the int8 data of layers with constant weights, and take back what that adds to the int32 sums.

    That is 128 times the sum of a channel's weights, a constant, which joins the bias. Sums are the same bits. Takes
    convolutions with the channels last that are not grouped, which copy their data so if they pad them, and products
    with a matrix.

    Parameters
    ----------
    unsigned : bool
        The machine has fast dot products of unsigned with signed bytes (of any values), but none of signed with signed
        ones; else the pass does nothing.
    """

    def __init__(self, unsigned: bool) -> None:
        self.unsigned = unsigned

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, _rewrite) if self.unsigned else mod


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    if not any(_is_convolution(b.value) or _is_product(b.value) for b in bindings(func)):
        return func
    return _Rewriter(builder).run(func)


def larger(data: Value) -> Call:
    """Return int8 tensors as uint8 ones, 128 larger."""
    return op.astype(op.add(op.astype(data, "int16"), relax.const(np.int16(ZERO))), "uint8")


def unsigned(data: tirx.Expr) -> tirx.Expr:
    """Return an int8 as a uint8, 128 larger."""
    return tirx.reinterpret("uint8", data ^ tirx.const(-ZERO, "int8"))


def correction(weights: np.ndarray) -> np.ndarray:
    """Return what takes 128 times the weights from sums, per channel; weights have output channels first."""
    totals = weights.astype("int64").reshape(len(weights), -1).sum(axis=1)
    return (-ZERO * totals).astype("int32")


def fits(products: int) -> bool:
    """Whether sums of so many products fit int32."""
    return products * ZERO * _LARGEST <= INT32_MAX


def _is_product(call: Value) -> bool:
    if op_name(call) != "matmul" or str(call.attrs.out_dtype) != "int32":
        return False
    data, weights = call.args
    if (dtype_of(data), dtype_of(weights)) != ("int8", "int8") or not isinstance(weights, GenericConst):
        return False
    if len(static_shape(weights)) != 2:
        return False
    depth, channels = static_shape(weights)
    return depth % _DEPTH == 0 and channels % _CHANNELS == 0 and fits(depth)


def _is_convolution(value: Value) -> bool:
    if op_name(value) not in ("nn.conv1d", "nn.conv2d", "nn.conv3d") or not isinstance(value.args[1], GenericConst):
        return False
    attrs, axes = value.attrs, "DHW"[-len(static_shape(value)) + 2 :]
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
    return (
        layouts == (f"N{axes}C", f"O{axes}I", f"N{axes}C")
        and [str(e.ty.dtype) for e in (*value.args, value)] == ["int8", "int8", "int32"]
        and int(attrs.groups) == 1
        and fits(prod(static_shape(value.args[1])[1:]))
    )


class _Rewriter:
    def __init__(self, builder: relax.BlockBuilder) -> None:
        self._builder = builder
        self._emitter = Emitter()
        self._values: dict[Value, Value] = {}
        # Sums that are too large, and what is to be added to them.
        self._shifted: dict[Value, tuple[Value, np.ndarray]] = {}
        self._unsigned: dict[Value, Value] = {}

    def run(self, func: relax.Function) -> relax.Function:
        for binding in bindings(func):
            value, name = binding.value, binding.var.name
            if _is_product(value):
                sums = self._emitter.emit(self._product(value), name)
                self._shifted[binding.var] = sums, correction(array(value.args[1]).T)
            elif _is_convolution(value):
                sums = self._emitter.emit(self._convolution(value), name)
                self._shifted[binding.var] = sums, correction(array(value.args[1]))
            else:
                if op_name(value) == "add":
                    value = self._with_bias(value)
                self._values[binding.var] = self._emitter.emit(self._restored(value), name)
        outputs = [self._restored(out) for out in output_fields(func)]
        return self._emitter.finish(func.params, outputs, func.attrs)

    def _product(self, call: Call) -> Call:
        return op.matmul(self._larger(call.args[0]), call.args[1], out_dtype="int32")

    def _convolution(self, call: Call) -> Call:
        """Return a convolution that copies its data, if only to pad it; else what makes them makes them unsigned."""
        if any(int(each) for each in call.attrs.padding):
            return _convolution(self._restored(call), self._builder)
        return Call(call.op, [self._larger(call.args[0]), call.args[1]], call.attrs, call.ty_args)

    def _larger(self, value: Value) -> Value:
        """Return signed bytes as unsigned ones, once for all that read them."""
        data = self._restored(value)
        if data not in self._unsigned:
            self._unsigned[data] = self._emitter.emit(larger(data))
        return self._unsigned[data]

    def _with_bias(self, value: Call) -> Call:
        """Add what is to be added to sums to the constant that a call adds to them."""
        for sums, bias in (value.args, reversed(value.args)):
            if sums in self._shifted and isinstance(bias, GenericConst):
                raw, more = self._shifted[sums]
                return op.add(raw, constant(array(bias) + more))
        return value

    def _restored(self, value: Value) -> Value:
        for leaf in operands(value):
            if leaf in self._shifted and leaf not in self._values:
                raw, more = self._shifted[leaf]
                shape = (1,) * (len(static_shape(raw)) - 1) + more.shape
                self._values[leaf] = self._emitter.emit(op.add(raw, constant(more.reshape(shape))))
        return substitute(value, self._values)


def _convolution(call: Call, builder: relax.BlockBuilder) -> Call:
    attrs, (data_shape, weight_shape, shape) = call.attrs, (static_shape(e) for e in (*call.args, call))
    rank = len(shape) - 2
    strides, dilations = ([int(each) for each in field] for field in (attrs.strides, attrs.dilation))
    before, behind = ([int(p) for p in attrs.padding][at : at + rank] for at in (0, rank))
    padded_shape = [
        data_shape[0],
        *(first + size + last for first, size, last in zip(before, data_shape[1:-1], behind, strict=True)),
        data_shape[-1],
    ]

    def conv_unsigned(data: te.Tensor, kernel: te.Tensor) -> te.Tensor:
        def padded_at(*index: tirx.Var) -> tirx.Expr:
            places = [at - first if first else at for at, first in zip(index[1:-1], before, strict=True)]
            number = unsigned(data(index[0], *places, index[-1]))
            inside = [
                tirx.all(at >= first, at < first + size)
                for at, first, last, size in zip(index[1:-1], before, behind, data_shape[1:-1], strict=True)
                if first or last
            ]
            return tirx.if_then_else(tirx.all(*inside), number, tirx.const(ZERO, "uint8")) if inside else number

        padded = te.compute(padded_shape, padded_at, name="pad_temp")
        window = [te.reduce_axis((0, size), f"k{at}") for at, size in enumerate(weight_shape[1:-1])]
        depth = te.reduce_axis((0, weight_shape[-1]), "rc")

        def element(*index: tirx.Var) -> tirx.Expr:
            places = [
                at * stride + tap * dilation
                for at, stride, tap, dilation in zip(index[1:-1], strides, window, dilations, strict=True)
            ]
            number = padded(index[0], *places, depth).astype("int32")
            return te.sum(number * kernel(index[-1], *window, depth).astype("int32"), axis=[*window, depth])

        return te.compute(shape, element, name="conv_unsigned")

    result = builder.call_te(conv_unsigned, *call.args, primfunc_name_hint=op_name(call).removeprefix("nn."))
    gvar = result.args[0]
    builder.update_func(gvar, builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    return result
