"""Which channels of several networks become which channels of one trunk."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm.ir import Call

from nnfuze_tvm.graph.channels import CoupledLayer
from nnfuze_tvm.passes.merge.beginnings import Beginnings, Place


class Matching:
    """The channels of networks with equal beginnings, group by group of coupled ones, and those of their trunk.

    Parameters
    ----------
    found : Beginnings
        The networks.

    Attributes
    ----------
    groups : list of np.ndarray
        The classes of the channels of each group, in the order of the layers that make them.
    merges : dict of str to dict of int to np.ndarray
        By task and group, ``[n, n]``: the trunk's channels as weighted sums of the task's, of which each is in one. The
        trunk's are means over the tasks of these. A group that is not there has the task's own channels.
    """

    def __init__(self, found: Beginnings) -> None:
        self.found = found
        self._roots = found.coupling.channels.roots()
        own = {found.coupling.layers[found.bindings[number].var].name for number in found.layers}
        self.groups = [group.classes for group in found.coupling.groups() if own & set(group.names)]
        self._group = np.full(len(self._roots), -1)
        for number, classes in enumerate(self.groups):
            self._group[classes] = number
        self.merges: dict[str, dict[int, np.ndarray]] = {task: {} for task in found.functions}

    def parts(self, labels: np.ndarray) -> dict[int, np.ndarray]:
        """Return where the channels of each group are among those of an axis, ``[times, n]`` of n channels each."""
        roots = self._roots[labels]
        found: dict[int, np.ndarray] = {}
        for number in np.unique(self._group[roots]):
            if number >= 0:
                places = np.flatnonzero(self._group[roots] == number)
                # A flattened image has each channel at several places: the first of all, the second of all, and so on.
                order = np.argsort(roots[places], kind="stable")
                found[int(number)] = places[order].reshape(len(self.groups[number]), -1).T
        return found

    def merge(self, task: str, labels: np.ndarray) -> np.ndarray:
        """Return the matrix from a task's channels of an axis to the trunk's, ``[n, n]``."""
        matrix = np.eye(len(labels))
        for number, places in self.parts(labels).items():
            if number in self.merges[task]:
                for each in places:
                    matrix[np.ix_(each, each)] = self.merges[task][number]
        return matrix

    def sources(self, task: str, labels: np.ndarray) -> np.ndarray:
        """Return which of the trunk's channels does the work of each of a task's, along an axis."""
        return np.argmax(self.merge(task, labels) != 0, axis=0)

    def aligned(self, task: str, place: Place, value: np.ndarray) -> np.ndarray:
        """Return a constant of a task over the trunk's channels, in float64."""
        binding = self.found.bindings[place[0]]
        if binding.var in self.found.coupling.layers:
            own = self.found.coupling.layers[binding.var]
            return own.filters.pack(self.filters(task, own, own.filters.unpack(value.astype("float64"))))
        value = value.astype("float64")
        for axis, labels in self._axes(binding.var, binding.value, value):
            value = np.moveaxis(np.tensordot(self.merge(task, labels), value, (1, axis)), 0, axis)
        return value

    def _axes(self, var: tvm.ir.Var, call: Call, value: np.ndarray) -> list[tuple[int, np.ndarray]]:
        """Return the axes of a constant that run over channels, and the labels of these."""
        labels = self.found.coupling.tensor(var)
        own = getattr(call.attrs, "axis", None)
        if own is not None and value.ndim == 1:
            return [(0, labels[int(own)])]
        axes = [(axis, labels[axis - value.ndim]) for axis in range(value.ndim) if value.shape[axis] > 1]
        return [(axis, each) for axis, each in axes if self.parts(each)]

    def filters(self, task: str, layer: CoupledLayer, filters: np.ndarray) -> np.ndarray:
        """Return filters ``[groups, outputs, inputs, …]`` of a task over the trunk's channels, inputs and outputs.

        An input of the trunk's does the work of all the task's that became it: their weights are added up.
        """
        outputs, inputs = filters.shape[1:3]
        if not layer.has_own_channels:  # depthwise: channels are groups
            return np.tensordot(self.merge(task, layer.inputs), filters, (1, 0))
        made = self.merge(task, layer.outputs)
        # Groups keep the same places.
        mixed = np.moveaxis(np.tensordot(made[:outputs, :outputs], filters, (1, 1)), 0, 1)
        result, sources = np.zeros_like(mixed), self.sources(task, layer.inputs)
        for number, source in enumerate(sources[:inputs]):
            result[:, :, source] += mixed[:, :, number]
        return result

    def mean(self, place: Place, values: Mapping[str, np.ndarray]) -> np.ndarray:
        """Return the trunk's constant, where nothing else says what it is."""
        return same_or_mean([self.aligned(task, place, values[task]) for task in self.found.functions])

    def rest(self) -> dict[str, dict[int, np.ndarray]]:
        """Return for each task and axis of the tensor at the cut which channels its rest wants."""
        labels = self.found.coupling.tensor(self.found.end)
        return {
            task: {axis: self.sources(task, each) for axis, each in enumerate(labels) if self.parts(each)}
            for task in self.found.functions
        }


def same_or_mean(values: list[np.ndarray]) -> np.ndarray:
    """Return what all of several arrays are, or their mean."""
    if all(np.array_equal(each, values[0]) for each in values[1:]):
        return values[0]
    return np.mean(values, axis=0)
