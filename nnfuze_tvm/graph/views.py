"""One input that networks take in different forms: under other names, channels first or last, scaled."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Emitter, Value

Place = tuple[str, str]
"""A task, and one of its inputs."""

_NUMBER = r"[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?"
_NUMBERS = rf"(?:{_NUMBER}|\[{_NUMBER}(?:,{_NUMBER})*\])"
_SCALED = re.compile(rf"(?P<place>.+?)(?:\*(?P<factor>{_NUMBERS}))?(?:(?P<sign>[-+])(?P<offset>{_NUMBERS}))?")
# What is longer can't be meant, and would take long to take apart.
_LONGEST = 4000
_OUTSIDE_OF_BRACKETS = re.compile(r",(?![^\[]*\])")


@dataclass(frozen=True)
class View:
    """An input of the merged network in the form in which a task takes it: ``input · factor + offset``.

    Attributes
    ----------
    name : str
        The input.
    axes : tuple of int
        Where each dimension of the task's is in it; dimensions of 1 may follow from the shape alone.
    shape, dtype : tuple of int, str
        What the task takes.
    factor, offset : tuple of float
        One number for all elements or one per channel; none where nothing is to be done.
    channels : int
        The task's axis of channels.
    """

    name: str
    axes: tuple[int, ...]
    shape: tuple[int, ...]
    dtype: str
    factor: tuple[float, ...] = ()
    offset: tuple[float, ...] = ()
    channels: int = 1

    def of(self, values: np.ndarray) -> np.ndarray:
        """Return what the task takes of the input's values."""
        found = values.transpose(self.axes).reshape(self.shape).astype(self.dtype)
        if self.factor:
            found = found * self._numbers(self.factor)
        return found + self._numbers(self.offset) if self.offset else found

    def emit(self, emitter: Emitter, value: Value) -> Value:
        """Emit what the task takes of the input."""
        if self.axes != tuple(range(len(self.axes))):
            value = emitter.emit(relax.op.permute_dims(value, list(self.axes)))
        if shape_of(value.ty) != self.shape:
            value = emitter.emit(relax.op.reshape(value, self.shape))
        if str(value.ty.dtype) != self.dtype:
            value = emitter.emit(relax.op.astype(value, self.dtype))
        if self.factor:
            value = emitter.emit(relax.op.multiply(value, constant(self._numbers(self.factor), self.dtype)))
        if self.offset:
            value = emitter.emit(relax.op.add(value, constant(self._numbers(self.offset), self.dtype)))
        return value

    def _numbers(self, numbers: tuple[float, ...]) -> np.ndarray:
        rest = len(self.shape) - self.channels - 1
        return np.array(numbers, self.dtype).reshape([-1] + [1] * rest if len(numbers) > 1 else [])


def forms(shared: Sequence[str]) -> list[str]:
    """Return what is said of inputs in several forms, see `views_of`; the rest are names."""
    return [said for said in shared if "=" in said]


def views_of(said: str, types: Mapping[Place, Any]) -> tuple[str, dict[Place, View | None]]:
    """Return an input, and who takes it in which form, None for as it is.

    Parameters
    ----------
    said : str
        ``input=task.input,task.input*factor+offset``: the first one says what the input is like. Channels may be the
        last dimension of one and the first of another; factors and offsets are numbers, or one per channel in brackets.
    types : mapping
        All inputs of all tasks.

    Raises
    ------
    InputError
        If there is no such input, or forms can't be brought together.
    """
    name, _, places = said.partition("=")
    if not name or not places or len(said) > _LONGEST:
        raise InputError(f"shared input {said[:80]!r}: write it as input=task.input,other.input")
    found: dict[Place, View | None] = {}
    for text in _OUTSIDE_OF_BRACKETS.split(places):
        place, factor, offset = _parsed(said, text, types)
        if place in found:
            raise InputError(f"shared input {said}: {text} is there twice")
        if not found and (factor or offset):
            raise InputError(f"shared input {said}: the first input says what {name!r} is like; scale the others by it")
        found[place] = _view(said, name, types[next(iter(found), place)], types[place], factor, offset)
    return name, found


