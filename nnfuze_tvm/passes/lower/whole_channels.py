"""Layers get output channels of zero weights where kernels are faster with them; no kernel stores their results."""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import numpy as np
import tvm
from tvm import relax, te, tirx
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.contraction import Contraction, narrow_products
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, with_rewritten, with_values
from nnfuze_tvm.graph.ir import static_shape

# The attribute of a PrimFunc that returns the first channels of a layer, and nothing else.
FIRST_CHANNELS = "nnfuze.first_channels"
# TVM's pattern of operators that work element by element: they are fused into what is in front of them.
_ELEMENTWISE = 0


Channels = Callable[[Contraction], int]
"""How many output channels a machine should compute of a layer: no fewer than it has."""

_LAYERS = frozenset({"matmul", "nn.conv1d", "nn.conv2d", "nn.conv3d"})


@module_pass(opt_level=0, name="WholeChannels")
class WholeChannels:
    """Give convolutions and products with constant weights more output channels, as many as the machine asks for.

    Takes convolutions with the channels last that are not grouped, and products with a matrix. Behind each stands a
    PrimFunc that returns the layer's own channels; it is fused with the layer, and with what follows.

    Parameters
    ----------
    channels : callable
        How many channels the machine should compute.
    """

    def __init__(self, channels: Channels) -> None:
        self.channels = channels

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, self._rewrite)

    def _rewrite(self, func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
        def wider(value: Value, name: str, emitter: Emitter) -> Value | None:
            work, axis = contraction_of(value)
            count = self.channels(work) if work is not None else 0
            if work is None or count <= work.channels:
                return None
            data, weights = value.args
            wide = constant(with_channels(array(weights), axis, count))
            call = Call(value.op, [data, wide], value.attrs, value.ty_args, value.span)
            return emitter.emit(first_channels(builder, emitter.emit(call, name), work.channels))

        return with_values(func, wider)


def with_channels(weights: np.ndarray, axis: int, count: int) -> np.ndarray:
    """Return weights with ``count`` output channels, the last ones zero."""
    widths = [(0, count - size if place == axis else 0) for place, size in enumerate(weights.shape)]
    return np.pad(weights, widths)


def first_channels(builder: relax.BlockBuilder, layer: Value, channels: int) -> Call:
    """Return a call that takes the first channels of a layer's result, its last axis, for kernels to be fused over."""

    def crop(data: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Var) -> tirx.Expr:
            return data(*index)

        return te.compute((*static_shape(layer)[:-1], channels), element, name="first_channels")

    call = builder.call_te(crop, layer, primfunc_name_hint="first_channels")
    gvar = call.args[0]
    func = builder.get()[gvar].with_attrs({"op_pattern": _ELEMENTWISE, FIRST_CHANNELS: True})
    builder.update_func(gvar, func)
    return call


def contraction_of(value: Value) -> tuple[Contraction | None, int]:
    """Return what a layer computes, and its weights' axis of output channels; None for what is no such layer."""
    name = op_name(value)
    if name not in _LAYERS or not isinstance(value.args[1], GenericConst):
        return None, 0
    shape, weights = static_shape(value), static_shape(value.args[1])
    data, factors, sums = (str(e.ty.dtype) for e in (*value.args[:2], value))
    if name == "matmul" and len(weights) == 2 and len(shape) > 1:
        narrow = narrow_products(array(value.args[1]), 1)
        return Contraction(1, prod(shape[:-1]), weights[1], weights[0], weights[0], data, factors, sums, narrow), 1
    if name == "matmul":
        return None, 0
    attrs, axes = value.attrs, "DHW"[-len(shape) + 2 :]
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or attrs.data_layout))
    if layouts != (f"N{axes}C", f"O{axes}I", f"N{axes}C") or int(attrs.groups) != 1:
        return None, 0
    rows = shape[-3] if len(axes) > 1 else 1
    narrow = narrow_products(array(value.args[1]), 0)
    return Contraction(rows, shape[-2], weights[0], prod(weights[1:]), weights[-1], data, factors, sums, narrow), 0
