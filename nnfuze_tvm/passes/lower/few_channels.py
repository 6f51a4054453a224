"""Convolutions to few channels sum products side by side: vectors run over what is summed."""

from __future__ import annotations

from functools import reduce
from math import gcd

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.row_convolutions import SEGMENT

# More output channels fill vectors of their own.
_MAX_CHANNELS = 4
# Instructions that add up the lanes of a vector.
_ADD_LANES = 8
_LEAST_LANES = 4


@module_pass(opt_level=0, name="FewChannels")
class FewChannels:
    """Compute float32 convolutions to few channels (a heat map, a mask) by vectors along the kernel's rows.

    In NHWC the pixels of a kernel row lie side by side, so column and input channel are one axis of ``KW * IC``
    numbers. Each lane sums every ``lanes``-th of them; the lanes are added up at the end, by halves. The last vector of
    a row is moved back to end with it, and has zero weights for what it shares with the one before. Takes convolutions
    of constant weights that are not grouped, and whose kernel rows have no gaps.

    Parameters
    ----------
    lanes : int
        Float32 numbers in a vector of the machine.
    """

    def __init__(self, lanes: int) -> None:
        self.lanes = lanes

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, self._rewrite)

    def _rewrite(self, func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
        def by_rows(value: Value, _name: str, _emitter: Emitter) -> Value | None:
            lanes = self._vector(value)
            return _convolution(value, lanes, builder) if lanes else None

        return with_values(func, by_rows)

    def _vector(self, value: Value) -> int:
        """Return of how many lanes vectors should be, 0 for what is no such convolution or is faster by channels."""
        if op_name(value) != "nn.conv2d" or not isinstance(value.args[1], GenericConst):
            return 0
        attrs, (channels, height, width, depth) = value.attrs, static_shape(value.args[1])
        layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
        if layouts != ("NHWC", "OHWI", "NHWC") or int(attrs.groups) != 1 or channels > _MAX_CHANNELS:
            return 0
        if {str(e.ty.dtype) for e in (*value.args, value)} != {"float32"}:
            return 0
        if width > 1 and int(attrs.dilation[1]) != 1:
            return 0

        def cost(lanes: int) -> int:
            return channels * (height * -(-width * depth // lanes) + _ADD_LANES)

        widths = [lanes for lanes in (self.lanes, self.lanes // 2) if _LEAST_LANES <= lanes <= width * depth]
        lanes = min(widths, key=cost, default=0)
        # By channels, a product is an instruction, and the number that it takes is brought into all lanes by another.
        return lanes if lanes and 2 * cost(lanes) <= height * width * depth else 0


def _convolution(call: Call, lanes: int, builder: relax.BlockBuilder) -> Call:
    attrs, shape = call.attrs, static_shape(call)
    (images, rows, cols, depth), (channels, height, width, _) = (static_shape(arg) for arg in call.args)
    top, left, bottom, right = (int(pad) for pad in attrs.padding)
    stride_y, stride_x = (int(stride) for stride in attrs.strides)
    dilation = int(attrs.dilation[0])
    vectors = -(-width * depth // lanes)
    # Its lanes, as binary digits: halves then are values of the first one.
    digits_of = [2] * (lanes.bit_length() - 1)
    back = vectors * lanes - width * depth
    # Where vectors lie inside of pixels, and there is no padding, the data need no other form.
    copied = bool(top or left or bottom or right or depth % lanes)
    unit = gcd(cols * depth, left * depth, right * depth)

    def conv2d_few(data: te.Tensor, kernel: te.Tensor) -> te.Tensor:
        def padded_at(n: tirx.Var, y: tirx.Var, at: tirx.Var) -> tirx.Expr:
            place = tirx.indexdiv(at, unit)
            first = left * depth // unit
            inside = tirx.all(y >= top, y < top + rows, place >= first, place < first + cols * depth // unit)
            pixel = tirx.indexdiv(at, depth) - left
            number = data(n, y - top, pixel, tirx.indexmod(at, depth))
            return tirx.if_then_else(inside, number, tirx.const(0, data.dtype))

        shape_of_copy = (images, top + rows + bottom, (left + cols + right) * depth)
        padded = te.compute(shape_of_copy, padded_at, name="pad_temp", attrs={SEGMENT: unit})

        ky, k = te.reduce_axis((0, height), "ky"), te.reduce_axis((0, vectors), "k")

        def lane_of(n: tirx.Var, y: tirx.Var, x: tirx.Var, o: tirx.Var, *digits: tirx.Var) -> tirx.Expr:
            lane = reduce(lambda number, digit: number * 2 + digit, digits)
            first = tirx.min(k * lanes, width * depth - lanes) if back else k * lanes
            row, column = y * stride_y + ky * dilation, x * stride_x
            if copied:
                number = padded(n, row, column * depth + first + lane)
            else:
                number = data(n, row, column + tirx.indexdiv(first, depth), tirx.indexmod(first, depth) + lane)
            return te.sum(number * kernel(o, ky, k, *digits), axis=[ky, k])

        total = te.compute((*shape, *digits_of), lane_of, name="few_sums")
        for place in range(len(digits_of)):
            total = _by_halves(total, f"few_halves{place}")
        return total

    numbers = array(call.args[1]).reshape(channels, height, -1)
    weights = np.zeros((channels, height, vectors * lanes), "float32")
    whole = (vectors - 1) * lanes
    weights[..., :whole], weights[..., whole + back :] = numbers[..., :whole], numbers[..., whole:]
    weights = constant(weights.reshape(channels, height, vectors, *digits_of))
    result = builder.call_te(conv2d_few, call.args[0], weights, primfunc_name_hint="conv2d_few")
    gvar = result.args[0]
    builder.update_func(gvar, builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
    return result


def _by_halves(sums: te.Tensor, name: str) -> te.Tensor:
    """Return sums over the first of the lanes' digits."""
    half = te.reduce_axis((0, 2), "half")

    def pair(*index: tirx.Var) -> tirx.Expr:
        return te.sum(sums(*index[:4], half, *index[4:]), axis=half)

    return te.compute((*sums.shape[:4], *sums.shape[5:]), pair, name=name)
