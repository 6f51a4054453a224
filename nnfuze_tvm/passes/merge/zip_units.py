"""One trunk for networks that were trained apart: their units zipped pair by pair, from what layers read."""

from __future__ import annotations

import os
from collections.abc import Mapping
from math import prod

import numpy as np
import tvm
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import dataflow, ops
from nnfuze_tvm.graph.channels import CoupledLayer
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.merge.beginnings import Beginnings
from nnfuze_tvm.passes.merge.matching import Matching, same_or_mean

# What layers read is observed on so many samples.
_SAMPLES = 128
# Part of the mean square of what a layer reads that is added, so that directions that no sample has count a little.
_RIDGE = 1e-4
# A group of channels that several layers make is matched anew until nothing changes, at most so often.
_ROUNDS = 10


@module_pass(opt_level=0, name="ZipUnits")
class ZipUnits:
    """Zip the beginnings of networks of equal shapes into one, after MTZ (He, Zhou and Thiele, NeurIPS 2018).

    Layer by layer each unit (output channel) of a network is paired with that unit of the first network from which it
    differs least in function: for weights ``a`` and ``b`` (the bias is one more) and second moments ``A`` and ``B`` of
    what the layers read, ``½ Δᵀ (A⁻¹ + B⁻¹)⁻¹ Δ`` with ``Δ = a - b``. Units that must keep together (`graph.channels`)
    are paired together, by the sum over the layers that make them. The common unit is ``(A + B)⁻¹ (A a + B b)``, which
    loses just that. The published method trains after each layer; this one does not. So it is exact for networks that
    differ in the order of their channels, close for those that were trained from one another, and of networks that
    were trained apart, more than the first layer costs much accuracy.

    Afterwards the functions have bit-equal beginnings, which ``MergeTasks`` and ``ShareTrunk`` make one of; behind
    them each network is as it was.

    Parameters
    ----------
    calibration : path of an ``.npz`` file, or mapping of input name to ``[N, …]``
        Samples of the common inputs; at most 128 are used.
    upto : str
        The layer that the trunk ends behind, of any of the networks.

    Raises
    ------
    InputError
        When run, if there are no two networks, no trunk can end there, the networks differ in more than weights in
        front of it, or the samples do not fit.
    """

    def __init__(self, calibration: str | os.PathLike[str] | Mapping[str, np.ndarray], upto: str) -> None:
        self.calibration = calibration
        self.upto = upto

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with one beginning in all its functions."""
        found = Beginnings(mod, self.upto)
        samples = load_calibration(self.calibration, mod)
        zipper = _Zipper(found, {task: _layers(found, task, samples) for task in found.functions})
        zipper.match()
        return found.merged(mod, zipper.constants(), zipper.matching.rest())


class _Unit:
    """A layer of one network.

    Attributes
    ----------
    filters : np.ndarray
        ``[groups, outputs, inputs, …]``.
    bias : np.ndarray or None
        ``[outputs]``.
    moments : np.ndarray or None
        ``[groups, depth, depth]``: mean products of what the filters are multiplied by, a 1 behind it where there is a
        bias. None where the operator does not say what that is.
    """

    def __init__(self, filters: np.ndarray, bias: np.ndarray | None, moments: np.ndarray | None) -> None:
        self.filters, self.bias, self.moments = filters, bias, moments

    def rows(self) -> np.ndarray:
        """Return the weights, ``[groups, outputs, depth]``."""
        groups, outputs = self.filters.shape[:2]
        rows = self.filters.reshape(groups, outputs, -1)
        if self.bias is None:
            return rows
        return np.concatenate([rows, self.bias.reshape(groups, outputs, 1)], axis=2)


def _layers(found: Beginnings, task: str, samples: Mapping[str, np.ndarray]) -> dict[int, _Unit]:
    """Return the layers of a task's beginning, by the number of their bindings."""
    coupled = {n: found.coupling.layers[found.bindings[n].var] for n in found.layers}
    constants, units = found.constants(task), {}
    for number, layer in coupled.items():
        bias = constants[found.biases[number]].ravel().astype("float64") if number in found.biases else None
        weight = constants[number, 1].astype("float64")
        units[number] = _Unit(layer.filters.unpack(weight), bias, None)
    observed = [n for n in found.layers if ops.OPERATORS[dataflow.op_name(found.bindings[n].value)].rows is not None]
    count = dict.fromkeys(observed, 0)
    data = [coupled[number].data for number in observed]
    for values in found.observe(found.functions[task], data, samples, _SAMPLES):
        for number, value in zip(observed, values, strict=True):
            rows = _rows(found, number, value, units[number].bias is not None)
            product = np.einsum("gri,grj->gij", rows, rows, optimize=True)
            unit = units[number]
            unit.moments = product if unit.moments is None else unit.moments + product
            count[number] += rows.shape[1]
    for number, times in count.items():
        moments = units[number].moments
        assert moments is not None
        trace = np.trace(moments, axis1=1, axis2=2) / (times * moments.shape[1])
        units[number].moments = moments / times + _RIDGE * trace.reshape(-1, 1, 1) * np.eye(moments.shape[1])
    return units


