"""What each operator does to the labels of its operands (see :mod:`nnfuze_tvm.passes.compress.prune.channel_groups`).

A rule returns the labels of the result, or None where it does not understand the call; then everything that
the call touches stays whole.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.compress.prune.channel_groups import FIXED, Coupling, Filters, Labels, Layer, is_tensor

Rule = Callable[[Coupling, tvm.ir.Var, Call], Labels | tuple | None]

ELEMENTWISE = frozenset(
    (
        "abs acos acosh asin asinh atan atanh ceil clip cos cosh erf exp floor isfinite isinf isnan log "
        "logical_not negative round rsqrt sigmoid sign sin sinh sqrt square tan tanh trunc astype nn.relu "
        "nn.relu6 nn.leakyrelu nn.gelu nn.gelu_tanh nn.selu nn.silu nn.softplus add subtract multiply divide "
        "floor_divide power mod floor_mod maximum minimum log_add_exp equal greater greater_equal less "
        "less_equal not_equal logical_and logical_or logical_xor where"
    ).split()
)
CONVOLUTIONS = frozenset(f"nn.conv{rank}d{kind}" for rank in (1, 2, 3) for kind in ("", "_transpose"))
POOLS = frozenset(f"nn.{kind}_pool{rank}d" for rank in (1, 2, 3) for kind in ("max", "avg", "adaptive_avg"))
REDUCTIONS = frozenset("mean max min sum prod std variance".split())
RESHAPES = frozenset("reshape flatten nn.batch_flatten squeeze expand_dims".split())


def _elementwise(coupling: Coupling, var: tvm.ir.Var, _: Call, args: Sequence[tvm.ir.Var]) -> Labels:
    result = []
    for axis, size in enumerate(reversed(static_shape(var)), start=1):
        # Constants adapt; an operand of length one is broadcast and can't lose that one.
        own = [labels[-axis] for labels in map(coupling.tensor, args) if len(labels) >= axis]
        own = [labels for labels in own if len(labels) == size]
        for other in own[1:]:
            coupling.channels.tie(own[0], other)
        result.append(own[0] if own else np.full(size, FIXED))
    return result[::-1]


def _broadcast(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    return _elementwise(coupling, var, call, [arg for arg in call.args if is_tensor(arg)])


def _convolution(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    data, weight = call.args
    attrs = call.attrs
    layouts = [str(each) for each in (attrs.data_layout, attrs.kernel_layout, attrs.out_layout)]
    if not is_tensor(data) or not isinstance(weight, GenericConst):
        return None
    if not all(layout.isalpha() and layout.isupper() for layout in layouts):
        return None
    labels = coupling.tensor(data)
    axis, groups = layouts[0].index("C"), int(attrs.groups)
    for other, each in enumerate(labels):
        if other not in (axis, layouts[0].index("N")):
            coupling.channels.fix(each)
    result = [np.full(size, FIXED) for size in static_shape(var)]
    result[layouts[2].index("N")] = labels[layouts[0].index("N")]
    out_axis = layouts[2].index("C")
    inputs, count = labels[axis], len(result[out_axis])
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
    filters = Filters(groups, layouts[1].index("O"), layouts[1].index("I"), op_name(call).endswith("_transpose"))
    coupling.layers[var] = Layer(var.name, data, axis, array(weight), filters, inputs, outputs)
    result[out_axis] = outputs
    return result


def _matmul(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    data, weight = call.args
    if not is_tensor(data) or not isinstance(weight, GenericConst) or len(static_shape(weight)) != 2:
        return None
    labels = coupling.tensor(data)
    outputs = coupling.channels.fresh(static_shape(weight)[1])
    coupling.layers[var] = Layer(
        var.name, data, len(labels) - 1, array(weight), Filters(1, 1, 0, False), labels[-1], outputs
    )
    return [*labels[:-1], outputs]


def _pool(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    layout = str(call.attrs.layout)
    if str(getattr(call.attrs, "out_layout", None) or layout) != layout or not layout.isupper():
        return None
    labels = coupling.tensor(call.args[0])
    shape = static_shape(var)
    result = []
    for axis, name in enumerate(layout):
        if name not in "NC":
            coupling.channels.fix(labels[axis])
        result.append(labels[axis] if name in "NC" else np.full(shape[axis], FIXED))
    return result


def _reduction(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
    labels = coupling.tensor(call.args[0])
    axes = _axes(call.attrs.axis, len(labels))
    for axis in axes:
        coupling.channels.fix(labels[axis])
    if call.attrs.keepdims:
        return [np.full(1, FIXED) if axis in axes else each for axis, each in enumerate(labels)]
    return [each for axis, each in enumerate(labels) if axis not in axes]


def _fixed_axes(attribute: str) -> Rule:
    """Return the rule of an operator that computes across some axes: they stay whole, others pass."""

    def rule(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
        labels = coupling.tensor(call.args[0])
        for axis in _axes(getattr(call.attrs, attribute), len(labels)):
            coupling.channels.fix(labels[axis])
        return labels

    return rule


def _per_channel(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | tuple | None:
    """Batch norm, instance norm and PReLU: constants along one axis."""
    if not all(isinstance(arg, GenericConst) for arg in call.args[1:]):
        return None
    labels = coupling.tensor(call.args[0])
    if op_name(call) == "nn.batch_norm":
        if call.attrs.training:
            return None
        channel = labels[call.attrs.axis]
        return (labels, [channel], [channel])
    if op_name(call) == "nn.instance_norm":
        for axis in _axes(call.attrs.axes, len(labels)):
            coupling.channels.fix(labels[axis])
    return labels


def _pad(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    labels = coupling.tensor(call.args[0])
    widths = np.array([int(width) for width in call.attrs.pad_width]).reshape(-1, 2)
    result = []
    for each, size, width in zip(labels, static_shape(var), widths, strict=True):
        if width.any():
            coupling.channels.fix(each)
        result.append(np.full(size, FIXED) if width.any() else each)
    return result


def _permute(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
    labels = coupling.tensor(call.args[0])
    axes = range(len(labels))[::-1] if call.attrs.axes is None else _axes(call.attrs.axes, len(labels))
    return [labels[axis] for axis in axes]


def _concat(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels | None:
    parts = coupling.of(call.args[0])
    axis = call.attrs.axis
    if not isinstance(parts, tuple) or axis is None:
        return None
    along = int(axis) % len(parts[0])
    result = []
    for axis in range(len(parts[0])):
        if axis == along:
            result.append(np.concatenate([labels[axis] for labels in parts]))
            continue
        for labels in parts[1:]:
            coupling.channels.tie(parts[0][axis], labels[axis])
        result.append(parts[0][axis])
    return result


def _split(coupling: Coupling, var: tvm.ir.Var, call: Call) -> tuple:
    labels = coupling.tensor(call.args[0])
    along = int(call.attrs.axis) % len(labels)
    sizes = [int(field.shape.values[along]) for field in var.ty.fields]
    pieces = np.split(labels[along], np.cumsum(sizes)[:-1])
    return tuple([*labels[:along], piece, *labels[along + 1 :]] for piece in pieces)


def _slice(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    result = list(coupling.tensor(call.args[0]))
    shape = static_shape(var)
    cuts = slices(call, len(result))
    if cuts is None:
        return None
    for axis, cut in cuts.items():
        piece = result[axis][cut]
        if cut.step != 1 or len(piece) != shape[axis]:
            coupling.channels.fix(result[axis])
            piece = np.full(shape[axis], FIXED)
        result[axis] = piece
    return result


def slices(call: Call, rank: int) -> dict[int, slice] | None:
    """Return what a ``strided_slice`` takes of each axis it names, or None if that is not static."""
    columns: list[list[int]] = []
    for arg in call.args[1:]:
        if not isinstance(arg, relax.Tuple) or not all(hasattr(field, "value") for field in arg.fields):
            return None
        columns.append([int(field.value) for field in arg.fields])
    axes, begin, end = columns[:3]
    steps = columns[3] if len(columns) > 3 else [1] * len(axes)
    return {axis % rank: slice(b, e, s) for axis, b, e, s in zip(axes, begin, end, steps, strict=True)}


def _resize(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    return _pool(coupling, var, call)


def _reshape(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    labels = coupling.tensor(call.args[0])
    shape = static_shape(var)
    result = [np.full(size, FIXED) for size in shape]
    for sources, targets in _segments([len(each) for each in labels], shape):
        if len(sources) == len(targets) == 1:
            result[targets[0]] = labels[sources[0]]
            continue
        line = _merged(coupling, [labels[axis] for axis in sources])
        for axis, each in zip(targets, _divided(coupling, line, [shape[a] for a in targets]), strict=True):
            result[axis] = each
    return result


def _segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
    """Return the smallest runs of axes, other than those of length one, that hold as many elements."""
    left = [axis for axis, size in enumerate(before) if size != 1]
    right = [axis for axis, size in enumerate(after) if size != 1]
    while left and right:
        sources, targets = [left.pop(0)], [right.pop(0)]
        while (have := np.prod([before[a] for a in sources])) != (want := np.prod([after[a] for a in targets])):
            if have < want:
                sources.append(left.pop(0))
            else:
                targets.append(right.pop(0))
        yield sources, targets


def _merged(coupling: Coupling, axes: list[np.ndarray]) -> np.ndarray:
    """Return the labels of several axes made one; only one of them may be removable."""
    removable = [i for i, each in enumerate(axes) if each.any()]
    sizes = [len(each) for each in axes]
    if len(removable) != 1:
        for each in axes:
            coupling.channels.fix(each)
        return np.full(int(np.prod(sizes)), FIXED)
    at = removable[0]
    column = axes[at].reshape([-1 if i == at else 1 for i in range(len(axes))])
    return np.broadcast_to(column, sizes).ravel()


def _divided(coupling: Coupling, line: np.ndarray, sizes: list[int]) -> list[np.ndarray]:
    """Return the labels of one axis made several; only one of them can stay removable."""
    result = [np.full(size, FIXED) for size in sizes]
    if len(sizes) == 1:
        return [line]
    if not line.any():
        return result
    grid = coupling.channels.roots(line).reshape(sizes)

    def rows(axis: int) -> np.ndarray:
        return np.moveaxis(grid, axis, 0).reshape(sizes[axis], -1)

    # Where the labels already vary along one axis only, as behind a flatten, nothing need be tied. Else the
    # longest axis leaves most to choose from: the channels of [C, H, W], or those in a group of a shuffle.
    natural = [axis for axis in range(len(sizes)) if (rows(axis) == rows(axis)[:, :1]).all()]
    at = natural[0] if natural else max(range(len(sizes)), key=lambda axis: (sizes[axis], axis))
    table = rows(at)
    for column in table.T[1:]:
        coupling.channels.tie(table[:, 0], column)
    result[at] = table[:, 0]
    return result


def _axes(value: object, rank: int) -> list[int]:
    if value is None:
        return list(range(rank))
    axes = value if isinstance(value, Sequence) or hasattr(value, "__iter__") else [value]
    return [int(axis) % rank for axis in axes]


RULES: dict[str, Rule] = {
    **dict.fromkeys(ELEMENTWISE, _broadcast),
    **dict.fromkeys(CONVOLUTIONS, _convolution),
    **dict.fromkeys(POOLS, _pool),
    **dict.fromkeys(REDUCTIONS, _reduction),
    **dict.fromkeys(RESHAPES, _reshape),
    "matmul": _matmul,
    "nn.softmax": _fixed_axes("axis"),
    "nn.log_softmax": _fixed_axes("axis"),
    "nn.layer_norm": _fixed_axes("axes"),
    "nn.rms_norm": _fixed_axes("axes"),
    "nn.batch_norm": _per_channel,
    "nn.instance_norm": _per_channel,
    "nn.prelu": _per_channel,
    "nn.pad": _pad,
    "permute_dims": _permute,
    "concat": _concat,
    "split": _split,
    "strided_slice": _slice,
    "image.resize2d": _resize,
}
