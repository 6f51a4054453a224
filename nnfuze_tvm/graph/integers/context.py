"""What an operator's integer form is made with: what is known of its operands, and what emits sums."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, scalar
from nnfuze_tvm.graph.integers.sums import SumOps
from nnfuze_tvm.graph.integers.values import (
    INT32_MAX,
    Codes,
    Constant,
    ConstantCodes,
    Known,
    Parts,
    Quantized,
    Sum,
)

# Numbers of at most four bits.
FEW = 16
# The fewest weights of a channel that say something about what numbers they are.
_TELLING = 8


class Unsupported(Exception):
    """An operator that can't be an integer one here; the message is the reason that is reported."""


class Integers(SumOps):
    """One walk over one function: what is known of its values so far.

    Attributes
    ----------
    known : dict
        What each Var holds: a `Known` value, or an expression of the float graph.
    nonnegative : set
        Float expressions that are never negative.
    inexact : set
        Float expressions that are computed from integers, so that their last bit is nobody's.
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        super().__init__(builder)
        self.known: dict[relax.Expr, Known | relax.Expr] = {}
        self.nonnegative: set[relax.Expr] = set()
        self.inexact: set[relax.Expr] = set()

    def value(self, expr: relax.Expr) -> Known | relax.Expr:
        """Return what is known of an operand."""
        if isinstance(expr, GenericConst):
            data = array(expr)
            if data.dtype == np.float32:
                return Constant(data.astype("float64"))
            return ConstantCodes(data.astype("int64"), str(data.dtype)) if data.dtype.kind in "iu" else expr
        return self.known.get(expr, expr)

    def as_float(self, expr: relax.Expr) -> relax.Expr:
        """Return an operand as the float graph has it."""
        raise NotImplementedError

    def quantized(self, expr: relax.Expr) -> Quantized:
        """Return what is known of a layer's input, or refuse the layer."""
        data = self.value(expr)
        if not isinstance(data, Quantized):
            raise Unsupported("its input is not quantized")
        return data

    def weight(self, expr: relax.Expr, axis: int | None) -> Constant:
        """Return int8 weights, of one scale or one per index of ``axis``, or of any scales, or refuse the layer."""
        weight = self.value(expr)
        if isinstance(weight, Constant) and weight.codes is None and axis is not None:
            weight = few_codes(weight.values, axis) or weight
        if not isinstance(weight, Constant) or weight.codes is None or weight.scale is None:
            raise Unsupported("its weights are not quantized")
        if weight.codes.min(initial=0) < -128 or weight.codes.max(initial=0) > 127:
            raise Unsupported("its weights have a zero point that does not fit int8")
        if axis is not None and weight.scale.size not in (1, weight.scale.shape[axis]):
            raise Unsupported("its weights are quantized along another axis than the output channels")
        return weight

    def contraction(self, result: relax.Expr, data: Quantized, weight: Constant, axis: int, out_axis: int) -> Sum:
        """Return what int32 sums of products mean.

        Parameters
        ----------
        result : relax.Expr
            The sums.
        data, weight
            What was multiplied.
        axis, out_axis : int
            The axis of the output channels in the weights and in the result.
        """
        assert weight.codes is not None and weight.scale is not None
        codes = np.moveaxis(weight.codes, axis, 0).reshape(weight.codes.shape[axis], -1).astype("int64")
        shape = [1] * len(data.shape)
        shape[out_axis] = codes.shape[0]
        scale = np.broadcast_to(weight.scale.reshape(-1), (codes.shape[0],)) * data.scale
        bias = -data.zero_point * codes.sum(1)
        largest = max(abs(data.codes.lo), abs(data.codes.hi))
        bound = np.abs(codes).sum(1) * largest + np.abs(bias)
        if data.codes.hi - data.codes.lo < FEW:
            # One is a coarse unit of such sums: what is added to them is rounded to a finer one.
            finer = 2 ** max(0, min(16, 27 - int(bound.max(initial=1)).bit_length()))
            result = self.emit(op.multiply(result, relax.const(np.int32(finer))))
            scale, bias, bound = scale / finer, bias * finer, bound * finer
        return checked(Sum(result, scale.reshape(shape), bias.reshape(shape), bound.reshape(shape).astype("float64")))

    def with_expr(self, value: Codes | Quantized, build: Callable[[relax.Expr], relax.Expr]) -> Codes | Quantized:
        """Return codes that ``build`` moves to other places."""
        codes = value.codes if isinstance(value, Quantized) else value
        moved = Codes(self.emit(build(codes.expr)), codes.lo, codes.hi, codes.offset, codes.dtype)
        return Quantized(moved, value.scale, value.zero_point) if isinstance(value, Quantized) else moved

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

    def clamp(self, source: relax.Expr, lo: float | np.ndarray, hi: float | np.ndarray) -> Known | None:
        """Bound a value; sums keep the bounds until they are requantized."""
        value = self.value(source)
        if isinstance(value, ConstantCodes):
            return ConstantCodes(np.clip(value.codes, lo, hi).astype("int64"), value.dtype)
        if isinstance(value, Codes) and np.ndim(lo) == np.ndim(hi) == 0:
            bounds = [int(np.clip(bound - value.offset, value.lo, value.hi)) for bound in (np.ceil(lo), np.floor(hi))]
            return replace(value, expr=self.emit(op.clip(value.expr, *bounds)), lo=bounds[0], hi=bounds[1])
        if isinstance(value, Quantized):
            real = [(code - value.zero_point) * value.scale for code in (value.codes.lo, value.codes.hi)]
            if np.all(lo <= real[0]) and np.all(real[1] <= hi):
                return value
            value = self.widen(value)
        if isinstance(value, Sum):
            return value.clamp(lo, hi)
        return None


