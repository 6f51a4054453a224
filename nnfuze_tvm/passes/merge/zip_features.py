"""One trunk for networks that were trained apart: features that go together on samples become one."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.merge.beginnings import Beginnings, Place
from nnfuze_tvm.passes.merge.matching import Matching

# Features are observed on so many samples, and the trunk's statistics, layer by layer, on so many.
_SAMPLES, _RESET_SAMPLES = 128, 32
# What is left of the correlation of a feature that was matched already, and the part of all matches that may be within
# one network: the published values.
_REUSED, _WITHIN = 0.3, 0.125
# A channel that varies less than this part of what it should is taken to be off, and stays as it is.
_LEAST = 1e-3


@module_pass(opt_level=0, name="ZipFeatures")
class ZipFeatures:
    """Zip the beginnings of networks of equal shapes into one, after ZipIt! (Stoica et al., ICLR 2024).

    The features of all networks, group by group of coupled channels, are matched greedily by how they correlate on
    samples, also within a network: where it has two that say the same, there is room for one of another. The trunk's
    features are the means of what was matched; with ``M`` from the networks' features to the trunk's and ``U`` back,
    its weights are ``M W U``. Means shrink, so each layer's results get the mean and the deviation back that the
    matched ones have (what a reset of batch norms does, which are folded here). Behind the trunk each network is as it
    was, and reads for each of its features the one that it became.

    Afterwards the functions have bit-equal beginnings, which ``MergeTasks`` and ``ShareTrunk`` make one of.

    Parameters
    ----------
    calibration : path of an ``.npz`` file, or mapping of input name to ``[N, …]``
        Samples of the common inputs; at most 128 are used.
    upto : str
        The layer that the trunk ends behind, of any of the networks.

    Raises
    ------
    InputError
        As of `ZipUnits`.
    """

    def __init__(self, calibration: str | os.PathLike[str] | Mapping[str, np.ndarray], upto: str) -> None:
        self.calibration = calibration
        self.upto = upto

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with one beginning in all its functions."""
        found = Beginnings(mod, self.upto)
        samples = load_calibration(self.calibration, mod)
        matching = Matching(found)
        for group, together in _correlations(matching, samples).items():
            size = len(matching.groups[group])
            sets = matched(together, np.repeat(np.arange(len(found.functions)), size), size)
            for number, task in enumerate(found.functions):
                merge = matching.merges[task][group] = np.zeros((size, size))
                for row, members in enumerate(sets):
                    own = [each % size for each in members if each // size == number]
                    merge[row, own] = len(found.functions) / len(members)
        values = {task: found.constants(task) for task in found.functions}
        first = next(iter(values.values()))
        constants = {place: matching.mean(place, {t: own[place] for t, own in values.items()}) for place in first}
        _reset(matching, constants, samples)
        return found.merged(mod, constants, matching.rest())


def matched(together: np.ndarray, owners: np.ndarray, count: int) -> list[list[int]]:
    """Return ``count`` sets of features that go together, by their first members.

    Parameters
    ----------
    together : np.ndarray
        ``[features, features]``: their correlations.
    owners : np.ndarray
        ``[features]``: the network of each.
    count : int
        How many sets there are to be.
    """
    near = together.astype("float64")
    np.fill_diagonal(near, -np.inf)
    sets: list[list[int]] = [[number] for number in range(len(near))]
    # The only owner of a set, -1 for several.
    owner = owners.copy()
    left = int(_WITHIN * (len(near) - count))
    for _ in range(len(near) - count):
        own = (owner[:, None] == owner) & (owner >= 0)
        allowed = near if left else np.where(own, -np.inf, near)
        low, high = sorted(np.unravel_index(np.argmax(allowed), near.shape))
        left -= bool(own[low, high])
        owner[low] = owner[low] if own[low, high] else -1
        sets[low] += sets[high]
        sets[high] = []
        # Both must go with a third one, which counts less than one that is free still.
        both = np.minimum(near[low], near[high])
        both = np.where(both > 0, both * _REUSED, both)
        near[low], near[:, low] = both, both
        near[high], near[:, high] = -np.inf, -np.inf
        near[low, low] = -np.inf
    return sorted(each for each in sets if each)


def _correlations(matching: Matching, samples: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return by group ``[features, features]`` of all tasks: of what layers read of it, and what the trunk ends in."""
    found = matching.found
    wanted: dict[Value, None] = dict.fromkeys(
        [*(found.coupling.layers[found.bindings[n].var].data for n in found.layers), found.end]
    )
    places = [
        (number, axis, group, each)
        for number, var in enumerate(wanted)
        for axis, labels in enumerate(found.coupling.tensor(var))
        for group, each in matching.parts(labels).items()
    ]
    sums = {group: _Sums(len(found.functions) * each.shape[1]) for _, _, group, each in places}
    observed = [found.observe(func, list(wanted), samples, _SAMPLES) for func in found.functions.values()]
    for batch in zip(*observed, strict=True):
        for number, axis, group, each in places:
            rows = [np.moveaxis(values[number], axis, -1)[..., each].reshape(-1, each.shape[1]) for values in batch]
            sums[group].add(np.concatenate(rows, axis=1).astype("float64"))
    return {group: each.correlations() for group, each in sums.items()}


class _Sums:
    """What rows of features say of them together."""

    def __init__(self, size: int) -> None:
        self.count, self.first, self.second = 0, np.zeros(size), np.zeros((size, size))

    def add(self, rows: np.ndarray) -> None:
        """Add ``[rows, features]``."""
        self.count += len(rows)
        self.first += rows.sum(0)
        self.second += rows.T @ rows

    def mean_and_deviation(self) -> tuple[np.ndarray, np.ndarray]:
        """Return those of each feature."""
        mean = self.first / self.count
        return mean, np.sqrt(np.maximum(self.second.diagonal() / self.count - mean**2, 0))

    def correlations(self) -> np.ndarray:
        """Return how features correlate; what never changes, with nothing."""
        mean, deviation = self.mean_and_deviation()
        covariance = self.second / self.count - np.outer(mean, mean)
        scale = np.outer(deviation, deviation)
        return np.divide(covariance, scale, out=np.zeros_like(scale), where=scale > 1e-12)


def _reset(matching: Matching, constants: dict[Place, np.ndarray], samples: Mapping[str, np.ndarray]) -> None:
    """Give what the trunk's layers make, front to back, the mean and the deviation of what it was matched from."""
    found = matching.found
    layers = [number for number in found.layers if number in found.biases]
    tasks = list(found.functions)
    sums = {task: _results(found, found.functions[task], layers, samples) for task in tasks}
    for place, number in enumerate(layers):
        layer = found.coupling.layers[found.bindings[number].var]
        wanted = []
        for task in tasks:
            merge = matching.merge(task, layer.outputs)
            wanted.append([merge @ each for each in sums[task][place].mean_and_deviation()])
        mean, deviation = np.mean(wanted, axis=0)
        func = found.with_constants(tasks[0], constants, {})
        own_mean, own = _results(found, func, [number], samples)[0].mean_and_deviation()
        scale = np.where(own > _LEAST * deviation, deviation / np.maximum(own, 1e-30), 1.0)
        filters = layer.filters.unpack(constants[number, 1])
        per_output = scale.reshape(*filters.shape[:2], *[1] * (filters.ndim - 2))
        constants[number, 1] = layer.filters.pack(filters * per_output)
        bias = constants[found.biases[number]]
        constants[found.biases[number]] = (scale * (bias.ravel() - own_mean) + mean).reshape(bias.shape)


def _results(
    found: Beginnings, func: relax.Function, layers: Sequence[int], samples: Mapping[str, np.ndarray]
) -> list[_Sums]:
    """Return what a network's layers make, with their biases."""
    axes, vars_ = [], []
    for number in layers:
        where = ops.layer(found.bindings[number].value)
        assert where is not None
        axes.append(where.result)
        vars_.append(found.bindings[found.biases[number][0]].var)
    sums: list[_Sums] = []
    for values in found.observe(func, vars_, samples, _RESET_SAMPLES):
        rows = [
            np.moveaxis(each, axis, -1).reshape(-1, each.shape[axis]) for each, axis in zip(values, axes, strict=True)
        ]
        sums = sums or [_Sums(each.shape[1]) for each in rows]
        for own, each in zip(sums, rows, strict=True):
            own.add(each.astype("float64"))
    return sums