def _rows(found: Beginnings, number: int, value: np.ndarray, biased: bool) -> np.ndarray:
    call = found.bindings[number].value
    operator = ops.of(call)
    assert operator is not None and operator.rows is not None
    layer, shape = ops.layer(call), static_shape(call)
    assert layer is not None
    rows = operator.rows(call, value, np.arange(prod(shape) // shape[layer.result])).astype("float64")
    return np.concatenate([rows, np.ones((*rows.shape[:2], 1))], axis=2) if biased else rows


class _Zipper:
    """Pairs units, and says what becomes of them."""

    def __init__(self, found: Beginnings, layers: dict[str, dict[int, _Unit]]) -> None:
        self.found, self.layers = found, layers
        self.matching = Matching(found)
        self.first, *self.others = found.functions

    def match(self) -> None:
        """Pair the units of all groups, with the first network's as the trunk's."""
        for task in self.others:
            for _ in range(_ROUNDS):
                changed = [self._match(task, group) for group in range(len(self.matching.groups))]
                if not any(changed):
                    break

    def _match(self, task: str, group: int) -> bool:
        """Pair the units of a group; tell whether any pair is a new one."""
        from scipy.optimize import linear_sum_assignment  # late: it takes a while

        size = len(self.matching.groups[group])
        cost = np.zeros((size, size))
        for number in self.found.layers:
            layer = self._coupled(number)
            parts = self.matching.parts(layer.outputs)
            known = self.matching.parts(layer.inputs).keys() <= self.matching.merges[task].keys()
            if layer.has_own_channels and group in parts and known:
                cost += self._cost(task, number, parts[group])
        rows, columns = linear_sum_assignment(cost)
        merge = np.zeros((size, size))
        merge[rows, columns] = 1
        before = self.matching.merges[task].get(group)
        self.matching.merges[task][group] = merge
        return before is None or not np.array_equal(before, merge)

    def _cost(self, task: str, number: int, places: np.ndarray) -> np.ndarray:
        """Return what is lost if units of the first network (rows) and a task's (columns) become one."""
        own, other = self.layers[self.first][number], self._over_inputs(task, number)
        size = places.shape[1]
        cost = np.zeros((size, size))
        outputs = own.filters.shape[1]
        for each in places:
            (group,) = np.unique(each // outputs)
            a, b = (unit.rows()[group, each % outputs] for unit in (own, other))
            depth = a.shape[1]
            left, right = (np.eye(depth) if u.moments is None else u.moments[group] for u in (own, other))
            both = left @ np.linalg.solve(left + right, right)
            cost += np.sum((a @ both) * a, 1)[:, None] + np.sum((b @ both) * b, 1) - 2 * a @ both @ b.T
        return cost / 2

    def _over_inputs(self, task: str, number: int) -> _Unit:
        """Return a task's layer with the trunk's inputs, its outputs as they are."""
        unit, layer = self.layers[task][number], self._coupled(number)
        groups, _, inputs = unit.filters.shape[:3]
        order = np.argmax(self.matching.merge(task, layer.inputs), axis=1)
        if not layer.has_own_channels:
            moments = None if unit.moments is None else unit.moments[order]
            bias = None if unit.bias is None else unit.bias.reshape(groups, -1)[order].ravel()
            return _Unit(unit.filters[order], bias, moments)
        order = order[:inputs]
        taps = int(np.prod(unit.filters.shape[3:]))
        places = (order[:, None] * taps + np.arange(taps)).ravel()
        if unit.bias is not None:
            places = np.append(places, len(places))
        moments = None if unit.moments is None else unit.moments[:, places][:, :, places]
        return _Unit(unit.filters[:, :, order], unit.bias, moments)

    def _aligned(self, task: str, number: int) -> _Unit:
        """Return a task's layer with the trunk's inputs and outputs."""
        unit, layer = self._over_inputs(task, number), self._coupled(number)
        if not layer.has_own_channels:
            return unit
        outputs = unit.filters.shape[1]
        order = np.argmax(self.matching.merge(task, layer.outputs), axis=1)
        bias = None if unit.bias is None else unit.bias[order]
        return _Unit(unit.filters[:, order[:outputs]], bias, unit.moments)

    def constants(self) -> dict[tuple[int, int], np.ndarray]:
        """Return the trunk's constants."""
        tasks = [self.first, *self.others]
        values = {task: self.found.constants(task) for task in tasks}
        weights = {(number, 1) for number in self.found.layers}
        result = {
            place: self.matching.mean(place, {task: values[task][place] for task in tasks})
            for place in values[self.first].keys() - weights
        }
        for number in self.found.layers:
            units = [self._aligned(task, number) for task in tasks]
            rows = _common(units)
            layer, filters = self._coupled(number), units[0].filters
            if units[0].bias is not None:
                bias = self.found.biases[number]
                result[bias] = rows[:, :, -1].reshape(result[bias].shape)
                rows = rows[:, :, :-1]
            result[number, 1] = layer.filters.pack(rows.reshape(filters.shape))
        return result

    def _coupled(self, number: int) -> CoupledLayer:
        return self.found.coupling.layers[self.found.bindings[number].var]


def _common(units: list[_Unit]) -> np.ndarray:
    """Return the weights of the units that lose least, ``[groups, outputs, depth]``."""
    rows = [unit.rows() for unit in units]
    moments = [unit.moments for unit in units if unit.moments is not None]
    mean = same_or_mean(rows)
    if len(moments) < len(units) or mean is rows[0]:
        return mean
    both = np.sum(moments, axis=0)
    wanted = np.sum([each @ row.swapaxes(1, 2) for each, row in zip(moments, rows, strict=True)], axis=0)
    return np.linalg.solve(both, wanted).swapaxes(1, 2)
