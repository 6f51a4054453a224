"""ONNX forms of what moves, picks, repeats or orders values."""

from __future__ import annotations

from math import prod
from typing import Any

import numpy as np
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import array, scalar
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.onnx_form import Form, Unwritable, Writer, dtype_of, rank_of, require


def reshaped(write: Writer, call: Call, x: str, *_: Any) -> str:
    """Return the same numbers in another shape."""
    return write.reshaped(x, static_shape(call))


def permuted(write: Writer, call: Call, x: str) -> str:
    """Return the axes in another order, by default backwards."""
    rank, axes = rank_of(call), call.attrs.axes
    order = list(range(rank))[::-1] if axes is None else [int(axis) % rank for axis in axes]
    return write("Transpose", x, perm=order)


def broadcast(write: Writer, call: Call, x: str, *_: Any) -> str:
    """Repeat a value along axes of length one."""
    return write("Expand", x, write.integers(static_shape(call)))


def sliced_by(write: Writer, x: str, shape: tuple[int, ...], cuts: dict[int, slice]) -> str:
    """Take slices of some axes."""
    found = [(axis, *cut.indices(shape[axis])) for axis, cut in cuts.items()]
    # An end in front of the first number is no index from behind.
    ends = [stop if stop >= 0 else -shape[axis] - 1 for axis, _, stop, _ in found]
    columns = ([start for _, start, _, _ in found], ends, [axis for axis, *_ in found], [step for *_, step in found])
    return write("Slice", x, *map(write.integers, columns))


def sliced(write: Writer, call: Call, x: str, cuts: dict[int, slice] | None) -> str:
    """Take what a call takes, if that is static."""
    if cuts is None:
        raise Unwritable("takes slices that are not static")
    return sliced_by(write, x, static_shape(call.args[0]), cuts)


def split(write: Writer, call: Call, x: str, *_: Any) -> list[str]:
    """Cut a tensor into pieces."""
    axis = int(call.attrs.axis) % rank_of(call)
    sizes = [int(field.shape.values[axis]) for field in call.ty.fields]
    return write.several("Split", [x, write.integers(sizes)], len(sizes), axis=axis)


def concat(write: Writer, call: Call, parts: list[str]) -> str:
    """Put tensors one behind the other."""
    return write("Concat", *parts, axis=int(call.attrs.axis or 0))


def stack(write: Writer, call: Call, parts: list[str]) -> str:
    """Put tensors side by side along a new axis."""
    axis = int(call.attrs.axis) % len(static_shape(call))
    return write("Concat", *(write("Unsqueeze", part, write.integers([axis])) for part in parts), axis=axis)


_PADS = {"constant": "constant", "reflect": "reflect", "replicate": "edge", "circular": "wrap"}


def pad(write: Writer, call: Call, x: str, *_: Any) -> str:
    """Pad around a tensor."""
    mode, widths = str(call.attrs.pad_mode), [int(width) for width in call.attrs.pad_width]
    require(mode in _PADS, f"pads by {mode!r}")
    value = [write.like(call.args[0], float(call.attrs.pad_value))] if mode == "constant" else []
    return write("Pad", x, write.integers([*widths[::2], *widths[1::2]]), *value, mode=_PADS[mode])


def take(write: Writer, call: Call, x: str, indices: str) -> str:
    """Pick along an axis, of a vector along its only one."""
    axis = int(call.attrs.axis or 0) % rank_of(call)
    size, given, mode, kind = (
        static_shape(call.args[0])[axis],
        call.args[1],
        str(call.attrs.mode),
        dtype_of(call.args[1]),
    )
    require(mode in ("clip", "fast"), f"picks by the mode {mode!r}")
    wide = "int32" if kind == "int32" else "int64"
    indices = write.cast(indices, kind, wide)
    values = array(given) if isinstance(given, GenericConst) else None
    inside = values is not None and values.min(initial=0) >= 0 and values.max(initial=0) < size
    if mode == "clip" and not inside:
        indices = write("Clip", indices, write.constant(0, wide), write.constant(size - 1, wide))
    return write("Gather", x, indices, axis=axis)


def _indices(write: Writer, call: Call, indices: str) -> str:
    kind = dtype_of(call.args[1])
    return indices if kind in ("int32", "int64") else write.cast(indices, kind, "int64")


def gather_elements(write: Writer, call: Call, x: str, indices: str) -> str:
    """Pick element by element along one axis."""
    return write("GatherElements", x, _indices(write, call, indices), axis=int(call.attrs.axis))


