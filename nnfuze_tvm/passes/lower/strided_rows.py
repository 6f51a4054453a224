"""Strided convolutions over one axis take neighbours as channels, and whole vectors of output channels."""

from __future__ import annotations

from math import gcd

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.deferred import Form, Rewriter
from nnfuze_tvm.passes.lower.weights import is_constant, rearranged
from nnfuze_tvm.passes.lower.whole_vectors import FirstChannels, is_odd, whole

# From this many channels on, a convolution has long enough reductions without their neighbours.
_CHANNELS = 16


@module_pass(opt_level=0, name="StridedRows")
class StridedRows:
    """Give a conv1d of few channels (a Fourier transform of short segments, a learned filter bank) long reductions.

    Where stride and kernel have a common divisor ``g``, ``g`` neighbours in a row are as many channels of a row of the
    ``g``-th part: channels last, that is the same memory. Kernel and stride become the ``g``-th part, too. An odd
    number of output channels (a spectrum has one) gets channels of zero weights, for vectors to be whole; they are cut
    off behind what follows element by element.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and any(op_name(b.value) == "nn.conv1d" for b in bindings(func)):
                mod.update_func(gvar, Rewriter(_convolution).rewrite(func))
        return mod


def _convolution(rewriter: Rewriter, call: Call, var: Var) -> tuple[list[Call], Form] | None:
    """Return the convolution over fewer positions, and which of its channels are the result."""
    if op_name(call) != "nn.conv1d" or not is_constant(call.args[1], rewriter.bound):
        return None
    attrs = call.attrs
    batch, channels, length = static_shape(call.args[0])
    outputs, _, kernel = static_shape(call.args[1])
    stride = int(attrs.strides[0])
    step = gcd(kernel, stride)
    if step == 1 or channels >= _CHANNELS or int(attrs.groups) != 1 or int(attrs.dilation[0]) != 1:
        return None
    form = FirstChannels(1, outputs, whole(outputs) if is_odd(outputs) else outputs)

    def arrange(values: np.ndarray, fill: np.ndarray) -> np.ndarray:
        rows = values.reshape(outputs, channels, kernel // step, step).transpose(0, 3, 1, 2)
        wide = np.empty((form.computed, channels * step, kernel // step), values.dtype)
        wide[:] = fill[-1:]
        wide[:outputs] = rows.reshape(outputs, channels * step, kernel // step)
        return wide

    # All that the kernel meets, and what is behind it, in whole parts.
    needed = (static_shape(var)[2] - 1) * stride + kernel
    before = int(attrs.padding[0])
    after = max(0, needed - before - length)
    parts = (before + length + after) // step
    data = rewriter.read(call.args[0])
    if before or after:
        data = op.nn.pad(data, [0, 0, 0, 0, before, after])
    if parts * step < before + length + after:
        data = op.strided_slice(data, [2], [0], [parts * step])
    rows = op.reshape(op.permute_dims(data, [0, 2, 1]), [batch, parts, step * channels])
    weights = rearranged(call.args[1], rewriter.bound, arrange, form.along_channels, channel_axes=(0, 0))
    convolution = op.nn.conv1d(
        op.permute_dims(rows, [0, 2, 1]), weights, strides=stride // step, out_dtype=attrs.out_dtype or None
    )
    return [convolution], form
