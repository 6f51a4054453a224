"""How one operator of several branches becomes one operator over their values side by side.

The values of the branches are *joined*: concatenated along one axis, the channels as a rule. A rule takes the
calls of the branches and says which operands have to be joined along which axis, what the joined call is, and
along which axis its result is joined. It returns ``None`` where there is no such call. No rule changes a
result: every element of it is computed from the same numbers in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.ir import static_shape


@dataclass(frozen=True)
class Join:
    """An operand made of one value per branch, side by side along ``axis``."""

    values: tuple[Value, ...]
    axis: int


@dataclass(frozen=True)
class Plan:
    """A joined call.

    Attributes
    ----------
    operands
        What ``build`` wants: joined values, or expressions that are used as they are.
    build
        Makes the call from the operands.
    axis, sizes
        The branches' results lie side by side along ``axis``, ``sizes[i]`` elements of branch ``i``.
    lanes_before, lanes_after
        For a layer: channels that one kernel's vectors can run over, of one branch and joined. Else 0.
    macs
        Multiply-accumulates of all branches together.
    grouped_bytes
        Size of the joined input of a grouped kernel, of which every group reads a part of each row. Else 0.
    fuses
        Whether the operator costs no kernel of its own, because it ends up in that of its producer.
    """

    operands: list[Join | Value]
    build: Callable[[list[Value]], Value]
    axis: int
    sizes: tuple[int, ...]
    lanes_before: int = 0
    lanes_after: int = 0
    macs: int = 0
    grouped_bytes: int = 0
    fuses: bool = False


Axes = Sequence[int | None]
Rule = Callable[[Sequence[Call], Axes], Plan | None]


def plan(calls: Sequence[Call], axes: Axes) -> Plan | None:
    """Return how to compute ``calls`` at once.

    Parameters
    ----------
    calls
        One call per branch, of one operator, with equal attributes.
    axes
        For each argument along which axis it is joined already, ``None`` where it is not.
    """
    rule = RULES.get(op_name(calls[0]))
    return rule(calls, axes) if rule is not None else None


def size_in_bytes(value: Value) -> int:
    """Return the bytes of a tensor."""
    return int(np.prod(static_shape(value))) * np.dtype(str(value.ty.dtype)).itemsize


def _shapes(calls: Sequence[Call]) -> list[tuple[int, ...]]:
    return [static_shape(call) for call in calls]


def _differ_only_along(shapes: Sequence[tuple[int, ...]], axis: int) -> bool:
    return len({shape[:axis] + shape[axis + 1 :] for shape in shapes}) == 1


def _array(constant: GenericConst) -> np.ndarray:
    return constant.value.numpy()


def _rebuilt(call: Call) -> Callable[[list[Value]], Value]:
    """Make the same call with other tensors; arguments that are no tensors stay."""

    def build(operands: list[Value]) -> Value:
        rest = list(call.args)[len(operands) :]
        return Call(call.op, [*operands, *rest], call.attrs, call.ty_args)

    return build


def _elementwise(calls: Sequence[Call], axes: Axes) -> Plan | None:
    """Operators on broadcast tensors: constants are joined as well, where they differ."""
    shapes = _shapes(calls)
    rank = len(shapes[0])
    tensors = [i for i, arg in enumerate(calls[0].args) if isinstance(arg.ty, relax.TensorType)]
    known = {
        axis + rank - len(static_shape(calls[0].args[i]))
        for i, axis in enumerate(axes)
        if axis is not None and i in tensors
    }
    if len(known) != 1:
        return None
    (axis,) = known
    if axis < 0 or any(len(shape) != rank for shape in shapes) or not _differ_only_along(shapes, axis):
        return None
    sizes = tuple(shape[axis] for shape in shapes)
    operands: list[Join | Value] = []
    for i in tensors:
        joined = _joined_operand([call.args[i] for call in calls], axis, sizes, rank, axes[i] is not None)
        if joined is None:
            return None
        operands.append(joined)
    return Plan(operands, _rebuilt(calls[0]), axis, sizes, fuses=True)


def _joined_operand(
    values: Sequence[Value], axis: int, sizes: tuple[int, ...], rank: int, is_joined: bool
) -> Join | Value | None:
    """Join one operand of an elementwise operator whose results are joined along ``axis``."""
    shapes = [static_shape(value) for value in values]
    own_axis = axis - (rank - len(shapes[0]))
    broadcast = own_axis < 0 or all(shape[own_axis] == 1 for shape in shapes)
    if all(isinstance(value, GenericConst) for value in values):
        arrays = [_array(value) for value in values]
        if broadcast and all(a.shape == arrays[0].shape and a.tobytes() == arrays[0].tobytes() for a in arrays):
            return values[0]
        parts = []
        for array, size in zip(arrays, sizes, strict=True):
            full = array.reshape((1,) * (rank - array.ndim) + array.shape)
            parts.append(np.repeat(full, size, axis) if full.shape[axis] == 1 else full)
        if not _differ_only_along([part.shape for part in parts], axis):
            return None
        return relax.const(np.concatenate(parts, axis))
    if any(isinstance(value, GenericConst) for value in values) or len({len(s) for s in shapes}) != 1:
        return None
    if broadcast and not is_joined and all(value.same_as(values[0]) for value in values):
        return values[0]
    if own_axis < 0 or not _differ_only_along(shapes, own_axis):
        return None
    if any(shape[own_axis] != size for shape, size in zip(shapes, sizes, strict=True)):
        return None
    return Join(tuple(values), own_axis)


def _along(position: Callable[[Call, int], int | None], fuses: bool = False) -> Rule:
    """Operators of one tensor that leave every slice along the joined axis alone.

    ``position`` returns where that axis is in the result, or ``None`` where the operator mixes its slices.
    """

    def rule(calls: Sequence[Call], axes: Axes) -> Plan | None:
        axis = axes[0]
        if axis is None:
            return None
        target = position(calls[0], axis)
        shapes = _shapes(calls)
        if target is None or not _differ_only_along(shapes, target):
            return None
        sizes = tuple(shape[target] for shape in shapes)
        if sizes != tuple(static_shape(call.args[0])[axis] for call in calls):
            return None
        operand = Join(tuple(call.args[0] for call in calls), axis)
        return Plan([operand], _rebuilt(calls[0]), target, sizes, fuses=fuses)

    return rule


def _pool(call: Call, axis: int) -> int | None:
    same = call.attrs.layout == call.attrs.out_layout
    return axis if same and axis == str(call.attrs.layout).index("C") else None


def _reduction(call: Call, axis: int) -> int | None:
    rank = len(static_shape(call.args[0]))
    if call.attrs.axis is None:
        return None
    reduced = {int(one) % rank for one in call.attrs.axis}
    if axis in reduced:
        return None
    return axis if call.attrs.keepdims else axis - sum(one < axis for one in reduced)


def _permutation(call: Call, axis: int) -> int:
    rank = len(static_shape(call))
    order = [int(one) % rank for one in call.attrs.axes or reversed(range(rank))]
    return order.index(axis)


def _softmax(call: Call, axis: int) -> int | None:
    return axis if int(call.attrs.axis) % len(static_shape(call)) != axis else None


def _padding(call: Call, axis: int) -> int | None:
    width = [int(one) for one in call.attrs.pad_width]
    return axis if width[2 * axis] == width[2 * axis + 1] == 0 else None


def _reshape(calls: Sequence[Call], axes: Axes) -> Plan | None:
    """Reshapes keep values side by side where as many elements lie in front of the old axis as of the new."""
    axis = axes[0]
    if axis is None:
        return None
    before = [static_shape(call.args[0]) for call in calls]
    after = _shapes(calls)
    front = int(np.prod(before[0][:axis]))
    targets = [i for i in range(len(after[0])) if int(np.prod(after[0][:i])) == front]
    if not targets or not _differ_only_along(after, targets[-1]):
        return None
    target = targets[-1]
    if any(int(np.prod(shape[:axis])) != front for shape in before):
        return None
    sizes = tuple(shape[target] for shape in after)
    joined = list(after[0])
    joined[target] = sum(sizes)
    operand = Join(tuple(call.args[0] for call in calls), axis)
    return Plan([operand], lambda new: relax.op.reshape(new[0], joined), target, sizes, fuses=True)


def _convolution(calls: Sequence[Call], axes: Axes) -> Plan | None:
    """One input: more output channels. Several: their channels side by side, in groups of their own."""
    attrs = calls[0].attrs
    kernel_layout, data_layout = str(attrs.kernel_layout), str(attrs.data_layout)
    out_layout = str(attrs.out_layout or data_layout)
    data = [call.args[0] for call in calls]
    weights = [call.args[1] for call in calls]
    if not all(isinstance(weight, GenericConst) for weight in weights):
        return None
    channels, out_axis = kernel_layout.index("O"), out_layout.index("C")
    shapes = [static_shape(weight) for weight in weights]
    outputs = _shapes(calls)
    sizes = tuple(shape[out_axis] for shape in outputs)
    groups = int(attrs.groups)
    shared = groups == 1 and all(value.same_as(data[0]) for value in data)
    axis = data_layout.index("C")
    operand: Join | Value
    if shared:
        if not _differ_only_along(shapes, channels) or not _differ_only_along(outputs, out_axis):
            return None
        operand, lanes_before, lanes_after = data[0], max(sizes), sum(sizes)
    else:
        if len(set(shapes)) != 1 or len(set(outputs)) != 1 or axes[0] not in (None, axis):
            return None
        if len({static_shape(value) for value in data}) != 1:
            return None
        operand = Join(tuple(data), axis)
        groups *= len(calls)
        lanes_before = sizes[0] // int(attrs.groups)
        # Vectors run over the channels of one group, but over the groups of a depthwise convolution.
        depthwise = int(attrs.groups) == static_shape(data[0])[axis] > 1
        lanes_before = sizes[0] if depthwise else lanes_before
        lanes_after = sum(sizes) if depthwise else lanes_before
    convolve = getattr(relax.op.nn, op_name(calls[0]).removeprefix("nn."))

    def build(operands: list[Value]) -> Value:
        return convolve(
            operands[0],
            relax.const(np.concatenate([_array(one) for one in weights], channels)),
            strides=list(attrs.strides),
            padding=list(attrs.padding),
            dilation=list(attrs.dilation),
            groups=groups,
            data_layout=data_layout,
            kernel_layout=kernel_layout,
            out_layout=out_layout,
            out_dtype=attrs.out_dtype or None,
        )

    macs = sum(
        int(np.prod(shape)) * int(np.prod(output)) // output[out_axis]
        for shape, output in zip(shapes, outputs, strict=True)
    )
    grouped_bytes = 0 if shared else sum(size_in_bytes(value) for value in data)
    return Plan([operand], build, out_axis, sizes, lanes_before, lanes_after, macs, grouped_bytes)


def _dense(calls: Sequence[Call], axes: Axes) -> Plan | None:
    """One input: more columns. Several: one batched product."""
    data = [call.args[0] for call in calls]
    weights = [call.args[1] for call in calls]
    if not all(isinstance(weight, GenericConst) and len(static_shape(weight)) == 2 for weight in weights):
        return None
    shapes, outputs = [static_shape(weight) for weight in weights], _shapes(calls)
    source = static_shape(data[0])
    axis = len(source) - 1
    sizes = tuple(shape[1] for shape in shapes)
    dtype = calls[0].attrs.out_dtype or None
    macs = sum(int(np.prod(output)) * shape[0] for output, shape in zip(outputs, shapes, strict=True))
    if axis < 1:
        return None
    if all(value.same_as(data[0]) for value in data):

        def wider(new: list[Value]) -> Value:
            weight = relax.const(np.concatenate([_array(one) for one in weights], 1))
            return relax.op.matmul(new[0], weight, out_dtype=dtype)

        return Plan([data[0]], wider, axis, sizes, max(sizes), sum(sizes), macs)
    if len(set(shapes)) != 1 or axes[0] not in (None, axis):
        return None
    if len({static_shape(value) for value in data}) != 1:
        return None
    count, rows, (depth, width) = len(calls), int(np.prod(source[:-1])), shapes[0]

    def build(new: list[Value]) -> Value:
        stacked = relax.const(np.stack([_array(one) for one in weights]))
        if rows == 1:
            product = relax.op.matmul(relax.op.reshape(new[0], [count, 1, depth]), stacked, out_dtype=dtype)
        else:
            apart = relax.op.permute_dims(relax.op.reshape(new[0], [rows, count, depth]), [1, 0, 2])
            product = relax.op.permute_dims(relax.op.matmul(apart, stacked, out_dtype=dtype), [1, 0, 2])
        return relax.op.reshape(product, [*source[:-1], count * width])

    return Plan([Join(tuple(data), axis)], build, axis, sizes, width, width, macs)


LAYERS = frozenset({"nn.conv1d", "nn.conv2d", "matmul"})
"""Operators with weights: what a batch starts from."""

_ELEMENTWISE = (
    "add subtract multiply divide maximum minimum power negative abs square sqrt rsqrt exp log tanh sigmoid "
    "erf round floor ceil sign clip astype left_shift right_shift bitwise_and "
    "nn.relu nn.relu6 nn.gelu nn.silu nn.leakyrelu"
).split()

RULES: dict[str, Rule] = {
    **dict.fromkeys(_ELEMENTWISE, _elementwise),
    **dict.fromkeys(("nn.max_pool2d", "nn.avg_pool2d", "nn.adaptive_avg_pool2d"), _along(_pool)),
    **dict.fromkeys(("nn.max_pool1d", "nn.avg_pool1d"), _along(_pool)),
    **dict.fromkeys(("mean", "sum", "max", "min"), _along(_reduction)),
    **dict.fromkeys(("reshape", "squeeze", "expand_dims", "nn.batch_flatten"), _reshape),
    "permute_dims": _along(_permutation),
    "nn.softmax": _along(_softmax),
    "nn.pad": _along(_padding, fuses=True),
    "nn.conv1d": _convolution,
    "nn.conv2d": _convolution,
    "matmul": _dense,
}