def scatter_elements(write: Writer, call: Call, x: str, indices: str, updates: str) -> str:
    """Put values element by element along one axis."""
    reduction = str(call.attrs.reduction)
    facts = {"axis": int(call.attrs.axis), "reduction": "none" if reduction == "update" else reduction}
    return write("ScatterElements", x, _indices(write, call, indices), updates, **facts)


def flip(write: Writer, call: Call, x: str) -> str:
    """Reverse one axis."""
    axis = int(call.attrs.axis) % rank_of(call)
    return sliced_by(write, x, static_shape(call.args[0]), {axis: slice(None, None, -1)})


def tile(write: Writer, call: Call, x: str) -> str:
    """Repeat a tensor as a whole."""
    shape, repeats = static_shape(call.args[0]), [int(each) for each in call.attrs.repeats]
    rank = max(len(shape), len(repeats))
    if len(shape) < rank:
        x = write.reshaped(x, [*[1] * (rank - len(shape)), *shape])
    return write("Tile", x, write.integers([*[1] * (rank - len(repeats)), *repeats]))


def repeat(write: Writer, call: Call, x: str) -> str:
    """Repeat every slice along an axis."""
    axis, shape = call.attrs.axis, static_shape(call.args[0])
    if axis is None:
        x, axis, shape = write.reshaped(x, [-1]), 0, (prod(shape),)
    places = np.repeat(np.arange(shape[int(axis)]), int(call.attrs.repeats))
    return write("Gather", x, write.constant(places, "int64"), axis=int(axis))


def _in_line(write: Writer, call: Call, x: str) -> tuple[str, int, tuple[int, ...]]:
    """Return what is accumulated, in the result's type, along which axis, and its shape."""
    shape, axis = static_shape(call.args[0]), call.attrs.axis
    if axis is None:
        x, axis, shape = write.reshaped(x, [-1]), 0, (prod(shape),)
    return write.cast(x, dtype_of(call.args[0]), dtype_of(call)), int(axis) % len(shape), shape


def cumsum(write: Writer, call: Call, x: str) -> str:
    """Add up along an axis."""
    x, axis, _ = _in_line(write, call, x)
    return write("CumSum", x, write.constant(axis, "int64"), exclusive=int(bool(call.attrs.exclusive)))


def cumprod(write: Writer, call: Call, x: str) -> str:
    """Multiply up along an axis: by what is one, two, four, … places in front."""
    x, axis, shape = _in_line(write, call, x)
    one = write.constant(1, dtype_of(call))

    def moved(value: str, by: int) -> str:
        widths = [0] * (2 * len(shape))
        widths[axis] = by
        longer = write("Pad", value, write.integers(widths), one, mode="constant")
        return sliced_by(write, longer, (*shape[:axis], shape[axis] + by), {axis: slice(0, shape[axis])})

    step = 1
    while step < shape[axis]:
        x = write("Mul", x, moved(x, step))
        step *= 2
    return moved(x, 1) if call.attrs.exclusive else x


def topk(write: Writer, call: Call, x: str) -> Any:
    """Return the largest or smallest along an axis, their places, or both."""
    facts = {"axis": int(call.attrs.axis), "largest": int(bool(call.attrs.largest)), "sorted": 1}
    size = static_shape(call.args[0])[facts["axis"]]
    count = int(call.attrs.k)
    values, places = write.several("TopK", [x, write.integers([count if count > 0 else size])], 2, **facts)
    wanted = str(call.attrs.ret_type)
    if wanted == "values":
        return values
    places = write.cast(places, "int64", str(call.attrs.dtype))
    return [values, places] if wanted == "both" else places


def sort(write: Writer, call: Call, x: str) -> str:
    """Order along an axis."""
    axis = int(call.attrs.axis)
    size = write.integers([static_shape(call.args[0])[axis]])
    return write.several("TopK", [x, size], 2, axis=axis, largest=int(bool(call.attrs.descending)), sorted=1)[0]


def triangle(upper: int) -> Form:
    """Return the form of what keeps one triangle of matrices."""
    return lambda write, call, x, *_: write("Trilu", x, write.constant(scalar(call.args[1]), "int64"), upper=upper)


def filled(number: int) -> Form:
    """Return the form of a tensor full of one number."""
    return lambda write, call, *_: write(
        "Expand", write.constant(number, dtype_of(call)), write.integers(static_shape(call))
    )


def full(write: Writer, call: Call, _: Any, value: str) -> str:
    """Return a tensor full of a value."""
    value = write.cast(value, dtype_of(call.args[1]), dtype_of(call))
    return write("Expand", value, write.integers(static_shape(call)))
