"""Convolutions of few input channels multiply whole kernel rows, so that dot products find four neighbours."""

from __future__ import annotations

from math import gcd
from operator import attrgetter

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.contraction import Contraction
from nnfuze_tvm.graph.dataflow import Emitter, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.unsigned_bytes import ZERO, correction, unsigned
from nnfuze_tvm.passes.lower.whole_channels import Channels, first_channels

# The annotation of a block that copies data: so many numbers of the last axis are all padding or all data.
SEGMENT = "nnfuze.segment"
# A dot product takes this many neighbours.
_GROUP = 4
# Rows of the padded copy begin and end at multiples of this, so that they are copied in whole vectors.
_ALIGNMENT = 32


@module_pass(opt_level=0, name="RowConvolutions")
class RowConvolutions:
    """Give 8-bit convolutions whose input channels are no multiple of four one reduction axis per kernel row.

    In NHWC the pixels of a kernel row lie side by side: column and channel are one axis of ``KW * IC`` numbers.
    Its weights are padded with zeros to a multiple of four; what they meet in the data is of no account, so it need
    only exist: rows of the padded copy of the image are that much longer. The convolution becomes a PrimFunc that
    sums ``padded[n, y * stride + ky, x * stride * IC + k] * weights[o, ky, k]`` in int32.

    Parameters
    ----------
    channels : callable, optional
        How many output channels the machine should compute, see `WholeChannels`; by default a layer's own.
    as_unsigned : bool
        The machine's dot products want unsigned data, see `UnsignedBytes`.
    """

    def __init__(self, channels: Channels = attrgetter("channels"), as_unsigned: bool = False) -> None:
        self.channels = channels
        self.as_unsigned = as_unsigned

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, self._rewrite)

    def _rewrite(self, func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
        def by_rows(value: relax.Expr, name: str, emitter: Emitter) -> relax.Expr | None:
            return self._by_rows(value, name, emitter, builder) if _is_candidate(value) else None

        return with_values(func, by_rows)

    def _by_rows(self, call: Call, name: str, emitter: Emitter, builder: relax.BlockBuilder) -> relax.Expr:
        """Emit a convolution as one over kernel rows, and return its result."""
        weights = array(call.args[1])
        own, height, width, channels = weights.shape
        length = -(-width * channels // _GROUP) * _GROUP
        signed = self.as_unsigned and str(call.args[0].ty.dtype) == "int8"
        data, factors, sums = (str(each.ty.dtype) for each in (*call.args, call))
        _, rows, cols, _ = static_shape(call)
        work = Contraction(rows, cols, own, height * length, length, "uint8" if signed else data, factors, sums)
        count = self.channels(work)
        wide = np.zeros((count, height, length), weights.dtype)
        wide[:own, :, : width * channels] = weights.reshape(own, height, -1)
        value = emitter.emit(_over_rows(call, wide, signed, builder), name)
        if signed:
            value = emitter.emit(op.add(value, constant(correction(wide))))
        return value if count == own else emitter.emit(first_channels(builder, value, own))


def _is_candidate(call: relax.Expr) -> bool:
    if op_name(call) != "nn.conv2d" or not isinstance(call.args[1], GenericConst):
        return False
    attrs = call.attrs
    kernel = static_shape(call.args[1])
    return (
        str(attrs.out_dtype) == "int32"
        and str(call.args[1].ty.dtype.dtype) == "int8"
        and (str(attrs.data_layout), str(attrs.kernel_layout)) == ("NHWC", "OHWI")
        and str(attrs.out_layout or "NHWC") == "NHWC"
        and int(attrs.groups) == 1
        and kernel[3] % _GROUP != 0
        and (kernel[2] == 1 or int(attrs.dilation[1]) == 1)
    )


def _over_rows(call: Call, rows: np.ndarray, signed: bool, builder: relax.BlockBuilder) -> Call:
    """Return a convolution with weights ``[channels, KH, numbers of a row]``; data that are ``signed`` become uint8."""
    (count, height, length), channels = rows.shape, static_shape(call.args[1])[-1]
    shape = (*static_shape(call)[:-1], count)
    attrs = call.attrs
    data_shape = static_shape(call.args[0])
    top, left, bottom, _ = (int(pad) for pad in attrs.padding)
    stride_y, stride_x = (int(stride) for stride in attrs.strides)
    dilation = int(attrs.dilation[0])
    own = data_shape[2] * channels
    # Then whole units of a row are padding or not, and data are read side by side for the simplifier to see.
    unit = gcd(own, _ALIGNMENT)
    start = -(-left // _ALIGNMENT) * _ALIGNMENT * channels
    skip = start - left * channels
    needed = max(start + own, skip + (shape[2] - 1) * stride_x * channels + length)
    pitch = -(-needed // _ALIGNMENT) * _ALIGNMENT

    def conv2d_rows(data: te.Tensor, kernel: te.Tensor) -> te.Tensor:
        def padded_at(n: tirx.Var, y: tirx.Var, at: tirx.Var) -> tirx.PrimExpr:
            place = tirx.indexdiv(at, unit)
            inside = tirx.all(y >= top, y < top + data_shape[1], place >= start // unit, place < (start + own) // unit)
            pixel = tirx.indexdiv(at, channels) - start // channels
            number = data(n, y - top, pixel, tirx.indexmod(at, channels))
            if signed:
                return tirx.if_then_else(inside, unsigned(number), tirx.const(ZERO, "uint8"))
            return tirx.if_then_else(inside, number, tirx.const(0, data.dtype))

        shape_of_copy = (data_shape[0], top + data_shape[1] + bottom, pitch)
        padded = te.compute(shape_of_copy, padded_at, name="pad_temp", attrs={SEGMENT: unit})
        ky, k = te.reduce_axis((0, height), "ky"), te.reduce_axis((0, length), "k")

        def element(n: tirx.Var, y: tirx.Var, x: tirx.Var, o: tirx.Var) -> tirx.PrimExpr:
            number = padded(n, y * stride_y + ky * dilation, x * (stride_x * channels) + (skip + k))
            return te.sum(number.astype("int32") * kernel(o, ky, k).astype("int32"), axis=[ky, k])

        return te.compute(shape, element, name="conv2d_rows")

    result = builder.call_te(conv2d_rows, call.args[0], relax.const(rows), primfunc_name_hint="conv2d_rows")
    gvar = result.args[0]
    builder.update_func(gvar, builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    return result
