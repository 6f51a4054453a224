"""Emits the integer operators: exact int32 sums, and one way back to 8 bits.

Every result is the same on every instruction set. LLVM is free to contract a float multiplication and a
float addition into one rounding, so no float addition ever follows a multiplication here: whatever is
added is added as int32, and a sum becomes 8 bits again by exactly one float32 multiplication, a rounding
to the nearest even integer and a clip.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from tvm import relax, te, tirx
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import Emitter
from nnfuze_tvm.graph.integers.values import INT32_MAX, Codes, Constant, Quantized, Sum

# FuseOps merges element-wise operators into the PrimFunc in front of them when that has this op_pattern.
OUT_ELEMENTWISE_FUSABLE = 4

# Of 8-bit codes as the integer graph stores them.
LEAST, MOST = -128, 127

# Numbers below this stay in int32 after a float32 rounding and with a zero point.
_SAFE_INT32 = 2.0**30

# A residual is added in units of the accumulator; the integer ratio of the two scales must be this exact.
_RATIO_BITS = 11


def stored(dtype: str, zero_point: int) -> tuple[int, int]:
    """Return zero point and offset of 8-bit codes as the integer graph stores them: always as int8."""
    offset = 128 if dtype == "uint8" else 0
    return zero_point - offset, offset


class SumOps:
    """Emits sums and what becomes of them into one function.

    Parameters
    ----------
    builder
        Receives the PrimFuncs of the operators that Relax has no name for.
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.emitter = Emitter()
        self.builder = builder

    def emit(self, value: relax.Expr, name: str = "lv") -> relax.Expr:
        """Bind ``value`` and return its Var."""
        return self.emitter.emit(value, name)

    def _elementwise(self, function: Callable[..., te.Tensor], *args: relax.Expr, name: str) -> relax.Expr:
        call = self.builder.call_te(function, *args, primfunc_name_hint=name)
        return self.emit(call)

    def reduction(self, function: Callable[..., te.Tensor], arg: relax.Expr, name: str) -> relax.Expr:
        """Emit a reduction that takes the operators behind it into its PrimFunc, as a convolution does."""
        call = self.builder.call_te(function, arg, primfunc_name_hint=name)
        gvar = call.args[0]
        func = self.builder.get()[gvar].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE)
        self.builder.update_func(gvar, func)
        return self.emit(call)

    def quantize(
        self, data: relax.Expr, scale: float, zero_point: int, dtype: str, nonnegative: bool, inexact: bool = False
    ) -> Codes:
        """Quantize a float tensor: ``round(clip(data / scale)) + zero_point``.

        Of numbers that are ``inexact``, rounded themselves, the quotient may be, too: it is a multiplication then,
        which takes a fifth of a division's time. Others may lie just between two codes.
        """
        zero_point, offset = stored(dtype, zero_point)
        lo, hi = max(LEAST, zero_point) if nonnegative else LEAST, MOST
        # Bounded first, it fits int32, to which machines round in one instruction.
        step = relax.const(np.float32(1.0 / scale if inexact else scale))
        scaled = op.multiply(data, step) if inexact else op.divide(data, step)
        bounded = op.clip(scaled, float(lo - zero_point), float(hi - zero_point))
        codes = op.astype(op.round(bounded), "int32")
        if zero_point:
            codes = op.add(codes, relax.const(np.int32(zero_point)))
        kind = "uint8" if zero_point == 0 and lo >= 0 else "int8"
        return Codes(self.emit(op.astype(codes, kind)), lo, hi, offset, dtype)

    def _narrow(self, rounded: relax.Expr, lo: int, hi: int, zero_point: int, offset: int, dtype: str) -> Codes:
        rounded = self.emit(rounded)
        wide = str(rounded.ty.dtype.dtype)
        if zero_point:
            rounded = op.add(rounded, relax.const(np.dtype(wide).type(zero_point)))
        kind = "uint8" if zero_point == 0 and lo >= 0 else "int8"
        bounds = (lo, hi) if wide == "int32" else (float(lo), float(hi))
        narrow = self.emit(op.astype(op.clip(rounded, *bounds), kind))
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
            return Codes(data, LEAST, MOST, 0, dtype)
        shifted = op.subtract(op.astype(data, "int32"), relax.const(np.int32(128)))
        return Codes(self.emit(op.astype(shifted, "int8")), LEAST, MOST, 128, dtype)

    def total(self, value: Sum) -> relax.Expr:
        """Return the int32 tensor ``expr + bias``."""
        if value.total is None:
            value.total = value.expr
            if np.any(value.bias):
                value.total = self.emit(op.add(value.expr, int32_constant(value.bias)))
        return value.total

    def float_sum(self, value: Sum) -> relax.Expr:
        """Return the float32 values of a sum."""
        data = op.multiply(op.astype(self.total(value), "float32"), float32_constant(value.scale))
        if value.clamped:
            data = self._bounded(data, value.lo, value.hi)
        return self.emit(data)

    def _bounded(self, data: relax.Expr, lo: float | np.ndarray, hi: float | np.ndarray) -> relax.Expr:
        """Bound a tensor by numbers, or by numbers per channel."""
        if np.ndim(lo) == np.ndim(hi) == 0:
            return op.clip(data, float(lo), float(hi))
        data = self.emit(data)
        dtype = str(data.ty.dtype.dtype)
        for bound, limit in ((op.maximum, lo), (op.minimum, hi)):
            if np.any(np.isfinite(limit)):
                data = bound(data, relax.const(np.asarray(limit, dtype)))
        return data

    def requantize(self, value: Sum, scale: float, zero_point: int, dtype: str) -> Codes:
        """Return the sum in 8 bits.

        Emits ``add`` (int32 bias), ``astype`` float32, ``multiply``, ``round``, ``astype`` int32, [``add`` zero
        point,] ``clip``, ``astype``; a pending activation only moves the bounds of the clip. The ``astype`` int32
        is left out where the rounded number might not fit.
        """
        zero_point, offset = stored(dtype, zero_point)
        lowest = np.clip(np.rint(value.lo / scale) + zero_point, LEAST, MOST)
        lo = int(lowest.min())
        highest = np.clip(np.rint(value.hi / scale) + zero_point, lowest, MOST)
        hi = int(highest.max())
        multiplier = float32_constant(value.scale / scale)
        rounded = op.round(op.multiply(op.astype(self.total(value), "float32"), multiplier))
        if np.max(value.bound * np.abs(value.scale / scale)) < _SAFE_INT32:
            rounded = op.astype(rounded, "int32")
        if np.any(lowest > lo) or np.any(highest < hi):
            # What is one number is a bound of the clip.
            most = highest - zero_point if np.ndim(highest) else np.inf
            rounded = self._bounded(rounded, lowest - zero_point if np.ndim(lowest) else -np.inf, most)
        return self._narrow(rounded, lo, hi, zero_point, offset, dtype)

    def rescale(self, value: Sum, scale: float) -> Sum:
        """Return the sum as an int32 sum of another, per-tensor scale."""
        ratio = value.scale / scale
        data = op.round(op.multiply(op.astype(self.total(value), "float32"), float32_constant(ratio)))
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

        table = [] if ratio.size == 1 else [int32_constant(ratio)]
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


def int32_constant(values: np.ndarray) -> relax.Constant:
    """Return an int32 constant."""
    return relax.const(values.astype("int32"))


def float32_constant(values: np.ndarray) -> relax.Constant:
    """Return a float32 constant; one that is the same for all channels becomes a scalar."""
    narrow = values.astype("float32")
    if np.all(narrow == narrow.flat[0]):
        return relax.const(np.float32(narrow.flat[0]))
    return relax.const(narrow)
