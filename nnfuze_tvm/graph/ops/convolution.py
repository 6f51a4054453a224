"""Convolutions: one, two and three dimensions, grouped and depthwise ones, any layout."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.batching import Axes, Join, JoinedCall, differ_only_along, size_in_bytes
from nnfuze_tvm.graph.channels import FIXED, CoupledLayer, Coupling, Filters, Labels, Removal
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.integers.context import Integers, weight_constant
from nnfuze_tvm.graph.integers.values import Known
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_layers as onnx
from nnfuze_tvm.graph.ops._windows import (
    accumulator,
    channels_first,
    from_channels_first,
    padded_to,
    reach_of,
    to_channels_first,
    windows,
)
from nnfuze_tvm.graph.ops.operator import Example, Layer, Operator


def evaluate(call: Call, data: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the result of a convolution; integers are summed exactly."""
    attrs = call.attrs
    weight = to_channels_first(weight, str(attrs.kernel_layout))
    kind = accumulator(data.dtype)
    data, weight = data.astype(kind), weight.astype(kind)
    products = _products(_seen(call, data, weight.shape[2:]), weight, int(attrs.groups))
    return from_channels_first(products, str(attrs.out_layout or attrs.data_layout))


def _seen(call: Call, data: np.ndarray, size: Sequence[int]) -> np.ndarray:
    """Return what the windows of a convolution see of its data, ``[N, C, *count, *size]``."""
    attrs, layout = call.attrs, str(call.attrs.data_layout)
    out_layout = str(attrs.out_layout or layout)
    count = [size for size, letter in zip(static_shape(call), out_layout, strict=True) if letter not in "NC"]
    strides, dilation, padding = ([int(e) for e in field] for field in (attrs.strides, attrs.dilation, attrs.padding))
    return windows(to_channels_first(data, layout), size, strides, dilation, padding[: len(count)], count, 0)


