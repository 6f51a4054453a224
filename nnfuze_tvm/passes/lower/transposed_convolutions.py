"""Transposed convolutions become convolutions, whose channels are then spread over space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.weights import rearranged


@module_pass(opt_level=0, name="TransposedConvolutions")
class TransposedConvolutions:
    """Compute transposed convolutions (channels first) as convolutions.

    Along an axis of stride ``s``, an output meets one tap in ``s``: which ones depends on its position modulo ``s``,
    its phase. Every phase is a convolution of its own, of stride 1, over the part of the flipped kernel that it meets;
    all of them are one convolution of ``s`` times as many output channels. Its channels are then spread over space
    (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016). What follows element by
    element, a bias, an activation, a quantization, is computed before that: so what is moved may be 8-bit.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function) and any(_is_transposed(b.value) for b in bindings(func)):
                mod.update_func(gvar, _Rewriter().rewrite(func))
        return mod


@dataclass(frozen=True)
class _Axis:
    """One spatial axis of a transposed convolution, and of the convolution in its place.

    Attributes
    ----------
    stride : int
        Phases.
    taps : tuple of tuple of int
        Per phase and tap of the convolution, which tap of the transposed one it is; -1 where it is none.
    dilation, before, after : int
        Dilation and padding of the convolution.
    crop, size : int
        The results are ``size`` positions after the first ``crop`` of what the phases make side by side.
    """

    stride: int
    taps: tuple[tuple[int, ...], ...]
    dilation: int
    before: int
    after: int
    crop: int
    size: int

    @staticmethod
    def of(extent: int, kernel: int, stride: int, dilation: int, padding: int, size: int) -> _Axis:
        """Return the axis for ``extent`` inputs and ``size`` outputs; ``padding`` is what is cut off in front."""
        # Output y + padding = phase + stride · q meets input q - m by tap k where k · dilation = phase + stride · m.
        reach = dilation * (kernel - 1) // stride
        taps: tuple[tuple[int, ...], ...]
        if stride == 1:
            taps = (tuple(reversed(range(kernel))),)
        else:
            where = {k * dilation: k for k in range(kernel)}
            taps = tuple(
                tuple(where.get(phase + stride * m, -1) for m in reversed(range(reach + 1))) for phase in range(stride)
            )
        # A convolution has no negative padding: what is computed beyond the results is cut off.
        first = min(padding // stride, reach)
        last = max((size - 1 + padding) // stride, extent - 1)
        crop = padding - first * stride
        return _Axis(stride, taps, dilation if stride == 1 else 1, reach - first, last - extent + 1, crop, size)


@dataclass(frozen=True)
class _Spread:
    """How a result stands in the channels of a convolution: ``[group][phases][channel]``."""

    groups: int
    axes: tuple[_Axis, ...]

    @property
    def phases(self) -> int:
        """Positions that share one position of the convolution."""
        return prod(axis.stride for axis in self.axes)

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel of the result as one per channel of the convolution."""
        return np.repeat(values.reshape(self.groups, 1, -1), self.phases, axis=1).reshape(-1)


class _Rewriter:
    """Rebuild a straight-line function, keeping results in channels until an operator needs them in space."""

    def __init__(self) -> None:
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}
        self.pending: dict[Value, tuple[Value, _Spread]] = {}
        self.bound: dict[Value, Value] = {}

    def rewrite(self, func: relax.Function) -> relax.Function:
        """Return ``func`` without transposed convolutions."""
        for binding in bindings(func):
            self._bind(binding.var, binding.value)
        outputs = [self._read(field) for field in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _bind(self, var: Var, value: Value) -> None:
        self.bound[var] = value
        if isinstance(value, Var) and value in self.pending:
            self.pending[var] = self.pending[value]
            return
        if _is_transposed(value):
            self._convolve(var, value)
            return
        moved = self._before_spreading(var, value)
        if moved is not None:
            call, spread = moved
            self.pending[var] = (self.emitter.emit(call, var.name), spread)
            return
        self.values[var] = self.emitter.emit(self._read(value), var.name)

    def _convolve(self, var: Var, call: Call) -> None:
        attrs = call.attrs
        shape, kernel, sizes = (static_shape(expr)[2:] for expr in (call.args[0], call.args[1], var))
        groups = int(attrs.groups)
        fields = zip(shape, kernel, attrs.strides, attrs.dilation, attrs.padding, sizes, strict=False)
        axes = tuple(_Axis.of(*(int(field) for field in each)) for each in fields)
        spread = _Spread(groups, axes)
        weights = rearranged(
            call.args[1],
            self.bound,
            lambda values, fill: _phases(values, fill, spread),
            spread.along_channels,
            (1, 0),
        )
        convolve = getattr(op.nn, op_name(call).removeprefix("nn.").removesuffix("_transpose"))
        convolution = convolve(
            self._read(call.args[0]),
            weights,
            padding=[*(axis.before for axis in axes), *(axis.after for axis in axes)],
            dilation=[axis.dilation for axis in axes],
            groups=groups,
            out_dtype=attrs.out_dtype or None,
        )
        self.pending[var] = (self.emitter.emit(convolution, var.name), spread)

    def _before_spreading(self, var: Var, value: Value) -> tuple[Call, _Spread] | None:
        """Return an operator of each element on the convolution's channels, if it can be computed there."""
        operator = ops.of(value)
        if operator is None or operator.effect != "maps" or operator.transposed is None:
            return None
        per_channel = operator.family == "quantization"
        spread = next((self.pending[leaf][1] for leaf in operands(value) if leaf in self.pending), None)
        if spread is None:
            return None
        if per_channel and int(value.attrs.axis) % len(static_shape(var)) != 1:
            return None
        args: list[Value] = []
        for arg in value.args:
            if arg in self.pending and self.pending[arg][1] == spread:
                args.append(self.pending[arg][0])
            elif isinstance(arg, GenericConst):
                # Scales and zero points of channels have no other axes.
                own = _in_channels(array(arg), spread, 0 if per_channel else 1, len(static_shape(var)))
                if own is None:
                    return None
                args.append(own)
            elif isinstance(arg, Var):
                return None
            else:
                args.append(arg)
        return Call(value.op, args, value.attrs, value.ty_args, value.span), spread

    def _read(self, expr: Value) -> Value:
        """Return ``expr`` over the rebuilt function's variables, with the results it needs in space."""
        for leaf in operands(expr):
            if leaf in self.pending and leaf not in self.values:
                self.values[leaf] = self._in_space(*self.pending[leaf])
        return substitute(expr, self.values)

    def _in_space(self, source: Value, spread: _Spread) -> Value:
        """Spread the channels, which are the last axis meanwhile, as it will be in memory."""
        batch, channels, *positions = static_shape(source)
        axes, rank, groups = spread.axes, len(positions), spread.groups
        if spread.phases == 1 and all(axis.size == n for axis, n in zip(axes, positions, strict=True)):
            return source
        result = op.permute_dims(source, [0, *range(2, rank + 2), 1])
        if spread.phases > 1:
            strides = [axis.stride for axis in axes]
            result = op.reshape(result, [batch, *positions, groups, *strides, channels // groups // spread.phases])
            order = [0, *(place for i in range(rank) for place in (1 + i, 2 + rank + i)), 1 + rank, 2 * rank + 2]
            # A single axis of one group is in order already.
            result = op.permute_dims(result, order) if order != sorted(order) and (rank > 1 or groups > 1) else result
            wide = [n * stride for n, stride in zip(positions, strides, strict=True)]
            result = op.reshape(result, [batch, *wide, channels // spread.phases])
        begins, ends = [axis.crop for axis in axes], [axis.crop + axis.size for axis in axes]
        result = self.emitter.emit(result)
        if any(begins) or list(static_shape(result)[1:-1]) != ends:
            result = op.strided_slice(result, list(range(1, rank + 1)), begins, ends)
        return self.emitter.emit(op.permute_dims(result, [0, rank + 1, *range(1, rank + 1)]))


def _is_transposed(value: Value) -> bool:
    operator = ops.of(value)
    return operator is not None and operator.family == "transposed_convolution"


def _phases(values: np.ndarray, fill: np.ndarray, spread: _Spread) -> np.ndarray:
    """Return the convolution's kernel (O, I, …) from a transposed one (I, O, …); ``fill`` where there is no tap."""
    inputs, outputs, *kernel = values.shape
    rank, groups = len(kernel), spread.groups
    padded = np.empty((inputs, outputs, *(n + 1 for n in kernel)), values.dtype)
    padded[...] = fill
    padded[tuple(slice(0, n) for n in values.shape)] = values
    for i, axis in enumerate(spread.axes):
        # Tap -1 is the one added; the axis becomes two, phase and tap.
        padded = np.take(padded, np.array(axis.taps), axis=2 + 2 * i)
    padded = padded.reshape(groups, inputs // groups, *padded.shape[1:])
    phases, taps = range(3, 3 + 2 * rank, 2), range(4, 4 + 2 * rank, 2)
    ordered = padded.transpose(0, *phases, 2, 1, *taps)
    return ordered.reshape(groups * spread.phases * outputs, inputs // groups, *ordered.shape[3 + rank :])


def _in_channels(values: np.ndarray, spread: _Spread, axis: int, rank: int) -> GenericConst | None:
    """Return a constant operand on the convolution's channels, or None where it differs along another axis.

    ``axis`` is the channels' one after broadcasting to ``rank`` dimensions, or in a constant of one dimension.
    """
    if values.size == 1:
        return relax.const(values)
    shape: Sequence[int] = values.shape
    if axis:
        shape = (1,) * (rank - values.ndim) + values.shape
        if values.size != shape[axis]:
            return None
    elif values.ndim != 1:
        return None
    wide = spread.along_channels(values)
    return relax.const(wide.reshape([-1 if i == axis else 1 for i in range(len(shape))]))
