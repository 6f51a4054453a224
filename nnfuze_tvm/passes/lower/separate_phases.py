"""Transposed convolutions whose phases have different numbers of taps, as a convolution for each phase."""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import product
from math import prod

import numpy as np
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst, Var
from tvm.relax import op

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.deferred import Form, Rewriter

# Fewer products than this part of those of one convolution pay for kernels of their own, if not for more of them,
_PAYS = 0.75
_MOST = 4
# where there are at least so many less per result, and its channels make whole vectors on any machine.
_MIN_SAVED = 32
_VECTOR = 16
# TVM's pattern of what is fused with nothing: a transpose that reads several tensors by turns has no squares.
_OPAQUE = 8


@dataclass(frozen=True)
class _Phase:
    """Along one axis, the results at one position modulo the stride, as a convolution.

    Attributes
    ----------
    taps : tuple of int
        Per tap of the convolution, which tap of the transposed one it is; -1 where it is none.
    before, after : int
        Padding of the convolution.
    """

    taps: tuple[int, ...]
    before: int
    after: int

    @staticmethod
    def of(place: int, extent: int, kernel: int, stride: int, dilation: int, padding: int, size: int) -> _Phase | None:
        """Return the phase of results ``place + stride · q``, None where no tap meets any; see `separate_phases`."""
        # Result y meets input i by tap k where y + padding = i · stride + k · dilation; i is q and an offset.
        where = {
            (place + padding - k * dilation) // stride: k
            for k in range(kernel)
            if (place + padding - k * dilation) % stride == 0
        }
        if not where:
            return None
        count = -(-size // stride)
        # A convolution has no negative padding: where the taps leave inputs out, there are more of them.
        first, last = min(*where, 0), max(*where, extent - count)
        return _Phase(tuple(where.get(at, -1) for at in range(first, last + 1)), -first, count + last - extent)


@dataclass(frozen=True)
class _Interleaved:
    """A result in a tensor per position modulo the strides, those of the last axis side by side."""

    strides: tuple[int, ...]
    sizes: tuple[int, ...]
    builder: relax.BlockBuilder = field(compare=False)

    @property
    def axis(self) -> int:
        """Return the axis of the channels."""
        return 1

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel of the result: the tensors have the same channels."""
        return values

    def restored(self, *sources: Value) -> Value:
        """Return the result, the channels meanwhile the last axis as they will be in memory."""
        batch, channels, *positions = static_shape(sources[0])
        rank, dtype = len(positions), sources[0].ty.dtype
        stand_ins = [relax.Var("part", relax.TensorType([batch, *positions, channels], dtype)) for _ in sources]
        kernel = self.builder.call_te(
            self._interleave, stand_ins, primfunc_name_hint="interleave", primfunc_attrs={"op_pattern": _OPAQUE}
        ).args[0]
        rows = [op.permute_dims(source, [0, *range(2, rank + 2), 1]) for source in sources]
        result_type = relax.TensorType([batch, *self.sizes, channels], dtype)
        result = relax.call_tir(kernel, relax.Tuple(rows), result_type)
        return op.permute_dims(result, [0, rank + 1, *range(1, rank + 1)])

    def _interleave(self, parts: list[te.Tensor]) -> te.Tensor:
        shape = (parts[0].shape[0], *self.sizes, parts[0].shape[-1])

        def element(image: tirx.Expr, *index: tirx.Expr) -> tirx.Expr:
            *places, channel = index
            at = [tirx.indexdiv(place, stride) for place, stride in zip(places, self.strides, strict=True)]
            phase: tirx.Expr = tirx.const(0, "int64")
            for place, stride in zip(places, self.strides, strict=True):
                phase = phase * stride + tirx.indexmod(place, stride)
            value = parts[-1](image, *at, channel)
            for n in reversed(range(len(parts) - 1)):
                value = tirx.if_then_else(phase.equal(n), parts[n](image, *at, channel), value)
            return value

        return te.compute(shape, element, name="interleave")


def separate_phases(
    builder: relax.BlockBuilder, rewriter: Rewriter, call: Call, var: Var
) -> tuple[list[Call], Form] | None:
    """Return a convolution per phase in the place of a transposed one of float weights, None where that doesn't pay.

    As one convolution all phases take the taps of that with most. A kernel of 3 and a stride of 2 have phases of 1 and
    2 taps: on two axes these are 9 products where one convolution has 16.
    """
    weights, attrs = rewriter.bound.get(call.args[1], call.args[1]), call.attrs
    if not isinstance(weights, GenericConst) or int(attrs.groups) != 1:
        return None
    extents, kernel, sizes = static_shape(call.args[0])[2:], static_shape(weights)[2:], static_shape(var)[2:]
    strides, dilation = ([int(n) for n in each] for each in (attrs.strides, attrs.dilation))
    if prod(strides) > _MOST or static_shape(weights)[1] % _VECTOR:
        return None
    axes: list[list[_Phase]] = []
    for sizes_along in zip(extents, kernel, strides, dilation, attrs.padding, sizes, strict=False):
        phases = [_Phase.of(place, *map(int, sizes_along)) for place in range(sizes_along[2])]
        axes.append([phase for phase in phases if phase is not None])
        if len(axes[-1]) < len(phases):
            return None
    together = prod(d * (k - 1) // s + 1 for k, s, d in zip(kernel, strides, dilation, strict=True))
    apart = prod(sum(len(phase.taps) for phase in own) / len(own) for own in axes)
    if apart > _PAYS * together or (together - apart) * static_shape(weights)[0] < _MIN_SAVED:
        return None
    convolution = getattr(op.nn, op_name(call).removeprefix("nn.").removesuffix("_transpose"))
    data, padded = rewriter.read(call.args[0]), np.pad(array(weights), [(0, 0), (0, 0), *[(0, 1)] * len(kernel)])
    calls = []
    for chosen in product(*axes):
        values = padded
        for i, phase in enumerate(chosen):
            # Tap -1 is the zero added.
            values = np.take(values, np.array(phase.taps), axis=2 + i)
        padding = [*(phase.before for phase in chosen), *(phase.after for phase in chosen)]
        filters = constant(np.ascontiguousarray(values.swapaxes(0, 1)))
        calls.append(convolution(data, filters, padding=padding, out_dtype=attrs.out_dtype or None))
    return calls, _Interleaved(tuple(strides), tuple(sizes), builder)