def _parsed(said: str, text: str, types: Mapping[Place, Any]) -> tuple[Place, tuple[float, ...], tuple[float, ...]]:
    """Return the input that is meant, its factors and its offsets."""
    known = {f"{task}.{name}": (task, name) for task, name in types}
    if text in known:  # whatever it looks like
        return known[text], (), ()
    match = _SCALED.fullmatch("".join(text.split()))
    if match is None or match["place"] not in known:
        if meant := [name for name in known if text.strip().startswith(name)]:
            behind = text.strip().removeprefix(max(meant, key=len))
            raise InputError(
                f"shared input {said}: {behind!r} is no factor and offset; write *0.5+1, or per channel *[1,2,3]"
            )
        raise InputError(f"shared input {said}: there is no input {text!r}; there are {', '.join(known)}")
    factor, offset = (_numbers(match[part]) for part in ("factor", "offset"))
    with np.errstate(over="ignore", under="ignore"):
        rounded = [np.array(numbers, "float32") for numbers in (factor, offset)]
    if not all(np.isfinite(numbers).all() for numbers in rounded) or 0 in rounded[0]:
        raise InputError(f"shared input {said}: {text} needs factors that are finite and not 0, and finite offsets")
    return known[match["place"]], factor, tuple(-n for n in offset) if match["sign"] == "-" else offset


def _numbers(text: str | None) -> tuple[float, ...]:
    return tuple(map(float, text.strip("[]").split(","))) if text else ()


def _view(
    said: str, name: str, common: Any, own: Any, factor: tuple[float, ...], offset: tuple[float, ...]
) -> View | None:
    """Return how a task takes an input of a type; None if as it is."""
    have, want = shape_of(common), shape_of(own)
    dtypes = tuple(str(ty.dtype) for ty in (common, own))
    texts = f"{text_of(common)} and {text_of(own)}"
    axes = _axes(have, want)
    if axes is None:
        raise InputError(
            f"shared input {said}: {texts} don't fit; only channels may be first in one and last in the other"
        )
    if dtypes[0] != dtypes[1] and not dtypes[1].startswith("float"):
        raise InputError(
            f"shared input {said}: {texts} don't fit; an input may become floats of another type, not {dtypes[1]}"
        )
    if (factor or offset) and not dtypes[1].startswith("float"):
        raise InputError(f"shared input {said}: {dtypes[1]} can't be scaled, only floats")
    if have == want and dtypes[0] == dtypes[1] and not factor and not offset:
        return None
    channels = _channels(said, have, want, axes, {len(each) for each in (factor, offset) if len(each) > 1})
    return View(name, axes, want, dtypes[1], factor, offset, channels)


def _axes(have: Sequence[int], want: Sequence[int]) -> tuple[int, ...] | None:
    """Return where the dimensions that are wanted are among those that there are; those of 1 count for nothing."""
    rank = len(have)
    same = tuple(range(rank))
    ways = [same, (0, rank - 1, *same[1:-1]), (0, *same[2:], 1)] if rank > 2 else [same]
    exact = [axes for axes in ways if [have[axis] for axis in axes] == [*want]]
    ones = [axes for axes in ways if without_ones([have[axis] for axis in axes]) == without_ones(want)]
    return next(iter([*exact, *ones]), None)


def without_ones(shape: Sequence[int]) -> tuple[int, ...]:
    """Return a shape but for its dimensions of 1."""
    return tuple(dim for dim in shape if dim != 1)


def shape_of(ty: Any) -> tuple[int, ...]:
    """Return the static shape of a tensor's type."""
    return tuple(int(dim) for dim in ty.shape.values)


def text_of(ty: Any) -> str:
    """Return a tensor's type as messages say it."""
    return f"{ty.dtype} {'x'.join(map(str, shape_of(ty))) or 'number'}"


def _channels(said: str, have: Sequence[int], want: Sequence[int], axes: Sequence[int], counts: set[int]) -> int:
    """Return the axis of channels of what is wanted, if there are numbers per channel."""
    if not counts:
        return 1
    first, last = 1, len(want) - 1
    moved = len(have) == len(want) and list(axes) != sorted(axes)
    likely = {first} if moved and axes[1] == last else {last} if moved else {first, last}
    found = [axis for axis in sorted(likely) if axis < len(want) and counts == {want[axis]}]
    if len(found) != 1:
        shape = "x".join(map(str, want))
        raise InputError(
            f"shared input {said}: {max(counts)} numbers for {shape}: give one, or one per channel of one axis"
        )
    return found[0]
