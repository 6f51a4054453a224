"""Emits the integer operators: exact int32 sums, and one way back to 8 bits.

Every result is the same on every instruction set. LLVM is free to contract a float multiplication and a
float addition into one rounding, so no float addition ever follows a multiplication here: whatever is
added is added as int32, and a sum becomes 8 bits again by exactly one float32 multiplication, a rounding
to the nearest even integer and a clip.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.relax import op

from nnfuze_tvm.dataflow import Emitter
from nnfuze_tvm.passes.integer_values import INT32_MAX, Codes, Constant, Parts, Quantized, Sum

# FuseOps merges element-wise operators into the PrimFunc in front of them when that has this op_pattern.
_OUT_ELEMENTWISE_FUSABLE = 4

# A residual is added in units of the accumulator; the integer ratio of the two scales must be this exact.
_RATIO_BITS = 11


def code_range(dtype: str, zero_point: int) -> tuple[int, int]:
    """Return the range of the int8 codes of a tensor; without zero point it is symmetric, ±127."""
    return (-127, 127) if zero_point == 0 and dtype == "int8" else (-128, 127)


def stored(dtype: str, zero_point: int) -> tuple[int, int]:
    """Return zero point and offset of 8-bit codes as the integer graph stores them: always as int8."""
    offset = 128 if dtype == "uint8" else 0
    return zero_point - offset, offset


class IntegerOps:
    """Emits integer operators into one function.

    Parameters
    ----------
    emitter
        Receives the bindings.
    builder
        Receives the PrimFuncs of the operators that Relax has no name for.
    """

    def __init__(self, emitter: Emitter, builder: relax.BlockBuilder) -> None:
        self.emitter = emitter
        self.builder = builder

    def emit(self, value: relax.Expr, name: str = "lv") -> relax.Expr:
        """Bind ``value`` and return its Var."""
        return self.emitter.emit(value, name)

    def _elementwise(self, function: Callable[..., te.Tensor], *args: relax.Expr, name: str) -> relax.Expr:
        call = self.builder.call_te(function, *args, primfunc_name_hint=name)
        return self.emit(call)

    def _reduction(self, function: Callable[..., te.Tensor], arg: relax.Expr, name: str) -> relax.Expr:
        """Emit a reduction that takes the operators behind it into its PrimFunc, as a convolution does."""
        call = self.builder.call_te(function, arg, primfunc_name_hint=name)
        gvar = call.args[0]
        func = self.builder.get()[gvar].with_attr("op_pattern", _OUT_ELEMENTWISE_FUSABLE)
        self.builder.update_func(gvar, func)
        return self.emit(call)

    # ---- from float, to float

    def quantize(
        self, data: relax.Expr, scale: float, zero_point: int, dtype: str, nonnegative: bool
    ) -> Codes:
        """Quantize a float tensor: ``clip(round(data / scale) + zero_point)``."""
        zero_point, offset = stored(dtype, zero_point)
        scaled = op.round(op.divide(data, relax.const(np.float32(scale))))
        lo, hi = code_range(dtype, zero_point)
        return self._narrow(scaled, max(lo, zero_point) if nonnegative else lo, hi, zero_point, offset, dtype)

    def _narrow(
        self, rounded: relax.Expr, lo: int, hi: int, zero_point: int, offset: int, dtype: str
    ) -> Codes:
        if zero_point:
            rounded = op.add(rounded, relax.const(np.float32(zero_point)))
        kind = "uint8" if zero_point == 0 and lo >= 0 else "int8"
        narrow = self.emit(op.astype(op.clip(rounded, float(lo), float(hi)), kind))
        return Codes(narrow, lo, hi, offset, dtype)

    def dequantize(self, value: Quantized) -> relax.Expr:
        """Return the float32 values."""
        data = op.astype(value.codes.expr, "float32")
        if value.zero_point:
            data = op.subtract(data, relax.const(np.float32(value.zero_point)))
        return self.emit(op.multiply(data, relax.const(np.float32(value.scale))))

    def original(self, codes: Codes) -> relax.Expr:
        """Return codes in the type that the float graph had for them."""
        if codes.offset:
            wide = op.add(op.astype(codes.expr, "int32"), relax.const(np.int32(codes.offset)))
            return self.emit(op.astype(wide, codes.dtype))
        if str(codes.expr.ty.dtype.dtype) != codes.dtype:
            return self.emit(op.astype(codes.expr, codes.dtype))
        return codes.expr

    def from_original(self, data: relax.Expr, dtype: str) -> Codes:
        """Take an 8-bit tensor that some float operator or the caller of the network provides."""
        if dtype == "int8":
            return Codes(data, -128, 127, 0, dtype)
        shifted = op.subtract(op.astype(data, "int32"), relax.const(np.int32(128)))
        return Codes(self.emit(op.astype(shifted, "int8")), -128, 127, 128, dtype)

    # ---- int32 sums

    def total(self, value: Sum) -> relax.Expr:
        """Return the int32 tensor ``expr + bias``."""
        if value.total is None:
            value.total = value.expr
            if np.any(value.bias):
                value.total = self.emit(op.add(value.expr, _int32(value.bias)))
        return value.total

    def float_sum(self, value: Sum) -> relax.Expr:
        """Return the float32 values of a sum."""
        data = op.multiply(op.astype(self.total(value), "float32"), _float32(value.scale))
        if value.clamped:
            data = op.clip(data, float(value.lo), float(value.hi))
        return self.emit(data)

    def requantize(self, value: Sum, scale: float, zero_point: int, dtype: str) -> Codes:
        """Return the sum in 8 bits.

        Emits ``add`` (int32 bias), ``astype`` float32, ``multiply``, ``round``, [``add`` zero point,]
        ``clip``, ``astype``; a pending activation only moves the bounds of the clip.
        """
        zero_point, offset = stored(dtype, zero_point)
        lo, hi = code_range(dtype, zero_point)
        if value.lo > -np.inf:
            lo = int(np.clip(np.rint(value.lo / scale) + zero_point, lo, hi))
        if value.hi < np.inf:
            hi = int(np.clip(np.rint(value.hi / scale) + zero_point, lo, hi))
        multiplier = _float32(value.scale / scale)
        rounded = op.round(op.multiply(op.astype(self.total(value), "float32"), multiplier))
        return self._narrow(rounded, lo, hi, zero_point, offset, dtype)

    def rescale(self, value: Sum, scale: float) -> Sum:
        """Return the sum as an int32 sum of another, per-tensor scale."""
        ratio = value.scale / scale
        data = op.round(op.multiply(op.astype(self.total(value), "float32"), _float32(ratio)))
        one = np.ones((1,) * len(value.shape))
        return Sum(
            self.emit(op.astype(data, "int32")),
            scale * one,
            np.int64(0) * one.astype("int64"),
            np.max(value.bound * np.abs(ratio)) + one,
        )

    def widen(self, value: Quantized) -> Sum:
        """Return 8-bit codes as an int32 sum."""
        one = np.ones((1,) * len(value.shape))
        return Sum(
            self.emit(op.astype(value.codes.expr, "int32")),
            value.scale * one,
            np.full(one.shape, -value.zero_point, "int64"),
            value.magnitude * one,
        )

    def spread(self, value: Quantized) -> Sum:
        """Return 8-bit codes as an int32 sum whose unit is fine enough to add something to."""
        wide = self.widen(value)
        factor = 2**16
        spread = self.emit(op.multiply(wide.expr, relax.const(np.int32(factor))))
        return Sum(spread, wide.scale / factor, wide.bias * factor, wide.bound * factor)

    def add_constant(self, value: Sum, constant: Constant) -> Sum | None:
        """Add a constant, rounded to the unit of the sum; None where it doesn't fit."""
        rank, shape = len(value.shape), constant.values.shape
        if len(shape) > rank or value.clamped or np.broadcast_shapes(value.shape, shape) != value.shape:
            return None
        values = constant.values.reshape((1,) * (rank - len(shape)) + shape)
        bias = np.rint(values / value.scale)
        bound = value.bound + np.abs(bias)
        if not np.all(bound <= INT32_MAX):
            return None
        total = np.broadcast_arrays(value.bias, bias.astype("int64"))
        return Sum(value.expr, value.scale, total[0] + total[1], bound)

    def multiply_constant(self, value: Sum, constant: Constant) -> Sum | None:
        """Multiply by a constant per channel, which only changes the scale; None where it doesn't fit."""
        rank, shape = len(value.shape), constant.values.shape
        if len(shape) > rank or value.clamped or np.broadcast_shapes(value.shape, shape) != value.shape:
            return None
        values = constant.values.reshape((1,) * (rank - len(shape)) + shape)
        return Sum(value.expr, value.scale * values, value.bias, value.bound) if np.all(values) else None

    def add_residual(self, value: Sum, residual: Quantized) -> Sum:
        """Add 8-bit codes to a sum, in units of the sum: ``(expr << shift) + codes * ratio``."""
        ratio = residual.scale / value.scale
        shift = max(0, int(np.ceil(_RATIO_BITS - np.log2(np.min(np.abs(ratio))))))
        largest = np.max(value.bound + np.abs(ratio) * residual.magnitude + residual.magnitude)
        if largest * 2.0**shift > INT32_MAX:
            # The units are too far apart (e.g. a channel that is almost off): meet in a third one.
            unit = (np.max(value.bound * np.abs(value.scale)) + residual.magnitude * residual.scale) / 2**28
            value, shift = self.rescale(value, float(unit)), 0
            ratio = residual.scale / value.scale
        return self._join(value, residual, np.rint(ratio * 2.0**shift).astype("int64"), shift)

    def _join(self, value: Sum, residual: Quantized, ratio: np.ndarray, shift: int) -> Sum:
        def add_residual(total: te.Tensor, codes: te.Tensor, *table: te.Tensor) -> te.Tensor:
            def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
                factor = (
                    table[0](*[0 if dim == 1 else i for i, dim in zip(index, ratio.shape, strict=True)])
                    if table
                    else tirx.const(int(ratio.flat[0]), "int32")
                )
                wide = total(*index) << tirx.const(shift, "int32") if shift else total(*index)
                return wide + codes(*index).astype("int32") * factor

            return te.compute(total.shape, element, name="T_add_residual")

        table = [] if ratio.size == 1 else [_int32(ratio)]
        # The convolution's own bias waits and comes behind, so that one add serves for both.
        scale = value.scale / 2.0**shift
        bias = value.bias * 2**shift - residual.zero_point * ratio
        bound = value.bound * 2.0**shift + np.abs(ratio) * residual.magnitude
        total = self._elementwise(add_residual, value.expr, residual.codes.expr, *table, name="add_residual")
        return Sum(total, scale, bias, bound)

    def add_codes(self, left: Quantized, right: Quantized) -> Sum:
        """Add two 8-bit tensors of equal shape: ``left * m_left + right * m_right`` in int32."""
        unit = max(left.scale, right.scale) / 2**20
        factors = [round(left.scale / unit), round(right.scale / unit)]

        def add_codes(first: te.Tensor, second: te.Tensor) -> te.Tensor:
            def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
                terms = [
                    data(*index).astype("int32") * tirx.const(factor, "int32")
                    for data, factor in zip((first, second), factors, strict=True)
                ]
                return terms[0] + terms[1]

            return te.compute(first.shape, element, name="T_add_codes")

        total = self._elementwise(add_codes, left.codes.expr, right.codes.expr, name="add_codes")
        one = np.ones((1,) * len(left.shape))
        bias = -(left.zero_point * factors[0] + right.zero_point * factors[1])
        bound = left.magnitude * factors[0] + right.magnitude * factors[1]
        known = all(side.codes.lo >= side.zero_point for side in (left, right))
        zeros = np.full(one.shape, bias, "int64")
        return Sum(total, unit * one, zeros, bound * one, lo=0.0 if known else -np.inf)

    def add_sums(self, left: Sum, right: Sum) -> Sum:
        """Add two int32 sums; both are brought to one unit."""
        sides = (left, right)
        unit = float(sum(np.max(side.bound * np.abs(side.scale)) for side in sides)) / 2**28
        first, second = (self.rescale(side, unit) for side in sides)
        total = self.emit(op.add(first.expr, second.expr))
        return Sum(total, first.scale, first.bias, first.bound + second.bound)

    def multiply(self, left: Quantized, right: Quantized) -> Sum:
        """Multiply two 8-bit tensors, with broadcasting."""
        sides = (left, right)
        shape = np.broadcast_shapes(left.shape, right.shape)

        def multiply_codes(*tensors: te.Tensor) -> te.Tensor:
            def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
                terms = []
                for data, side in zip(tensors, sides, strict=True):
                    dims = side.shape
                    own = index[len(index) - len(dims) :]
                    at = [0 if dim == 1 else i for i, dim in zip(own, dims, strict=True)]
                    term = data(*at).astype("int32")
                    terms.append(term - tirx.const(side.zero_point, "int32") if side.zero_point else term)
                return terms[0] * terms[1]

            return te.compute(shape, element, name="T_multiply_codes")

        total = self._elementwise(multiply_codes, left.codes.expr, right.codes.expr, name="multiply_codes")
        one = np.ones((1,) * len(shape))
        bound = left.magnitude * right.magnitude
        return Sum(total, left.scale * right.scale * one, np.zeros(one.shape, "int64"), bound * one)

    # ---- contractions and pooling

    def convolution(self, data: Quantized, weight: Constant, attrs: Any, name: str) -> Sum:
        """Convolve codes with int8 weights, of any layout and number of groups; padding is the zero point."""
        assert weight.codes is not None and weight.scale is not None
        rank = weight.codes.ndim
        source, padding = data.codes.expr, [int(pad) for pad in attrs.padding]
        if data.zero_point and any(padding):
            spatial = [i for i, letter in enumerate(attrs.data_layout) if letter not in "NC"]
            widths = [0] * (2 * rank)
            for k, axis in enumerate(spatial):
                widths[2 * axis], widths[2 * axis + 1] = padding[k], padding[k + len(spatial)]
            source = op.nn.pad(source, widths, pad_value=data.zero_point)
            padding = [0] * len(padding)
        convolve = op.nn.conv1d if rank == 3 else op.nn.conv2d
        result = self.emit(
            convolve(
                source,
                relax.const(weight.codes.astype("int8")),
                strides=list(attrs.strides),
                padding=padding,
                dilation=list(attrs.dilation),
                groups=int(attrs.groups),
                data_layout=attrs.data_layout,
                kernel_layout=attrs.kernel_layout,
                out_layout=attrs.out_layout or attrs.data_layout,
                out_dtype="int32",
            ),
            name,
        )
        out_layout = str(attrs.out_layout or attrs.data_layout)
        return self._contraction(
            result, data, weight, attrs.kernel_layout.index("O"), out_layout.index("C"), rank
        )

    def matmul(self, data: Quantized, weight: Constant, name: str) -> Sum:
        """Multiply codes by an int8 matrix ``[K, N]``."""
        assert weight.codes is not None
        matrix = relax.const(weight.codes.astype("int8"))
        result = self.emit(op.matmul(data.codes.expr, matrix, out_dtype="int32"), name)
        rank = len(data.shape)
        return self._contraction(result, data, weight, 1, rank - 1, rank)

    def _contraction(
        self, result: relax.Expr, data: Quantized, weight: Constant, axis: int, out_axis: int, rank: int
    ) -> Sum:
        assert weight.codes is not None and weight.scale is not None
        codes = np.moveaxis(weight.codes, axis, 0).reshape(weight.codes.shape[axis], -1).astype("int64")
        shape = [1] * rank
        shape[out_axis] = codes.shape[0]
        scale = np.broadcast_to(weight.scale.reshape(-1), (codes.shape[0],)) * data.scale
        bias = -data.zero_point * codes.sum(1)
        largest = max(abs(data.codes.lo), abs(data.codes.hi))
        bound = np.abs(codes).sum(1) * largest + np.abs(bias)
        return Sum(result, scale.reshape(shape), bias.reshape(shape), bound.reshape(shape).astype("float64"))

    def matmul_codes(self, left: Quantized, right: Quantized, name: str) -> Sum:
        """Multiply two quantized matrices, both without zero point."""
        result = self.emit(op.matmul(left.codes.expr, right.codes.expr, out_dtype="int32"), name)
        rank = len(result.ty.shape)
        one = np.ones((1,) * rank)
        bound = left.magnitude * right.magnitude * left.shape[-1]
        return Sum(result, left.scale * right.scale * one, np.zeros(one.shape, "int64"), bound * one)

    def reduce_sum(self, data: Quantized, axes: Sequence[int], keepdims: bool) -> Sum:
        """Sum codes over ``axes``; the real value is that of the sum."""
        shape = data.shape
        count = int(np.prod([shape[axis] for axis in axes]))
        kept = [axis for axis in range(len(shape)) if axis not in axes]
        out_shape = [1 if axis in axes else dim for axis, dim in enumerate(shape) if keepdims or axis in kept]

        def reduce_sum(tensor: te.Tensor) -> te.Tensor:
            window = {axis: te.reduce_axis((0, shape[axis]), name=f"r{axis}") for axis in axes}

            def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
                own = dict(zip(range(len(shape)) if keepdims else kept, index, strict=True))
                at = [window.get(axis, own.get(axis)) for axis in range(len(shape))]
                return te.sum(tensor(*at).astype("int32"), axis=list(window.values()))

            return te.compute(tuple(out_shape), element, name="reduce_sum")

        total = self._reduction(reduce_sum, data.codes.expr, "reduce_sum")
        return self._window(total, data, count, np.ones((1,) * len(out_shape)))

    def window_sum(
        self,
        data: Quantized,
        windows: dict[int, tuple[int, int, int, int]],
        out_shape: Sequence[int],
    ) -> Sum:
        """Sum codes over sliding windows.

        ``windows`` maps an axis to size, stride, dilation and padding in front.
        """
        shape, zero = data.shape, data.zero_point

        def window_sum(tensor: te.Tensor) -> te.Tensor:
            reach = {
                axis: (out_shape[axis] - 1) * stride + (size - 1) * dilation + 1 - before - shape[axis]
                for axis, (size, stride, dilation, before) in windows.items()
            }
            padded = tensor
            if any(win[3] for win in windows.values()) or any(after > 0 for after in reach.values()):
                before = [windows[axis][3] if axis in windows else 0 for axis in range(len(shape))]
                after = [max(0, reach.get(axis, 0)) for axis in range(len(shape))]
                value = tirx.const(zero, tensor.dtype)
                padded = tvm.topi.nn.pad(tensor, before, after, pad_value=value, name="pad_temp")
            window = {axis: te.reduce_axis((0, win[0]), name=f"r{axis}") for axis, win in windows.items()}

            def element(*index: tirx.PrimExpr) -> tirx.PrimExpr:
                at = [
                    i * windows[axis][1] + window[axis] * windows[axis][2] if axis in windows else i
                    for axis, i in enumerate(index)
                ]
                return te.sum(padded(*at).astype("int32"), axis=list(window.values()))

            return te.compute(tuple(out_shape), element, name="window_sum")

        total = self._reduction(window_sum, data.codes.expr, "window_sum")
        count = int(np.prod([win[0] for win in windows.values()]))
        return self._window(total, data, count, np.ones((1,) * len(shape)))

    def _window(self, total: relax.Expr, data: Quantized, count: int, one: np.ndarray) -> Sum:
        bias = np.full(one.shape, -data.zero_point * count, "int64")
        largest, zero = max(abs(data.codes.lo), abs(data.codes.hi)), data.zero_point
        bound = count * (largest + abs(zero)) * one
        return Sum(total, data.scale * one, bias, bound, lo=0.0 if data.codes.lo >= zero else -np.inf)

    # ---- concatenation

    def concat(self, codes: Sequence[Codes], axis: int) -> Codes:
        """Concatenate codes of one meaning."""
        lo, hi = min(part.lo for part in codes), max(part.hi for part in codes)
        kinds = [str(part.expr.ty.dtype.dtype) for part in codes]
        kind = kinds[0] if len(set(kinds)) == 1 else "int8"  # uint8 holds 0..127, so int8 holds it too.
        exprs = [
            part.expr if own == kind else self.emit(op.astype(part.expr, kind))
            for part, own in zip(codes, kinds, strict=True)
        ]
        joined = self.emit(op.concat(exprs, axis))
        return Codes(joined, lo, hi, codes[0].offset, codes[0].dtype)

    def requantize_parts(self, value: Parts, scale: float, zero_point: int, dtype: str) -> Codes:
        """Bring every part of a concatenation to one scale and concatenate."""
        codes = []
        for part in value.parts:
            total = self.widen(part) if isinstance(part, Quantized) else part
            codes.append(self.requantize(total, scale, zero_point, dtype))
        return self.concat(codes, value.axis)


def _int32(values: np.ndarray) -> relax.Constant:
    return relax.const(values.astype("int32"))


def _float32(values: np.ndarray) -> relax.Constant:
    """Return a float32 constant; one that is the same for all channels becomes a scalar."""
    narrow = values.astype("float32")
    if np.all(narrow == narrow.flat[0]):
        return relax.const(np.float32(narrow.flat[0]))
    return relax.const(narrow)
