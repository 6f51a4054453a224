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
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape

# What stands for zero.
ZERO = 128
# Sums of more products might not fit int32.
_MAX_PRODUCTS = 1 << 16


@module_pass(opt_level=0, name="UnsignedBytes")
class UnsignedBytes:
    """Let convolutions of int8 data copy them as uint8, with 128 added, and take from each sum what that adds to it.

    That is 128 times the sum of a channel's weights, a constant. Sums are the same bits. Takes int8 convolutions of
    constant weights with the channels last that are not grouped.

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
        if not self.unsigned:
            return mod
        builder = relax.BlockBuilder(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and any(_is_candidate(b.value) for b in bindings(func)):
                builder.update_func(gvar, _rewrite(func, builder))
        result = builder.get()
        return result.with_attrs(dict(mod.attrs.items())) if mod.attrs is not None else result


def unsigned(data: tirx.Expr) -> tirx.Expr:
    """Return an int8 as a uint8, 128 larger."""
    return tirx.reinterpret("uint8", data ^ tirx.const(-ZERO, "int8"))


def corrected(sums: Value, weights: np.ndarray) -> Call:
    """Return the sums of unsigned data as those of signed ones; weights and sums have one axis of output channels."""
    totals = weights.astype("int64").reshape(len(weights), -1).sum(axis=1)
    return op.add(sums, constant((-ZERO * totals).astype("int32")))


def _is_candidate(value: Value) -> bool:
    if op_name(value) not in ("nn.conv1d", "nn.conv2d", "nn.conv3d") or not isinstance(value.args[1], GenericConst):
        return False
    attrs, axes = value.attrs, "DHW"[-len(static_shape(value)) + 2 :]
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
    return (
        layouts == (f"N{axes}C", f"O{axes}I", f"N{axes}C")
        and [str(e.ty.dtype) for e in (*value.args, value)] == ["int8", "int8", "int32"]
        and int(attrs.groups) == 1
        and prod(static_shape(value.args[1])[1:]) <= _MAX_PRODUCTS
    )


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    emitter = Emitter()
    values: dict[Value, Value] = {}
    for binding in bindings(func):
        value = substitute(binding.value, values)
        if _is_candidate(value):
            sums = emitter.emit(_convolution(value, builder), binding.var.name)
            values[binding.var] = emitter.emit(corrected(sums, array(value.args[1])))
        else:
            values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


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