def rows(call: Call, data: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return what the windows at some places of a convolution's result see."""
    weight, kernel_layout = static_shape(call.args[1]), str(call.attrs.kernel_layout)
    size = [weight[axis] for axis in channels_first(kernel_layout)[2:]]
    view = np.moveaxis(_seen(call, data, size), 1, 1 + len(size))
    picked = view[np.unravel_index(places, view.shape[: 1 + len(size)])]
    return picked.reshape(len(places), int(call.attrs.groups), -1).swapaxes(0, 1)


def train(torch: Any, call: Call, data: Any, weight: Any) -> Any:
    """Return what `evaluate` does."""
    attrs, out_layout = call.attrs, str(call.attrs.out_layout or call.attrs.data_layout)
    data, weight = (
        data.permute(channels_first(str(attrs.data_layout))),
        weight.permute(channels_first(str(attrs.kernel_layout))),
    )
    strides, dilation, padding = ([int(e) for e in field] for field in (attrs.strides, attrs.dilation, attrs.padding))
    size, order = weight.shape[2:], channels_first(out_layout)
    count = [static_shape(call)[axis] for axis in order[2:]]
    before = padding[: len(size)]
    even = [
        (n + 2 * b - (k - 1) * d - 1) // s + 1
        for n, b, k, d, s in zip(data.shape[2:], before, size, dilation, strides, strict=True)
    ]
    if even != count:
        data, before = padded_to(torch, data, before, reach_of(count, size, strides, dilation)), [0] * len(size)
    function = getattr(torch.nn.functional, f"conv{len(size)}d")
    result = function(data, weight, None, strides, before, dilation, int(attrs.groups))
    return result.permute(np.argsort(order).tolist())


def _products(seen: np.ndarray, weight: np.ndarray, groups: int) -> np.ndarray:
    """Return ``[N, O, *count]`` of windows ``[N, C, *count, *kernel]`` and weights ``[O, C / groups, *kernel]``."""
    rank = weight.ndim - 2
    count = seen.shape[2 : 2 + rank]
    outputs, depth = weight.shape[0] // groups, weight.shape[1]
    if depth == 1 and groups > 1:
        result = np.zeros((seen.shape[0], groups * outputs, *count), seen.dtype)
        own = np.repeat(seen, outputs, axis=1) if outputs > 1 else seen
        for tap in np.ndindex(*weight.shape[2:]):
            factors = weight[(slice(None), 0, *tap)].reshape(-1, *[1] * rank)
            result += own[(..., *tap)] * factors
        return result
    parts = []
    for group in range(groups):
        own = seen[:, group * depth : (group + 1) * depth]
        rows = np.moveaxis(own, 1, 1 + rank).reshape(seen.shape[0] * prod(count), -1)
        columns = weight[group * outputs : (group + 1) * outputs].reshape(outputs, -1).T
        parts.append((rows @ columns).reshape(seen.shape[0], *count, outputs))
    return np.moveaxis(np.concatenate(parts, axis=-1), -1, 1)


def layer(call: Call) -> Layer | None:
    """Return where a convolution has its channels; None where a layout is packed, such as NCHW4c."""
    layouts = [str(each) for each in (call.attrs.data_layout, call.attrs.kernel_layout, call.attrs.out_layout)]
    layouts[2] = layouts[2] or layouts[0]
    if not all(layout.isalpha() and layout.isupper() for layout in layouts):
        return None
    transposed = op_name(call).endswith("_transpose")
    filters = Filters(int(call.attrs.groups), layouts[1].index("O"), layouts[1].index("I"), transposed)
    return Layer(layouts[0].index("C"), layouts[2].index("C"), filters)


def macs(call: Call) -> int:
    """Return the multiply-accumulates of a convolution."""
    weight = static_shape(call.args[1])
    return prod(static_shape(call)) * prod(weight) // weight[str(call.attrs.kernel_layout).index("O")]


def couple(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    """Label the result's channels anew; of a depthwise convolution they are those of its data."""
    data, weight = call.args
    found = layer(call)
    if isinstance(data, GenericConst) or not isinstance(weight, GenericConst) or found is None:
        return None
    labels, layout = coupling.tensor(data), str(call.attrs.data_layout)
    out_layout = str(call.attrs.out_layout or layout)
    axis, groups = found.data, found.filters.groups
    for other, each in enumerate(labels):
        if other not in (axis, layout.index("N")):
            coupling.channels.fix(each)
    result = [np.full(size, FIXED) for size in static_shape(var)]
    result[out_layout.index("N")] = labels[layout.index("N")]
    inputs, count = labels[axis], len(result[found.result])
    if groups > 1 and len(inputs) == groups and inputs.any():
        # Depthwise: an input channel and the outputs made of it go together.
        outputs = np.repeat(inputs, count // groups)
    elif groups > 1:
        # What goes from one group goes from all of them at the same place, so that they stay equal.
        rows = inputs.reshape(groups, -1)
        for row in rows[1:]:
            coupling.channels.tie(rows[0], row)
        outputs = np.tile(coupling.channels.fresh(count // groups), groups)
    else:
        outputs = coupling.channels.fresh(count)
    coupling.layers[var] = CoupledLayer(var.name, data, axis, array(weight), found.filters, inputs, outputs)
    result[found.result] = outputs
    return result


def cut(removal: Removal, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    """Write a convolution with fewer filters, over fewer channels, or with fewer groups."""
    own = removal.coupling.layers.get(var)
    if own is None:
        return Call(call.op, args, call.attrs, call.ty_args)
    groups = own.filters.groups
    inputs, outputs = (removal.stays[each].reshape(groups, -1) for each in (own.inputs, own.outputs))
    if inputs.all() and outputs.all():
        return Call(call.op, args, call.attrs, call.ty_args)
    # Either whole groups go (depthwise), or every group keeps the same places.
    rows = inputs.any(axis=1)
    filters = own.filters.unpack(own.weight)[rows][:, outputs[rows][0]][:, :, inputs[rows][0]]
    args = [args[0], constant(own.filters.pack(filters))]
    if rows.all():
        return Call(call.op, args, call.attrs, call.ty_args)
    return with_attrs(call, *args, groups=int(rows.sum()))


def with_attrs(call: Call, data: Value, weight: Value, **changes: object) -> Call:
    """Return a convolution of other operands, with some attributes changed."""
    names = ["strides", "padding", "dilation", "groups", "data_layout", "kernel_layout", "out_layout", "out_dtype"]
    if op_name(call).endswith("_transpose"):
        names.append("output_padding")
    attrs = {name: getattr(call.attrs, name) for name in names}
    attrs = {name: list(each) if name in ("strides", "padding", "dilation") else each for name, each in attrs.items()}
    attrs["out_dtype"] = attrs["out_dtype"] or None
    function = getattr(relax.op.nn, op_name(call).removeprefix("nn."))
    return function(data, weight, **{**attrs, **changes})


def integer(context: Integers, call: Call, name: str) -> Known:
    """Convolve codes with int8 weights, of any layout and number of groups; padding is the zero point."""
    attrs = call.attrs
    data, outputs = context.quantized(call.args[0]), str(attrs.kernel_layout).index("O")
    weight = context.weight(call.args[1], outputs)
    assert weight.codes is not None
    source, padding = data.codes.expr, [int(pad) for pad in attrs.padding]
    if data.zero_point and any(padding):
        spatial = [i for i, letter in enumerate(attrs.data_layout) if letter not in "NC"]
        widths = [0] * (2 * weight.codes.ndim)
        for k, axis in enumerate(spatial):
            widths[2 * axis], widths[2 * axis + 1] = padding[k], padding[k + len(spatial)]
        source = relax.op.nn.pad(source, widths, pad_value=data.zero_point)
        padding = [0] * len(padding)
    out_layout = str(attrs.out_layout or attrs.data_layout)
    convolved = with_attrs(
        call, source, weight_constant(weight.codes), padding=padding, out_layout=out_layout, out_dtype="int32"
    )
    return context.contraction(context.emit(convolved, name), data, weight, outputs, out_layout.index("C"))


def batch(calls: Sequence[Call], axes: Axes) -> JoinedCall | None:
    """One input: more output channels. Several: their channels side by side, in groups of their own."""
    attrs = calls[0].attrs
    data_layout, out_layout = str(attrs.data_layout), str(attrs.out_layout or attrs.data_layout)
    data = [call.args[0] for call in calls]
    weights = [call.args[1] for call in calls]
    if not all(isinstance(weight, GenericConst) for weight in weights):
        return None
    channels, out_axis = str(attrs.kernel_layout).index("O"), out_layout.index("C")
    shapes = [static_shape(weight) for weight in weights]
    outputs = [static_shape(call) for call in calls]
    sizes = tuple(shape[out_axis] for shape in outputs)
    groups = int(attrs.groups)
    shared = groups == 1 and all(value.same_as(data[0]) for value in data)
    axis = data_layout.index("C")
    operand: Join | Value
    if shared:
        if not differ_only_along(shapes, channels) or not differ_only_along(outputs, out_axis):
            return None
        operand, lanes_before, lanes_after = data[0], max(sizes), sum(sizes)
    else:
        if len(set(shapes)) != 1 or len(set(outputs)) != 1 or axes[0] not in (None, axis):
            return None
        if len({static_shape(value) for value in data}) != 1:
            return None
        operand = Join(tuple(data), axis)
        # Vectors run over the channels of one group, but over the groups of a depthwise convolution.
        depthwise = groups == static_shape(data[0])[axis] > 1
        lanes_before = sizes[0] if depthwise else sizes[0] // groups
        lanes_after = sum(sizes) if depthwise else lanes_before
        groups *= len(calls)

    def build(operands: list[Value]) -> Value:
        joined = relax.const(np.concatenate([array(one) for one in weights], channels))
        return with_attrs(calls[0], operands[0], joined, groups=groups, out_layout=out_layout)

    grouped_bytes = 0 if shared else sum(size_in_bytes(value) for value in data)
    return JoinedCall(
        [operand], build, out_axis, sizes, lanes_before, lanes_after, sum(map(macs, calls)), grouped_bytes
    )


def _example(rank: int, groups: int, stride: int) -> Example:
    call = getattr(relax.op.nn, f"conv{rank}d")
    shapes = ((1, 16, *[10] * rank), (16, 16 // groups, *[3] * rank))
    return Example(shapes, partial(call, strides=stride, padding=1, groups=groups), constants=1)


def _operator(rank: int, kernels: tuple[str, ...]) -> Operator:
    return Operator(
        effect="layer",
        evaluate=evaluate,
        train=train,
        examples=(_example(rank, 1, 1), _example(rank, 16, 1), _example(rank, 4, 2)),
        layer=layer,
        rows=rows,
        macs=macs,
        couple=couple,
        cut=cut,
        quantizes=True,
        integer=integer,
        half=True,
        batch=batch,
        kernels=kernels,
    )


OPERATORS = {
    "nn.conv1d": _operator(1, ("conv2d", "depthwise", "winograd")),
    "nn.conv2d": _operator(2, ("conv2d", "depthwise", "winograd")),
    "nn.conv3d": _operator(3, ("conv2d", "depthwise", "winograd")),
}

ONNX = dict.fromkeys(OPERATORS, onnx.convolution)
