"""Operators that put the same numbers in other places: reshapes, transposes, slices, splits, broadcasts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.graph.batching import Axes, Join, JoinedCall, along, differ_only_along
from nnfuze_tvm.graph.channels import FIXED, Coupling, Labels, Removal
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers, rebuilt
from nnfuze_tvm.graph.integers.values import Codes, Constant, ConstantCodes, Known, Pieces, Quantized, Sum
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.onnx_form import rank_of
from nnfuze_tvm.graph.ops import _onnx_moving as onnx
from nnfuze_tvm.graph.ops.operator import Example, Operator, as_its_operand


def _reshaped(call: Call, value: np.ndarray, *_: Any) -> np.ndarray:
    return value.reshape(static_shape(call))


def _torch_reshape(_: Any, call: Call, value: Any, *_shape: Any) -> Any:
    return value.reshape(static_shape(call))


def _permuted(call: Call, value: np.ndarray) -> np.ndarray:
    return value.transpose(_order(call))


def _broadcast(call: Call, value: np.ndarray, *_: Any) -> np.ndarray:
    return np.broadcast_to(value, static_shape(call))


def _sliced(call: Call, value: np.ndarray, *_: Any) -> np.ndarray:
    cuts = slices(call, value.ndim)
    assert cuts is not None
    return value[tuple(cuts.get(axis, slice(None)) for axis in range(value.ndim))]


def _pieces(call: Call, value: np.ndarray, *_: Any) -> tuple[np.ndarray, ...]:
    axis = int(call.attrs.axis) % value.ndim
    sizes = [int(field.shape.values[axis]) for field in call.ty.fields]
    return tuple(np.split(value, np.cumsum(sizes)[:-1], axis))


def _torch_slice(torch: Any, call: Call, value: Any, *_: Any) -> Any:
    for axis, taken in (slices(call, value.ndim) or {}).items():
        places = range(*taken.indices(value.shape[axis]))
        value = value.index_select(axis, torch.tensor(list(places), dtype=torch.int64))
    return value


def _torch_pieces(torch: Any, call: Call, value: Any, *_: Any) -> Any:
    axis = int(call.attrs.axis) % value.ndim
    return torch.split(value, [int(field.shape.values[axis]) for field in call.ty.fields], axis)


def _order(call: Call) -> tuple[int, ...]:
    rank = len(static_shape(call))
    axes = call.attrs.axes
    return tuple(range(rank))[::-1] if axes is None else tuple(int(axis) % rank for axis in axes)


def couple_reshape(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels:
    """Carry labels over where axes are merged or divided; only one of several can stay removable."""
    labels = coupling.tensor(call.args[0])
    shape = static_shape(var)
    result = [np.full(size, FIXED) for size in shape]
    for sources, targets in segments([len(each) for each in labels], shape):
        if len(sources) == len(targets) == 1:
            result[targets[0]] = labels[sources[0]]
            continue
        line = _merged(coupling, [labels[axis] for axis in sources])
        for axis, each in zip(targets, _divided(coupling, line, [shape[a] for a in targets]), strict=True):
            result[axis] = each
    return result


def segments(before: Sequence[int], after: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
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


def _couple_permutation(coupling: Coupling, _: tvm.ir.Var, call: Call) -> Labels:
    labels = coupling.tensor(call.args[0])
    return [labels[axis] for axis in _order(call)]


def _couple_split(coupling: Coupling, var: tvm.ir.Var, call: Call) -> tuple:
    labels = coupling.tensor(call.args[0])
    axis = int(call.attrs.axis) % len(labels)
    sizes = [int(field.shape.values[axis]) for field in var.ty.fields]
    pieces = np.split(labels[axis], np.cumsum(sizes)[:-1])
    return tuple([*labels[:axis], piece, *labels[axis + 1 :]] for piece in pieces)


def _couple_slice(coupling: Coupling, var: tvm.ir.Var, call: Call) -> Labels | None:
    result = list(coupling.tensor(call.args[0]))
    shape = static_shape(var)
    cuts = slices(call, len(result))
    if cuts is None:
        return None
    for axis, taken in cuts.items():
        piece = result[axis][taken]
        if taken.step != 1 or len(piece) != shape[axis]:
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


def _cut_reshape(removal: Removal, var: tvm.ir.Var, _: Call, args: list[Value]) -> Value:
    return op.reshape(args[0], removal.sizes(removal.coupling.tensor(var)))


def _cut_split(removal: Removal, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    axis = int(call.attrs.axis)
    pieces = removal.coupling.labels[var]
    sizes = [int(removal.stays[piece[axis]].sum()) for piece in pieces]
    return op.split(args[0], np.cumsum(sizes)[:-1].tolist(), axis)


def _cut_slice(removal: Removal, _: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
    source = removal.coupling.tensor(call.args[0])
    cuts = slices(call, len(source))
    if cuts is None or all(removal.stays[labels].all() for labels in source):
        return Call(call.op, args, call.attrs, call.ty_args)
    new: list[tuple[int, slice]] = []
    for axis, taken in cuts.items():
        stays = removal.stays[source[axis]]
        if not stays.all():
            first, last, _step = taken.indices(len(stays))
            taken = slice(int(stays[:first].sum()), int(stays[:last].sum()), 1)
        new.append((axis, taken))
    return op.strided_slice(
        args[0],
        [axis for axis, _ in new],
        [taken.start for _, taken in new],
        [taken.stop for _, taken in new],
        [taken.step for _, taken in new],
        bool(call.attrs.assume_inbound),
    )


def move(context: Integers, call: Call, _: str) -> Known | None:
    """Move codes; constants and sums only where `_integer_reshape` and `_integer_permutation` know how."""
    value = context.value(call.args[0])
    return context.with_expr(value, lambda expr: rebuilt(call, expr)) if isinstance(value, Codes | Quantized) else None


def _integer_reshape(context: Integers, call: Call, name: str) -> Known | None:
    value, shape = context.value(call.args[0]), static_shape(call)
    if isinstance(value, Constant):
        return value.reshape(shape)
    if isinstance(value, ConstantCodes):
        return ConstantCodes(value.codes.reshape(shape), value.dtype)
    if isinstance(value, Sum):
        arrays = (value.scale, value.bias, value.bound, np.asarray(value.lo), np.asarray(value.hi))
        placed = _follow(value.shape, shape, np.broadcast_shapes(*(array.shape for array in arrays)))
        if placed is None:
            return None
        own = (array.reshape(placed if array.size > 1 else (1,) * len(shape)) for array in arrays)
        return Sum(context.emit(rebuilt(call, value.expr)), *own)
    return move(context, call, name)


def _integer_permutation(context: Integers, call: Call, name: str) -> Known | None:
    value, axes = context.value(call.args[0]), _order(call)
    if isinstance(value, Constant):
        return value.transpose(axes)
    if isinstance(value, ConstantCodes):
        return ConstantCodes(value.codes.transpose(axes), value.dtype)
    if isinstance(value, Sum):
        own = (value.scale, value.bias, value.bound, np.asarray(value.lo), np.asarray(value.hi))
        turned = (array.transpose(axes) if array.ndim else array for array in own)
        return Sum(context.emit(rebuilt(call, value.expr)), *turned)
    return move(context, call, name)


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


def _integer_split(context: Integers, call: Call, _: str) -> Known | None:
    value = context.value(call.args[0])
    if not isinstance(value, Codes | Quantized):
        return None
    source = value.codes.expr if isinstance(value, Quantized) else value.expr
    whole = context.emit(rebuilt(call, source))
    pieces = [
        context.with_expr(value, lambda _, index=index: relax.TupleGetItem(whole, index))  # type: ignore[misc]
        for index in range(len(whole.ty.fields))
    ]
    return Pieces(tuple(pieces))


def _batch_reshape(calls: Sequence[Call], axes: Axes) -> JoinedCall | None:
    """Values stay side by side where as many elements lie in front of the old axis as of the new."""
    axis = axes[0]
    if axis is None:
        return None
    before = [static_shape(call.args[0]) for call in calls]
    after = [static_shape(call) for call in calls]
    front = int(np.prod(before[0][:axis]))
    targets = [i for i in range(len(after[0])) if int(np.prod(after[0][:i])) == front]
    if not targets or not differ_only_along(after, targets[-1]):
        return None
    target = targets[-1]
    if any(int(np.prod(shape[:axis])) != front for shape in before):
        return None
    sizes = tuple(shape[target] for shape in after)
    joined = list(after[0])
    joined[target] = sum(sizes)
    operand = Join(tuple(call.args[0] for call in calls), axis)
    return JoinedCall([operand], lambda new: op.reshape(new[0], joined), target, sizes, fuses=True)


def _transposed_slice(call: Call, sources: list[Value], axes: tuple[int, ...]) -> Value | None:
    cuts = slices(call, len(axes))
    if cuts is None:
        return None
    taken = list(cuts.values())
    columns = ([cut.start for cut in taken], [cut.stop for cut in taken], [cut.step for cut in taken])
    return op.strided_slice(sources[0], [axes[axis] for axis in cuts], *columns)


def _position(call: Call, axis: int) -> int:
    return _order(call).index(axis)


def _operator(evaluate: Any, *examples: Example, **facts: Any) -> Operator:
    base: dict[str, Any] = {
        "effect": "moves",
        "evaluate": evaluate,
        "examples": examples,
        "integer": move,
        "nonnegative": as_its_operand,
        "half": True,
        "kernels": ("elementwise",),
    }
    return Operator(**{**base, **facts})


def _shape_operator(*examples: Example, **facts: Any) -> Operator:
    found = {
        "train": _torch_reshape,
        "couple": couple_reshape,
        "integer": _integer_reshape,
        "batch": _batch_reshape,
        "folds": True,
    }
    return _operator(_reshaped, *examples, **{**found, **facts})


_DATA = (2, 8, 6, 6)

OPERATORS = {
    "reshape": _shape_operator(Example((_DATA,), lambda x: op.reshape(x, (2, 48, 6))), cut=_cut_reshape),
    "flatten": _shape_operator(Example((_DATA,), op.flatten), batch=None),
    "nn.batch_flatten": _shape_operator(Example((_DATA,), op.nn.batch_flatten), folds=False),
    "squeeze": _shape_operator(Example(((2, 8, 1, 6),), lambda x: op.squeeze(x, 2))),
    "expand_dims": _shape_operator(Example((_DATA,), lambda x: op.expand_dims(x, 1))),
    "permute_dims": _operator(
        _permuted,
        Example((_DATA,), lambda x: op.permute_dims(x, [0, 2, 3, 1])),
        train=lambda _, call, value: value.permute(_order(call)),
        couple=_couple_permutation,
        integer=_integer_permutation,
        batch=along(_position),
        folds=True,
    ),
    "strided_slice": _operator(
        _sliced,
        Example((_DATA,), lambda x: op.strided_slice(x, [1, 3], [2, 5], [8, 0], [2, -1])),
        train=_torch_slice,
        couple=_couple_slice,
        cut=_cut_slice,
        transposed=_transposed_slice,
    ),
    "split": _operator(
        _pieces,
        Example((_DATA,), lambda x: op.split(x, [3], 1)),
        train=_torch_pieces,
        couple=_couple_split,
        cut=_cut_split,
        integer=_integer_split,
        nonnegative=None,
        half=False,
        kernels=("fallback",),
    ),
    "broadcast_to": _operator(
        _broadcast,
        Example(((2, 8, 1, 1),), lambda x: op.broadcast_to(x, _DATA)),
        train=lambda _, call, value, *shape: value.broadcast_to(static_shape(call)),
        half=False,
        folds=True,
    ),
}

ONNX = {
    **dict.fromkeys(("reshape", "flatten", "nn.batch_flatten", "squeeze", "expand_dims"), onnx.reshaped),
    "permute_dims": onnx.permuted,
    "strided_slice": lambda write, call, x, *_: onnx.sliced(write, call, x, slices(call, rank_of(call))),
    "split": onnx.split,
    "broadcast_to": onnx.broadcast,
}
