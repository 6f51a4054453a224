"""Layers whose data and weights have few bits count them, where that is modelled to pay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.contraction import Contraction, narrow_products
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute, with_rewritten
from nnfuze_tvm.graph.integers.sums import OUT_ELEMENTWISE_FUSABLE
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.levels import Levels
from nnfuze_tvm.passes.lower.bit_serial.kernel import Border, Sums, Window, pack, packed
from nnfuze_tvm.passes.lower.bit_serial.planes import Planes, unit

Pays = Callable[[Contraction, int, int], bool]
"""Whether a machine computes a layer faster by counting bits, given the planes of its data and of its weights."""

# More planes than this are no longer few, on any machine.
_MOST_PLANES = 4


@module_pass(opt_level=0, name="BitSerial")
class BitSerial:
    """Compute integer convolutions and products of few-bit data and weights by counting bits, with the same sums.

    Takes ``conv2d`` (NHWC, OHWI, not grouped) and ``matmul`` of int8 or uint8 data, which are known to be few numbers
    (`Levels`), and constant int8 weights of few numbers, summed in int32.

    Parameters
    ----------
    pays : callable, optional
        Where the machine is faster so; without it, nowhere.
    """

    def __init__(self, pays: Pays | None) -> None:
        self.pays = pays

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, self._rewrite) if self.pays is not None else mod

    def _rewrite(self, func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
        levels, emitter = Levels(), Emitter()
        values: dict[Value, Value] = {}
        counting = _Counting(builder, emitter)
        changed = False
        for binding in bindings(func):
            value, name = substitute(binding.value, values), binding.var.name
            layer = _few_bits(binding.value, levels)
            levels.see(binding.var, binding.value)
            if layer is not None and self.pays and self.pays(layer.work, *layer.counts):
                value, changed = counting.layer(value, layer), True
            values[binding.var] = emitter.emit(value, name)
        if not changed:
            return func
        return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


@dataclass(frozen=True)
class _Layer:
    """A layer of few bits: its sums, its weights ``[O, KH, KW, I]``, and its work in the words of other kernels."""

    sums: Sums
    weights: np.ndarray
    work: Contraction

    @property
    def counts(self) -> tuple[int, int]:
        return len(self.sums.data.weights), len(self.sums.weights.weights)


def _few_bits(value: Value, levels: Levels) -> _Layer | None:
    """Return a layer whose numbers have few bits, else None."""
    found = _window(value)
    if found is None:
        return None
    window, weights = found
    data = levels.of(value.args[0])
    if data is None or not weights.any():
        return None
    of_data, of_weights = Planes.of(data.astype("int64")), Planes.of(weights.astype("int64"))
    if of_data.bipolar and len(of_data.weights) > 1:  # of which zero, in the padding, would be none either
        of_data = Planes.of(np.arange(data.min(), data.max() + 1))
    if not of_data.bipolar:
        of_data = Planes.of(np.append(data.astype("int64"), 1))
        above = Planes.above(data.astype("int64"))
        if above is not None and len(above.weights) < len(of_data.weights):
            of_data = above
    if max(len(of_data.weights), len(of_weights.weights)) > _MOST_PLANES:
        return None
    *pixels, outputs = static_shape(value)
    borders = _borders(window, value) if of_data.least else (Border(1), Border(1))
    sums = Sums(of_data, of_weights, window, tuple(pixels), weights.shape[-1], borders)
    rows = pixels[-2] if op_name(value) == "nn.conv2d" else 1
    products, depth = int(np.prod(weights.shape[1:])), weights.shape[-1]
    codes, factors, result = (str(each.ty.dtype) for each in (*value.args, value))
    narrow = narrow_products(weights, 0)
    work = Contraction(rows, pixels[-1], outputs, products, depth, codes, factors, result, narrow)
    return _Layer(sums, weights, work)


def _window(value: Value) -> tuple[Window, np.ndarray] | None:
    """Return what an integer layer sees, and its weights ``[O, KH, KW, I]``; None of what isn't taken."""
    if op_name(value) not in ("nn.conv2d", "matmul") or not isinstance(value.args[1], GenericConst):
        return None
    data, weights, result = (str(each.ty.dtype) for each in (*value.args, value))
    if data not in ("int8", "uint8") or weights != "int8" or result != "int32":
        return None
    matrix = array(value.args[1])
    if op_name(value) == "matmul":
        whole = matrix.ndim == 2 and len(static_shape(value.args[0])) > 1
        return (Window(), matrix.T[:, None, None]) if whole else None
    attrs = value.attrs
    layouts = (str(attrs.data_layout), str(attrs.kernel_layout), str(attrs.out_layout or "NHWC"))
    if layouts != ("NHWC", "OHWI", "NHWC") or int(attrs.groups) != 1:
        return None
    (down, right), (y_step, x_step) = (map(int, each) for each in (attrs.strides, attrs.dilation))
    top, left, bottom, last = map(int, attrs.padding)
    return Window(matrix.shape[1:3], (down, right), (y_step, x_step), (top, left, bottom, last)), matrix