IntegerForm = Callable[[Integers, Call, str], Known | relax.Expr | None]
"""How a call becomes an integer one, given its layer's name: what is known of the result, or an expression of real
numbers, or another float call; None leaves it as it is."""


def checked(value: Sum) -> Sum:
    """Return a sum that fits int32, or refuse its operator."""
    if np.max(value.bound) > INT32_MAX:
        raise Unsupported("its sums do not fit int32")
    return value


def few_steps(values: np.ndarray, axis: int | None) -> np.ndarray | None:
    """Return a step of which all numbers are multiples, fewer than `FEW` of it apart; None if there is none.

    With an ``axis``, it has a step of its own for each index of that; the result broadcasts to the values.
    """
    others = tuple(i for i in range(values.ndim) if i != axis)
    sizes = np.abs(values)
    step = np.where(sizes > 0, sizes, np.inf).min(others, keepdims=True)
    step = np.where(np.isfinite(step), step, 1.0)
    for part in (1, 2, 3):  # the smallest number may be some steps away from zero
        ratio = values / (step / part)
        whole = np.rint(ratio)
        if np.all(np.abs(ratio - whole) <= 1e-6 * np.abs(whole)):
            return step / part if np.ptp(whole) < FEW and np.abs(whole).max(initial=0) <= 127 else None
    return None


def few_codes(values: np.ndarray, axis: int) -> Constant | None:
    """Return constant weights that are few multiples of a number per index of ``axis`` as codes, else None."""
    if values.size < _TELLING * values.shape[axis] or not np.isfinite(values).all():
        return None
    step = few_steps(values, axis)
    return None if step is None else Constant(values, np.rint(values / step).astype("int64"), step)


def scaled(value: Sum, factor: float | np.ndarray) -> Sum:
    """Return a sum whose real value is ``factor`` times as large."""
    return replace(value, scale=value.scale * factor)


def weight_constant(codes: np.ndarray) -> relax.Expr:
    """Return weights as the integer graph holds them: int8 in [-127, 127], what reaches -128 as int16.

    Signed data reach -128, too, and two such products exceed int16, where CPUs without dot products add them.
    """
    return relax.const(codes.astype("int16" if codes.min(initial=0) == -128 else "int8"))


def dtype_of(expr: relax.Expr) -> str:
    """Return the dtype of a tensor expression."""
    dtype = getattr(expr.ty, "dtype", None)
    return "" if dtype is None else str(dtype.dtype)


def along(values: Any, axis: int, rank: int) -> Any:
    """Return a scalar or per-channel parameter, an array or a tensor of PyTorch, with ``rank`` dimensions."""
    shape, count = [1] * rank, len(values.reshape(-1))
    if count > 1:
        shape[axis % rank] = count
    return values.reshape(shape)


def rebuilt(call: Call, data: relax.Expr) -> Call:
    """Return ``call`` with another first operand, whose type may differ."""
    return Call(call.op, [data, *call.args[1:]], call.attrs, call.ty_args, call.span)


def number(expr: Any) -> float:
    """Return the value of a scalar operand."""
    return float(scalar(expr))
