"""Which channels of a network can only be removed together.

Every index of every axis of every tensor gets a label. Operators hand labels on, make new ones (a layer's
output channels), or tie labels to each other (the two sides of a residual add). After one walk over the
function the classes of a union-find are the sets of channels that live and die together: the dependency
groups of DepGraph (Fang et al., "DepGraph: Towards Any Structural Pruning", CVPR 2023), at the grain of
single channels, so that concat, split and flatten need no special case.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import folded
from nnfuze_tvm.graph.dataflow import Value, op_name

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
class Layer:
    """A convolution or matmul with constant weights.

    ``inputs`` and ``outputs`` are the labels of its channels, ``data`` is what it reads and ``axis`` the
    axis of the channels in that.
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


@dataclass(frozen=True)
class ChannelGroup:
    """Channels that occur side by side in the same tensors, and so compete for being kept.

    ``classes`` are the representatives of the removable units, ``layers`` the layers that make them.
    """

    classes: np.ndarray
    layers: list[Layer]

    @property
    def names(self) -> list[str]:
        """The names of the layers."""
        return [layer.name for layer in self.layers]


@dataclass
class Coupling:
    """The coupled channels of one straight-line function, whose constant subgraphs are computed first."""

    func: relax.Function
    channels: Channels = field(default_factory=Channels)
    labels: dict[Value, Labels | tuple] = field(default_factory=dict)
    layers: dict[Value, Layer] = field(default_factory=dict)

    def __post_init__(self) -> None:
        from nnfuze_tvm.passes.compress.prune.channel_rules import RULES

        self.bindings, self.outputs = folded(self.func)
        for param in self.func.params:
            self.labels[param] = fixed(param.ty)
        for binding in self.bindings:
            rule = RULES.get(op_name(binding.value))
            labels = None if rule is None else rule(self, binding.var, binding.value)
            if labels is None:
                labels = self._hand_on(binding)
            self.labels[binding.var] = labels
        for output in self.outputs:
            self.fix(self.of(output))

    def _hand_on(self, binding: relax.VarBinding) -> Labels | tuple:
        """Return the labels of a value that has no rule: safe, because nothing around it is removed."""
        value = binding.value
        if isinstance(value, relax.TupleGetItem):
            source = self.of(value.tuple_value)
            assert isinstance(source, tuple)
            return source[value.index]
        if isinstance(value, relax.Tuple):
            return self.of(value)
        for arg in value.args if isinstance(value, Call) else []:
            self.fix(self.of(arg))
        return fixed(binding.var.ty)

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

    def groups(self) -> list[ChannelGroup]:
        """Return the groups of removable channels, in the order of their first layers.

        Two classes are in one group if they occur in exactly the same axes of the same tensors. Every axis is
        then a union of whole groups, and as long as each group keeps a channel no tensor becomes empty.
        """
        roots = self.channels.roots()
        part = np.zeros(len(roots), "int64")
        count = 1
        for axis in arrays(tuple(self.labels.values())):
            if axis.any():
                members = np.unique(roots[axis])
                members = members[members != FIXED]
                before, refined = np.unique(part[members], return_inverse=True)
                part[members] = count + refined
                count += len(before)
        layers: dict[int, list[Layer]] = {}
        for layer in self.layers.values():
            for number in np.unique(part[roots[layer.outputs]]).tolist():
                layers.setdefault(number, []).append(layer)
        layers.pop(0, None)
        return [
            ChannelGroup(np.flatnonzero((part == number) & (roots == np.arange(len(roots)))), members)
            for number, members in layers.items()
        ]


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


def is_tensor(value: Value) -> bool:
    """Return whether an operand is a tensor that the network computes: no constant, shape or scalar."""
    return isinstance(value.ty, relax.TensorType) and not isinstance(value, GenericConst)