def _borders(window: Window, value: Call) -> tuple[Border, Border]:
    """Return which rows and columns of a convolution see padding."""
    if op_name(value) != "nn.conv2d" or not any(window.padding):
        return Border(1), Border(1)
    inside = [_inside(window, axis, static_shape(value.args[0]), static_shape(value)) for axis in (0, 1)]
    found = []
    for seen in inside:
        whole = np.flatnonzero(seen.all(1))
        first, last = (whole[0], len(seen) - 1 - whole[-1]) if len(whole) else (len(seen), 0)
        found.append(Border(len(seen), int(first), int(last)))
    return found[0], found[1]


def _inside(window: Window, axis: int, data: tuple[int, ...], result: tuple[int, ...]) -> np.ndarray:
    """Return whether a tap sees data, ``[rows of the result, rows of the kernel]``, or of columns."""
    places = np.arange(result[1 + axis])[:, None] * window.strides[axis]
    taps = np.arange(window.kernel[axis]) * window.dilation[axis]
    at = places + taps - window.padding[axis]
    return (at >= 0) & (at < data[1 + axis])


class _Counting:
    """Writes layers that count bits; data that several of them read are packed once."""

    def __init__(self, builder: relax.BlockBuilder, emitter: Emitter) -> None:
        self.builder, self.emitter = builder, emitter
        self.packed: dict[tuple[Value, Planes, tuple[int, ...]], Value] = {}

    def layer(self, value: Call, layer: _Layer) -> Call:
        """Return the sums of a layer."""
        sums, data = layer.sums, value.args[0]
        key = (data, sums.data, sums.window.padding)
        if key not in self.packed:
            call = self.builder.call_te(pack(sums.data, sums.window), data, primfunc_name_hint="bit_planes")
            self.packed[key] = self.emitter.emit(call)
        bits = sums.weights.bits(layer.weights)
        # [planes, O, KH, KW, bytes] with the outputs last
        codes = constant(np.moveaxis(packed(bits), 1, -1))
        least = constant(_least(value, layer, bits), "int32")
        result = self.builder.call_te(sums.compute, self.packed[key], codes, least, primfunc_name_hint="bit_serial")
        kernel = result.args[0]
        self.builder.update_func(kernel, self.builder.get()[kernel].with_attr("op_pattern", OUT_ELEMENTWISE_FUSABLE))
        return result


def _least(value: Call, layer: _Layer, bits: np.ndarray) -> np.ndarray:
    """Return ``[rows, columns, outputs]``: the sums of data all of whose bits are zero, less what is counted then."""
    sums = layer.sums
    axes = []
    for axis, border in enumerate(sums.borders):
        if border.first + border.last:
            axes.append(_inside(sums.window, axis, static_shape(value.args[0]), static_shape(value))[border.classes])
        else:
            axes.append(np.ones((1, sums.window.kernel[axis]), bool))
    seen = np.einsum("yh,xw,ohwi->yxo", *axes, layer.weights.astype("int64")) * sums.data.least
    if not sums.weights.bipolar:
        return seen
    counted = bits.reshape(*bits.shape[:2], -1).sum(-1)
    pairs = np.multiply.outer(sums.data.weights, sums.weights.weights).sum(0) @ counted
    return seen - unit(sums.data, sums.weights) * pairs
