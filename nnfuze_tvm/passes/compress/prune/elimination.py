"""Which channels others can stand in for: backward elimination by what least squares make up for.

Where weights that read a channel are fitted anew after it has gone (`repair`), what is lost is the part of it that no
linear combination of the other channels gives. Of weights ``W`` and channels with covariance ``S``, removing channel c
adds ``|W_c|² / (S⁻¹)_cc`` to the squared error, and the other weights become ``W - S⁻¹_c W_c / (S⁻¹)_cc`` (Hassibi and
Stork, "Second Order Derivatives for Network Pruning: Optimal Brain Surgeon", 1993, channel by channel).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import tvm

from nnfuze_tvm.graph.channels import CoupledLayer
from nnfuze_tvm.graph.dataflow import Value, returning
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.passes.compress.calibration import observed
from nnfuze_tvm.passes.compress.prune.channel_groups import ChannelGroup, CoupledFunction

# What the covariance of channels is raised by, as a part of their mean variance: samples are few.
_RIDGE = 1e-3
# Channels go in so many steps.
_STEPS = 128
# Of so many inferences at most, and about so many places of each, are covariances known.
_MOST_BATCHES, _PLACES = 256, 256


@dataclass(frozen=True)
class Elimination:
    """In which order the channels of a group go, and what that costs.

    Attributes
    ----------
    order : numpy.ndarray
        The classes, those first that go first.
    errors : numpy.ndarray
        What the squared errors of what reads them are, as parts of the squares and added up over the readers, when the
        first 0, 1, … n have gone.
    """

    order: np.ndarray
    errors: np.ndarray


class _Reader:
    """A layer that reads channels: its weights' products and the inverse covariance of the channels that are left."""

    def __init__(self, layer: CoupledLayer, roots: np.ndarray, covariance: np.ndarray) -> None:
        filters = layer.filters.unpack(layer.weight).astype("float64")
        groups, _, inputs = filters.shape[:3]
        # What is one channel to the group's others at the same place; of a grouped convolution, all groups together.
        rows = np.moveaxis(filters, 2, 1).reshape(groups * inputs, -1)
        self.roots = roots[layer.inputs]
        apart = np.repeat(np.arange(groups), inputs)
        same = apart[:, None] == apart[None]
        self.products = np.where(same, rows @ rows.T, 0)
        covariance = np.where(same, covariance, 0)
        size = len(covariance)
        self.total = max(float((self.products * covariance).sum()), 1e-30)
        level = max(float(np.trace(covariance)) / size, 1e-30)
        self.inverse = np.linalg.inv(covariance + _RIDGE * level * np.eye(size))
        self.there = np.ones(size, bool)

    def costs(self, count: int) -> np.ndarray:
        """Return what each class would cost, as a part of the squares of the layer's result."""
        own = np.where(self.there, self.products.diagonal() / self.inverse.diagonal().clip(1e-30), 0)
        return np.bincount(self.roots, own.clip(0) / self.total, count)

    def drop(self, classes: np.ndarray) -> float:
        """Remove classes and fit the rest; return what that costs."""
        gone = np.flatnonzero(np.isin(self.roots, classes) & self.there)
        if not len(gone):
            return 0.0
        columns = self.inverse[:, gone]
        factor = columns @ np.linalg.inv(self.inverse[np.ix_(gone, gone)])
        own = self.products[np.ix_(gone, gone)]
        cost = float(np.trace(np.linalg.solve(self.inverse[np.ix_(gone, gone)], own)))
        cross = self.products[:, gone] @ factor.T
        self.products = self.products - cross - cross.T + factor @ own @ factor.T
        self.inverse = self.inverse - factor @ columns.T
        self.there[gone] = False
        return max(cost, 0.0) / self.total


def _eliminate(
    group: ChannelGroup,
    layers: Sequence[CoupledLayer],
    roots: np.ndarray,
    covariances: Mapping[str, np.ndarray],
) -> Elimination:
    """Return in which order a group's channels go.

    Parameters
    ----------
    group : ChannelGroup
        The channels.
    layers : sequence of CoupledLayer
        The layers of the function.
    roots : numpy.ndarray
        The representative of each label.
    covariances : mapping
        Of what layers read, by their names, ``[channels, channels]``.
    """
    readers = [
        _Reader(layer, roots, covariances[layer.name])
        for layer in layers
        if layer.name in covariances and np.isin(roots[layer.inputs], group.classes).any()
    ]
    left, order, errors = group.classes, list[int](), [0.0]
    step = max(1, len(left) // _STEPS)
    while len(left):
        costs = sum((reader.costs(len(roots)) for reader in readers), np.zeros(len(roots)))[left]
        gone = left[np.argsort(costs, kind="stable")[:step]]
        cost = sum(reader.drop(gone) for reader in readers)
        order.extend(gone.tolist())
        errors.extend(errors[-1] + cost * (n + 1) / len(gone) for n in range(len(gone)))
        left = left[~np.isin(left, gone)]
    return Elimination(np.array(order, "int64"), np.array(errors))


def eliminations(
    mod: tvm.IRModule, coupling: CoupledFunction, samples: Mapping[str, np.ndarray], executor: Executor
) -> list[Elimination]:
    """Return how the channels of each group of a function of ``mod`` would go.

    Raises
    ------
    InputError
        If the samples make the network produce NaN or infinity.
    """
    layers = [layer for layer in coupling.layers.values() if layer.inputs.any() and layer.has_own_channels]
    covariances = _covariances(mod, coupling, layers, samples, executor)
    roots = coupling.channels.roots()
    return [_eliminate(group, layers, roots, covariances) for group in coupling.groups()]


def _covariances(
    mod: tvm.IRModule,
    coupling: CoupledFunction,
    layers: Sequence[CoupledLayer],
    samples: Mapping[str, np.ndarray],
    executor: Executor,
) -> dict[str, np.ndarray]:
    """Return the covariance of the channels of what each layer reads, by the layer's name."""
    axes = {layer.data: layer.axis for layer in layers}
    if not axes:
        return {}
    func = returning(coupling.func, list(axes))
    sums: dict[Value, Any] = dict.fromkeys(axes, 0)
    squares: dict[Value, Any] = dict.fromkeys(axes, 0)
    counts = dict.fromkeys(axes, 0)
    for found in observed(mod, func, samples, executor, _MOST_BATCHES):
        for (data, axis), values in zip(axes.items(), found, strict=True):
            rows = np.moveaxis(values, axis, -1).reshape(-1, values.shape[axis])
            rows = rows[:: -(-len(rows) // _PLACES)].astype("float64")
            sums[data], squares[data] = sums[data] + rows.sum(0), squares[data] + rows.T @ rows
            counts[data] += len(rows)
    means = {data: sums[data] / counts[data] for data in axes}
    return {
        layer.name: squares[layer.data] / counts[layer.data] - np.outer(means[layer.data], means[layer.data])
        for layer in layers
    }
