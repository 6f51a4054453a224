"""One rule per operator: how it becomes an integer operator, given what is known of its operands."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.integer.integer_ops import IntegerOps
from nnfuze_tvm.passes.lower.integer.integer_sums import stored
from nnfuze_tvm.passes.lower.integer.integer_values import (
    INT32_MAX,
    Codes,
    Constant,
    ConstantCodes,
    Known,
    Parts,
    Pieces,
    Quantized,
    Sum,
)

MOVES = {
    "reshape", "permute_dims", "squeeze", "expand_dims", "flatten", "nn.batch_flatten", "strided_slice",
    "nn.max_pool1d", "nn.max_pool2d", "broadcast_to",
}  # fmt: skip


class Unsupported(Exception):
    """An operator that can't be an integer one here; the message is the reason that is reported."""


class IntegerRules:
    """The rules for one function; :attr:`rules` maps an operator's name to its rule.

    A rule returns what is known of the result, or None to leave the operator in float.
    """

    def __init__(self, builder: relax.BlockBuilder) -> None:
        self.emitter = Emitter()
        self.ops = IntegerOps(self.emitter, builder)
        self.known: dict[relax.Expr, Known | relax.Expr] = {}
        self.nonnegative: set[relax.Expr] = set()
        self.rules: dict[str, Callable[[Call, str], Known | None]] = {
            "quantize": self._quantize,
            "dequantize": self._dequantize,
            "nn.conv1d": self._conv,
            "nn.conv2d": self._conv,
            "matmul": self._matmul,
            "add": self._add,
            "multiply": self._multiply,
            "nn.relu": lambda call, _: self._clamp(call.args[0], 0.0, np.inf),
            "nn.relu6": lambda call, _: self._clamp(call.args[0], 0.0, 6.0),
            "clip": lambda call, _: self._clamp(call.args[0], number(call.args[1]), number(call.args[2])),
            "maximum": lambda call, _: self._bound(call, lower=True),
            "minimum": lambda call, _: self._bound(call, lower=False),
            "mean": self._mean,
            "nn.avg_pool1d": self._avg_pool,
            "nn.avg_pool2d": self._avg_pool,
            "nn.adaptive_avg_pool2d": self._adaptive_avg_pool,
            "concat": self._concat,
            "split": self._split,
            "nn.pad": self._pad,
            **dict.fromkeys(MOVES, self._move),
        }

    def _value(self, expr: relax.Expr) -> Known | relax.Expr:
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

    # ---- quantize and dequantize

    def _quantize(self, call: Call, name: str) -> Known | None:
        dtype = str(call.attrs.out_dtype)
        scale, zero_point = self._parameters(call)
        source = self._value(call.args[0])
        if isinstance(source, Constant):
            limits = np.iinfo(dtype)
            axis = int(call.attrs.axis)
            rounded = np.rint(source.values / _along(scale, axis, source.values.ndim))
            shifted = rounded + _along(zero_point, axis, source.values.ndim)
            return ConstantCodes(np.clip(shifted, limits.min, limits.max).astype("int64"), dtype)
        if dtype not in ("int8", "uint8") or scale.size != 1 or zero_point.size != 1:
            return None
        step, zero = float(scale.flat[0]), int(zero_point.flat[0])
        if isinstance(source, Quantized):
            if source.codes.dtype == dtype and np.isclose(source.scale, step, rtol=1e-6, atol=0):
                if source.zero_point == stored(dtype, zero)[0]:
                    return source.codes
            source = self.ops.widen(source)
        if isinstance(source, Sum):
            return self.ops.requantize(source, step, zero, dtype)
        if isinstance(source, Parts):
            return self.ops.requantize_parts(source, step, zero, dtype)
        data = self.as_float(call.args[0])
        if dtype_of(data) != "float32":
            return None
        return self.ops.quantize(data, step, zero, dtype, data in self.nonnegative)

    def _dequantize(self, call: Call, name: str) -> Known | None:
        scale, zero_point = self._parameters(call)
        source = self._value(call.args[0])
        if isinstance(source, ConstantCodes):
            rank, axis = source.codes.ndim, int(call.attrs.axis)
            wide = _along(scale, axis, rank)
            codes = source.codes - _along(zero_point, axis, rank)
            return Constant(codes * wide, codes.astype("int64"), wide)
        if not isinstance(source, Codes) or scale.size != 1 or zero_point.size != 1:
            return None
        return Quantized(source, float(scale.flat[0]), int(zero_point.flat[0]) - source.offset)

    def _parameters(self, call: Call) -> tuple[np.ndarray, np.ndarray]:
        scale, zero_point = (self._value(arg) for arg in call.args[1:])
        if not isinstance(scale, Constant) or not isinstance(zero_point, ConstantCodes):
            raise Unsupported("its scale or zero point is not a constant")
        return scale.values, zero_point.codes

    # ---- contractions

    def _conv(self, call: Call, name: str) -> Known | None:
        data, weight = self._value(call.args[0]), self._value(call.args[1])
        if not isinstance(data, Quantized):
            raise Unsupported("its input is not quantized")
        weight = self._weight(weight, call.attrs.kernel_layout.index("O"))
        return _checked(self.ops.convolution(data, weight, call.attrs, name))

    def _matmul(self, call: Call, name: str) -> Known | None:
        data, weight = self._value(call.args[0]), self._value(call.args[1])
        if not isinstance(data, Quantized):
            raise Unsupported("its input is not quantized")
        if isinstance(weight, Quantized):
            if data.zero_point or weight.zero_point:
                raise Unsupported("the product of two activations with zero points")
            return _checked(self.ops.matmul_codes(data, weight, name))
        weight = self._weight(weight, 1)
        if weight.values.ndim != 2:
            raise Unsupported("its weights are no matrix")
        return _checked(self.ops.matmul(data, weight, name))

    def _weight(self, weight: Known | relax.Expr, axis: int) -> Constant:
        if not isinstance(weight, Constant) or weight.codes is None or weight.scale is None:
            raise Unsupported("its weights are not quantized")
        if weight.codes.min(initial=0) < -128 or weight.codes.max(initial=0) > 127:
            raise Unsupported("its weights have a zero point that does not fit int8")
        if weight.scale.size not in (1, weight.scale.shape[axis]):
            raise Unsupported("its weights are quantized along another axis than the output channels")
        return weight

    # ---- element by element

    def _add(self, call: Call, name: str) -> Known | None:
        left, right = self._value(call.args[0]), self._value(call.args[1])
        if isinstance(left, Constant):
            left, right = right, left
        if isinstance(right, Constant):
            if isinstance(left, Quantized):
                left = self.ops.spread(left)
            return self.ops.add_constant(left, right) if isinstance(left, Sum) else None
        if not isinstance(left, Quantized | Sum) or not isinstance(right, Quantized | Sum):
            return None
        if left.shape != right.shape:
            return None
        if isinstance(left, Quantized) and isinstance(right, Quantized):
            return self.ops.add_codes(left, right)
        if isinstance(left, Quantized):
            left, right = right, left
        assert isinstance(left, Sum)
        if left.clamped or (isinstance(right, Sum) and right.clamped):
            return None
        if isinstance(right, Quantized):
            return self.ops.add_residual(left, right)
        return self.ops.add_sums(left, right)

    def _multiply(self, call: Call, name: str) -> Known | None:
        left, right = self._value(call.args[0]), self._value(call.args[1])
        if isinstance(left, Constant):
            left, right = right, left
        if isinstance(right, Constant):
            factor = right.values
            if isinstance(left, Quantized) and factor.size == 1 and factor.flat[0] > 0:
                return Quantized(left.codes, left.scale * float(factor.flat[0]), left.zero_point)
            if isinstance(left, Quantized):
                left = self.ops.spread(left)
            return self.ops.multiply_constant(left, right) if isinstance(left, Sum) else None
        if isinstance(left, Quantized) and isinstance(right, Quantized):
            return self.ops.multiply(left, right)
        return None

    def _clamp(self, source: relax.Expr, lo: float, hi: float) -> Known | None:
        value = self._value(source)
        if isinstance(value, Quantized):
            real = [(code - value.zero_point) * value.scale for code in (value.codes.lo, value.codes.hi)]
            if lo <= real[0] and real[1] <= hi:
                return value
            value = self.ops.widen(value)
        if isinstance(value, Sum):
            return value.clamp(lo, hi)
        return None

    def _bound(self, call: Call, lower: bool) -> Known | None:
        for source, limit in (call.args, reversed(list(call.args))):
            number = self._value(limit)
            if isinstance(number, Constant) and number.values.size == 1:
                edge = float(number.values.flat[0])
                return self._clamp(source, edge, np.inf) if lower else self._clamp(source, -np.inf, edge)
        return None

    # ---- averages

    def _mean(self, call: Call, name: str) -> Known | None:
        data = self._value(call.args[0])
        if not isinstance(data, Quantized):
            return None
        rank = len(data.shape)
        given = range(rank) if call.attrs.axis is None else call.attrs.axis
        axes = sorted(int(axis) % rank for axis in given)
        count = int(np.prod([data.shape[axis] for axis in axes]))
        return _checked(_scaled(self.ops.reduce_sum(data, axes, bool(call.attrs.keepdims)), 1.0 / count))

    def _avg_pool(self, call: Call, name: str) -> Known | None:
        data, attrs = self._value(call.args[0]), call.attrs
        if not isinstance(data, Quantized) or attrs.layout != attrs.out_layout:
            return None
        spatial = [i for i, letter in enumerate(attrs.layout) if letter not in "NC"]
        out_shape = static_shape(call)
        windows, counts = {}, np.ones((1,) * len(out_shape))
        for k, axis in enumerate(spatial):
            size, stride, dilation = (int(a[k]) for a in (attrs.pool_size, attrs.strides, attrs.dilation))
            before = int(attrs.padding[k])
            windows[axis] = (size, stride, dilation, before)
            at = np.arange(out_shape[axis])[:, None] * stride + np.arange(size)[None] * dilation - before
            inside = (at >= 0) & (at < data.shape[axis])
            own = np.maximum(inside.sum(1), 1)
            along = np.full(out_shape[axis], size) if attrs.count_include_pad else own
            counts = counts * along.reshape([-1 if i == axis else 1 for i in range(len(out_shape))])
        if np.all(counts == counts.flat[0]):
            counts = counts.flat[0] * np.ones((1,) * len(out_shape))
        return _checked(_scaled(self.ops.window_sum(data, windows, out_shape), 1.0 / counts))

    def _adaptive_avg_pool(self, call: Call, name: str) -> Known | None:
        data, attrs = self._value(call.args[0]), call.attrs
        if not isinstance(data, Quantized) or attrs.layout != attrs.out_layout:
            return None
        out_shape = static_shape(call)
        spatial = [attrs.layout.index("H"), attrs.layout.index("W")]
        sizes = {axis: data.shape[axis] // out_shape[axis] for axis in spatial}
        if any(data.shape[axis] % out_shape[axis] for axis in spatial):
            return None
        count = int(np.prod(list(sizes.values())))
        if all(out_shape[axis] == 1 for axis in spatial):
            return _checked(_scaled(self.ops.reduce_sum(data, spatial, True), 1.0 / count))
        windows = {axis: (size, size, 1, 0) for axis, size in sizes.items()}
        return _checked(_scaled(self.ops.window_sum(data, windows, out_shape), 1.0 / count))

    # ---- moving data

    def _move(self, call: Call, name: str) -> Known | None:
        value = self._value(call.args[0])
        kind = op_name(call)
        if isinstance(value, Constant | ConstantCodes):
            if kind in ("reshape", "squeeze", "expand_dims", "flatten", "nn.batch_flatten"):
                shape = static_shape(call)
                if isinstance(value, Constant):
                    return value.reshape(shape)
                return ConstantCodes(value.codes.reshape(shape), value.dtype)
            if kind == "permute_dims":
                axes = _axes(call, len(call.args[0].ty.shape))
                if isinstance(value, Constant):
                    return value.transpose(axes)
                return ConstantCodes(value.codes.transpose(axes), value.dtype)
            return None
        if isinstance(value, Codes | Quantized):
            return self._with_expr(value, lambda expr: _rebuilt(call, expr))
        if isinstance(value, Sum):
            return self._move_sum(value, call, kind)
        return None

    def _move_sum(self, value: Sum, call: Call, kind: str) -> Known | None:
        """Move an accumulator, where its bias and scale can follow."""
        arrays = (value.scale, value.bias, value.bound)
        if kind == "permute_dims":
            axes = _axes(call, len(value.shape))
            scale, bias, bound = (array.transpose(axes) for array in arrays)
        elif kind in ("reshape", "flatten", "squeeze", "expand_dims", "nn.batch_flatten"):
            shape = static_shape(call)
            placed = _follow(value.shape, shape, np.broadcast_shapes(*(array.shape for array in arrays)))
            if placed is None:
                return None
            scale, bias, bound = (array.reshape(placed if array.size > 1 else (1,) * len(shape)) for array in arrays)
        else:
            return None
        return Sum(self.emitter.emit(_rebuilt(call, value.expr)), scale, bias, bound, value.lo, value.hi)

    def _with_expr(self, value: Codes | Quantized, build: Callable[[relax.Expr], relax.Expr]) -> Codes | Quantized:
        codes = value.codes if isinstance(value, Quantized) else value
        moved = Codes(self.emitter.emit(build(codes.expr)), codes.lo, codes.hi, codes.offset, codes.dtype)
        return Quantized(moved, value.scale, value.zero_point) if isinstance(value, Quantized) else moved

    def _pad(self, call: Call, name: str) -> Known | None:
        value = self._value(call.args[0])
        if not isinstance(value, Quantized) or str(call.attrs.pad_mode) != "constant":
            return None
        if float(call.attrs.pad_value) != 0 or not value.codes.lo <= value.zero_point <= value.codes.hi:
            return None
        widths = [int(width) for width in call.attrs.pad_width]
        return self._with_expr(value, lambda expr: op.nn.pad(expr, widths, pad_value=value.zero_point))

    def _concat(self, call: Call, name: str) -> Known | None:
        if not isinstance(call.args[0], relax.Tuple):
            return None
        parts = [self._value(part) for part in call.args[0].fields]
        axis = int(call.attrs.axis) if call.attrs.axis is not None else 0
        if all(isinstance(part, Codes) for part in parts):
            codes = [part for part in parts if isinstance(part, Codes)]
            same = len({(part.offset, part.dtype) for part in codes}) == 1
            return self.ops.concat(codes, axis) if same else None
        known = tuple(part for part in parts if isinstance(part, Quantized | Sum))
        if len(known) < len(parts):
            return None
        quantized = [part for part in known if isinstance(part, Quantized)]
        meanings = {(part.scale, part.zero_point, part.codes.offset, part.codes.dtype) for part in quantized}
        if len(quantized) == len(known) and len(meanings) == 1:
            joined = self.ops.concat([part.codes for part in quantized], axis)
            return Quantized(joined, quantized[0].scale, quantized[0].zero_point)
        return Parts(known, axis)

    def _split(self, call: Call, name: str) -> Known | None:
        value = self._value(call.args[0])
        if not isinstance(value, Codes | Quantized):
            return None
        source = value.codes.expr if isinstance(value, Quantized) else value.expr
        whole = self.emitter.emit(_rebuilt(call, source))
        pieces = [
            self._with_expr(value, lambda _, index=index: relax.TupleGetItem(whole, index))  # type: ignore[misc]
            for index in range(len(whole.ty.fields))
        ]
        return Pieces(tuple(pieces))


def _checked(value: Sum) -> Sum:
    if np.max(value.bound) > INT32_MAX:
        raise Unsupported("its sums do not fit int32")
    return value


def _scaled(value: Sum, factor: float | np.ndarray) -> Sum:
    return replace(value, scale=value.scale * factor)


def dtype_of(expr: relax.Expr) -> str:
    """Return the dtype of a tensor expression."""
    dtype = getattr(expr.ty, "dtype", None)
    return "" if dtype is None else str(dtype.dtype)


def number(expr: Any) -> float:
    """Return the value of a scalar operand."""
    value = getattr(expr, "value", expr)
    return float(getattr(value, "value", value))


def _along(values: np.ndarray, axis: int, rank: int) -> np.ndarray:
    """Return a scalar or per-channel parameter with ``rank`` dimensions."""
    shape = [1] * rank
    if values.size > 1:
        shape[axis % rank] = values.size
    return values.reshape(shape)


def _axes(call: Call, rank: int) -> tuple[int, ...]:
    return tuple(int(a) for a in call.attrs.axes) if call.attrs.axes is not None else tuple(range(rank))[::-1]


def _rebuilt(call: Call, data: relax.Expr) -> Call:
    """Return ``call`` with another first operand, whose type may differ."""
    return Call(call.op, [data, *call.args[1:]], call.attrs, call.ty_args, call.span)


def _follow(shape: tuple[int, ...], new: tuple[int, ...], extent: tuple[int, ...]) -> tuple[int, ...] | None:
    """Return the shape of a per-channel array after a reshape, or None where channels get mixed."""
    if all(dim == 1 for dim in extent):
        return (1,) * len(new)
    axis = next(i for i, dim in enumerate(extent) if dim > 1)
    if sum(dim > 1 for dim in extent) > 1:
        return None
    before = int(np.prod(shape[:axis], dtype=int))
    for place, dim in enumerate(new):
        if dim == shape[axis] and int(np.prod(new[:place], dtype=int)) == before:
            return tuple(dim if i == place else 1 for i in range(len(new)))
    return None
