"""Transposed convolutions become convolutions, whose channels are then spread over space."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, with_rewritten
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.deferred import Form, Rewriter
from nnfuze_tvm.passes.lower.separate_phases import separate_phases
from nnfuze_tvm.passes.lower.weights import is_constant, rearranged


@module_pass(opt_level=0, name="TransposedConvolutions")
class TransposedConvolutions:
    """Compute transposed convolutions (channels first) as convolutions.

    Along an axis of stride ``s``, an output meets one tap in ``s``: which ones depends on its position modulo ``s``,
    its phase. Every phase is a convolution of its own, of stride 1, over the part of the flipped kernel that it meets;
    all of them are one convolution of ``s`` times as many output channels. Its channels are then spread over space
    (Shi et al., "Is the deconvolution layer the same as a convolutional layer?", 2016). What follows element by
    element, a bias, an activation, a quantization, is computed before that: so what is moved may be 8-bit.

    Phases that have different numbers of taps may be faster apart, see `separate_phases`. What has weights that are no
    constants stays as it is: their values can't be rearranged now.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, _rewrite)


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    if not any(_is_transposed(b.value) for b in bindings(func)):
        return func
    return Rewriter(partial(_convolution, builder)).rewrite(func)


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
        taps: tuple[tuple[int, ...], ...] = (tuple(reversed(range(kernel))),)
        if stride > 1:
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
    def axis(self) -> int:
        """Return the axis of the channels."""
        return 1

    @property
    def phases(self) -> int:
        """Positions that share one position of the convolution."""
        return prod(axis.stride for axis in self.axes)

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel of the result as one per channel of the convolution."""
        return np.repeat(values.reshape(self.groups, 1, -1), self.phases, axis=1).reshape(-1)

    def restored(self, *sources: Value) -> Value:
        """Return the result: the channels, the last axis meanwhile as it will be in memory, are spread over space."""
        (source,) = sources
        batch, channels, *positions = static_shape(source)
        axes, rank, groups = self.axes, len(positions), self.groups
        if self.phases == 1 and all(axis.size == n for axis, n in zip(axes, positions, strict=True)):
            return source
        wide = [n * axis.stride for n, axis in zip(positions, axes, strict=True)]
        result = op.permute_dims(source, [0, *range(2, rank + 2), 1])
        if self.phases > 1:
            strides = [axis.stride for axis in axes]
            result = op.reshape(result, [batch, *positions, groups, *strides, channels // groups // self.phases])
            order = [0, *(place for i in range(rank) for place in (1 + i, 2 + rank + i)), 1 + rank, 2 * rank + 2]
            # A single axis of one group is in order already.
            result = op.permute_dims(result, order) if order != sorted(order) and (rank > 1 or groups > 1) else result
            result = op.reshape(result, [batch, *wide, channels // self.phases])
        begins, ends = [axis.crop for axis in axes], [axis.crop + axis.size for axis in axes]
        if any(begins) or wide != ends:
            result = op.strided_slice(result, list(range(1, rank + 1)), begins, ends)
        return op.permute_dims(result, [0, rank + 1, *range(1, rank + 1)])


def _is_transposed(value: Value) -> bool:
    operator = ops.of(value)
    return operator is not None and operator.family == "transposed_convolution"


def _convolution(
    builder: relax.BlockBuilder, rewriter: Rewriter, call: Call, var: Var
) -> tuple[list[Call], Form] | None:
    """Return the convolution in the place of a transposed one, and how the result stands in its channels."""
    if not _is_transposed(call) or not is_constant(call.args[1], rewriter.bound):
        return None
    apart = separate_phases(builder, rewriter, call, var)
    if apart is not None:
        return apart
    attrs = call.attrs
    extents, kernel = (static_shape(expr)[2:] for expr in call.args)
    sizes = zip(extents, kernel, attrs.strides, attrs.dilation, attrs.padding, static_shape(var)[2:], strict=False)
    axes = tuple(_Axis.of(*(int(size) for size in own)) for own in sizes)
    spread = _Spread(int(attrs.groups), axes)
    weights = rearranged(
        call.args[1],
        rewriter.bound,
        lambda values, fill: _phases(values, fill, spread),
        # The groups share the scales of a kernel's output channels.
        lambda values: spread.along_channels(np.tile(values, spread.groups)),
        channel_axes=(1, 0),
    )
    convolution = getattr(op.nn, op_name(call).removeprefix("nn.").removesuffix("_transpose"))(
        rewriter.read(call.args[0]),
        weights,
        padding=[*(axis.before for axis in axes), *(axis.after for axis in axes)],
        dilation=[axis.dilation for axis in axes],
        groups=spread.groups,
        out_dtype=attrs.out_dtype or None,
    )
    return [convolution], spread


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
