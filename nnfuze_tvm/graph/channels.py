"""Channels as labels: the vocabulary in which operators say which channels can only be removed together.

Every index of every axis of every tensor gets a label. Operators hand labels on, make new ones (a layer's output
channels), or tie labels to each other (the two sides of a residual add): the dependency groups of DepGraph (Fang et
al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), at the grain of single channels, so that concat, split and
flatten need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value

FIXED = 0
"""The label of everything that can't be removed."""

Labels = list[np.ndarray]
"""Of one tensor: per axis, the label of each index (int64)."""


class Channels:
    """A union-find over labels; the smallest label of a class represents it."""

    def __init__(self) -> None:
        self._parent = [FIXED]

    def fresh(self, count: int) -> np.ndarray:
        """Return ``count`` new labels."""
        first = len(self._parent)
        self._parent.extend(range(first, first + count))
        return np.arange(first, first + count)

    def tie(self, left: np.ndarray, right: np.ndarray) -> None:
        """Make ``left[i]`` and ``right[i]`` one class."""
        if np.array_equal(left, right):
            return
        for a, b in zip(left.tolist(), right.tolist(), strict=True):
            low, high = sorted((self._find(a), self._find(b)))
            self._parent[high] = low

    def fix(self, labels: np.ndarray) -> None:
        """Make ``labels`` unremovable."""
        for label in labels[labels != FIXED].tolist():
            self._parent[self._find(label)] = FIXED

    def roots(self, labels: np.ndarray | None = None) -> np.ndarray:
        """Return the representative of each of ``labels``, or of all labels there are."""
        which = range(len(self._parent)) if labels is None else labels.tolist()
        return np.array([self._find(label) for label in which], "int64")

    def _find(self, label: int) -> int:
        parent = self._parent
        while parent[label] != label:
            parent[label] = parent[parent[label]]
            label = parent[label]
        return label


@dataclass(frozen=True)
class Filters:
    """How the weights of a layer are laid out, and the way to a common form and back.

    The common form is ``[groups, outputs per group, inputs per group, *kernel]``.

    Attributes
    ----------
    groups : int
        Groups of channels that do not meet.
    outer, inner : int
        The axes of the weights that run over output and input channels.
    transposed : bool
        Whether the weights are a transposed convolution's: all input channels × the outputs of one group.
    """

    groups: int
    outer: int
    inner: int
    transposed: bool

    def unpack(self, weight: np.ndarray) -> np.ndarray:
        """Return ``weight`` in the common form."""
        view = np.moveaxis(weight, (self.outer, self.inner), (1, 0) if self.transposed else (0, 1))
        per_group = view.reshape(self.groups, view.shape[0] // self.groups, *view.shape[1:])
        return per_group.swapaxes(1, 2) if self.transposed else per_group

    def pack(self, filters: np.ndarray) -> np.ndarray:
        """Return weights in the common form as the layer's operator wants them."""
        per_group = filters.swapaxes(1, 2) if self.transposed else filters
        view = per_group.reshape(-1, *per_group.shape[2:])
        return np.moveaxis(view, (1, 0) if self.transposed else (0, 1), (self.outer, self.inner))


@dataclass(frozen=True)
class CoupledLayer:
    """A layer with constant weights, and the labels of its channels.

    Attributes
    ----------
    name : str
        The layer's name.
    data : tvm.ir.Var
        What it reads.
    axis : int
        The axis of the channels in that.
    weight : np.ndarray
        Its weights.
    filters : Filters
        How they are laid out.
    inputs, outputs : np.ndarray
        The labels of its channels.
    """

    name: str
    data: tvm.ir.Var
    axis: int
    weight: np.ndarray
    filters: Filters
    inputs: np.ndarray
    outputs: np.ndarray

    @property
    def has_own_channels(self) -> bool:
        """Whether the layer makes channels; a depthwise convolution passes on those of its input."""
        return not np.isin(self.outputs, self.inputs).any()


@dataclass
class Coupling:
    """The labels of a function's tensors, as far as operators have told them.

    Attributes
    ----------
    channels : Channels
        Which labels are one.
    labels : dict
        Of every Var: a list of label arrays for a tensor, a tuple of such for a tuple.
    layers : dict
        The layers, by the Var of their result.
    """

    channels: Channels = field(default_factory=Channels)
    labels: dict[Value, Labels | tuple] = field(default_factory=dict)
    layers: dict[Value, CoupledLayer] = field(default_factory=dict)

    def of(self, value: Value) -> Labels | tuple:
        """Return the labels of an operand: a list for a tensor, a tuple of such for a tuple."""
        if isinstance(value, relax.Tuple):
            return tuple(self.of(each) for each in value.fields)
        return self.labels[value] if value in self.labels else fixed(value.ty)

    def tensor(self, value: Value) -> Labels:
        """Return the labels of an operand that is a tensor."""
        labels = self.of(value)
        assert isinstance(labels, list)
        return labels

    def fix(self, labels: Labels | tuple) -> None:
        """Make everything in ``labels`` unremovable."""
        for axis in arrays(labels):
            self.channels.fix(axis)


@dataclass(frozen=True)
class Removal:
    """What goes, for operators that are written anew with smaller constants.

    Attributes
    ----------
    coupling : Coupling
        The labels of the function's tensors.
    stays : np.ndarray
        Of each label, whether it stays.
    """

    coupling: Coupling
    stays: np.ndarray

    def sizes(self, labels: Labels) -> list[int]:
        """Return what is left of a tensor's shape."""
        return [int(self.stays[axis].sum()) for axis in labels]

    def cut(self, value: GenericConst, labels: Labels) -> GenericConst:
        """Return a constant that is broadcast against a tensor with these ``labels``, without what goes."""
        old = array(value)
        new = old
        for axis in range(old.ndim):
            stays = self.stays[labels[axis - old.ndim]]
            if old.shape[axis] != 1 and not stays.all():
                new = new.compress(stays, axis)
        return value if new is old else constant(new)


def arrays(labels: Labels | tuple) -> Iterator[np.ndarray]:
    """Return the label arrays in ``labels``, looking into tuples."""
    for each in labels:
        if isinstance(each, np.ndarray):
            yield each
        else:
            yield from arrays(each)


def fixed(ty: tvm.ir.Type) -> Labels | tuple:
    """Return labels for a value of type ``ty`` of which nothing can be removed."""
    if isinstance(ty, relax.TupleType):
        return tuple(fixed(each) for each in ty.fields)
    if isinstance(ty, relax.TensorType) and isinstance(ty.shape, relax.ShapeExpr):
        return [np.full(int(size), FIXED) for size in ty.shape.values]
    return []
