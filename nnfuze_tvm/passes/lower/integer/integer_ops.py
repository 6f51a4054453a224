"""Emits the operators that make int32 sums out of 8-bit tensors: contractions, averages; and concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.relax import op

from nnfuze_tvm.passes.lower.integer.integer_sums import SumOps
from nnfuze_tvm.passes.lower.integer.integer_values import Codes, Constant, Parts, Quantized, Sum


class IntegerOps(SumOps):
    """Emits integer operators into one function."""

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
                _weights(weight.codes),
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
        return self._contraction(result, data, weight, attrs.kernel_layout.index("O"), out_layout.index("C"), rank)

    def matmul(self, data: Quantized, weight: Constant, name: str) -> Sum:
        """Multiply codes by an int8 matrix ``[K, N]``."""
        assert weight.codes is not None
        result = self.emit(op.matmul(data.codes.expr, _weights(weight.codes), out_dtype="int32"), name)
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


def _weights(codes: np.ndarray) -> relax.Expr:
    """Return weights as the integer graph holds them: int8 in [-127, 127], what reaches -128 as int16.

    Signed data reach -128, too, and two such products exceed int16, where CPUs without dot products add them.
    """
    return relax.const(codes.astype("int16" if codes.min(initial=0) == -128 else "int8"))
