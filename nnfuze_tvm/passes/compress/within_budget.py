"""Fewer bits for as much as a budget of accuracy allows: which layers must stay float is found on the samples."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import bindings, with_main
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.remembered import Remembered
from nnfuze_tvm.passes.compress.calibration import batches, load_calibration, spread
from nnfuze_tvm.passes.compress.error import error_bound
from nnfuze_tvm.passes.compress.method import FLOAT32, Precision
from nnfuze_tvm.passes.compress.stored_weights import with_constants

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

CHOICE_ATTR = "nnfuze.choice"
# Errors are measured on so many inferences, on fewer where that would be more operators in all, down to so many; or
# more multiply-accumulates, or where the float network's tensors would take more memory.
_SAMPLES, _CALLS, _LEAST, _MACS, _BYTES = 64, 100_000, 8, 1.5e12, 1 << 29
# Of so many samples, every other one is kept from the quantizer while errors are measured on it.
_HALVED = 8
# About so often the whole network is computed to find out what may have fewer bits.
_TRIALS = 12
# What an element that a layer reads or makes costs more in float, in multiply-accumulates.
_MOVED = 8
# So many layers get fewer bits again, if the budget allows it: those first that cost the most.
_RETURNED = 8


@dataclass
class Choice:
    """Which layers stay float so that a network's outputs are within a budget.

    Attributes
    ----------
    max_error : float
        The budget.
    samples : int
        How many inferences errors were measured on.
    before, after : dict of str to float
        The error of each output (``task:output``) where no layer stays float for the budget, and as chosen, on samples
        that the quantizer has not seen if there are enough; see `error.error_bound`.
    layers : dict of str to float
        The layers that stay float, each with the largest error that its bits alone make of an output.
    policy : dict
        The choice as a policy: it gives the same network without searching again.
    """

    max_error: float
    samples: int
    before: dict[str, float]
    after: dict[str, float]
    layers: dict[str, float] = field(default_factory=dict)
    policy: dict[str, Any] = field(default_factory=dict)


def choice_of(mod: tvm.IRModule) -> Choice | None:
    """Return what was chosen for a module; None if nothing was."""
    attrs = mod.attrs
    return Choice(**json.loads(str(attrs[CHOICE_ATTR]))) if attrs is not None and CHOICE_ATTR in attrs else None


@module_pass(opt_level=0, name="QuantizeWithin")
class QuantizeWithin:
    """Quantize, but leave layers in float32 until the outputs are within a budget.

    Each layer is quantized alone to see what that makes of the outputs. Layers are then left in float32 in the order of
    their squared errors (which add up where errors are independent) over what float costs there, as few as the budget
    allows; and those that cost the most are tried with fewer bits again. Layers of which the policy itself says what
    they compute in stay as it says. Equal samples give an equal choice, which an attribute tells (`choice_of`).

    Errors are those on samples that the quantizer has not seen, if there are enough: on its own ones they are smaller,
    as nothing is out of range there. The result is quantized with all of them.

    Parameters
    ----------
    quantizer : callable
        From samples, and whether biases are corrected, to what returns the pass that quantizes by them what a policy
        says. The many trials do without the correction, which takes longer than they do.
    policy : Policy
        Which layers may be quantized.
    precision : Precision
        What they are quantized to.
    calibration : mapping
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    max_error : float
        The largest error that any output may have, see `error.error_bound`.
    announce : callable
        Is told how far the search is.
    prepare : callable, optional
        Returns the pass that goes before the quantizer's where a policy holds: first for the search, where all may be
        quantized, then for what was chosen, so that the choice as a policy gives the same network.

    Raises
    ------
    InputError
        If the samples do not fit the network.
    """

    def __init__(
        self,
        quantizer: Callable[[Mapping[str, np.ndarray], bool], Callable[[Policy], tvm.transform.Pass]],
        policy: Policy,
        precision: Precision,
        calibration: Mapping[str, np.ndarray],
        max_error: float,
        announce: Callable[[str], None],
        prepare: Callable[[Policy], tvm.transform.Pass] | None = None,
    ) -> None:
        self.quantizer, self.policy, self.precision = quantizer, policy, precision
        self.calibration, self.max_error, self.announce = calibration, max_error, announce
        self.prepare = prepare or (lambda _: tvm.transform.Sequential([]))

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module quantized, with a note of the choice."""
        prepared = self.prepare(self.policy)(mod)
        search = _Search(prepared, self)
        kept = search.chosen()
        policy = search.leaving(kept)
        if kept:
            prepared = self.prepare(policy)(mod)
        result = self.quantizer(self.calibration, True)(policy)(prepared)
        choice = Choice(
            max_error=self.max_error,
            samples=len(search.inputs),
            before=search.before,
            after=search.corrected(policy, prepared) if kept else search.before,
            layers={name: search.alone[unit] for unit in search.units if unit in kept for name in search.units[unit]},
            policy={"default": policy.default, "layers": policy.layers},
        )
        reasons = ir.float_layers(result)
        for name, error in choice.layers.items():
            reasons[name] = f"its {self.precision.weights} bits alone make an error of {error:.2g} in the outputs"
        noted = ir.with_float_layers(result, reasons) if reasons else result
        return noted.with_attr(CHOICE_ATTR, json.dumps(asdict(choice)))


class _Search:
    """Looks for the layers that must stay float.

    Attributes
    ----------
    units : dict of str to list of str
        The layers that may get fewer bits, by the name that a policy calls them; a pass may have made several of one.
    before : dict of str to float
        The error of each output where all of them get fewer bits.
    alone : dict of str to float
        The largest error of an output where only one of them does.
    """

    def __init__(self, mod: tvm.IRModule, asked: QuantizeWithin) -> None:
        self.asked, self.lineage = asked, ir.lineage(mod)
        seen, held = _halves(load_calibration(asked.calibration, mod), mod)
        self.quantize, self.quickly = asked.quantizer(seen, True), asked.quantizer(seen, False)
        found = self.quantize(asked.policy)(mod)
        self.calls = {b.var.name: b.value for b in bindings(mod["main"]) if ops.is_layer(b.value)}
        self.units: dict[str, list[str]] = {}
        left = ir.float_layers(found)
        for name in self.calls:
            if name not in left and self._is_open(name):
                self.units.setdefault(self.lineage.names(name)[0], []).append(name)
        # Weights that a file stores in 8 bits are floats to the search, so that each trial sees the same function.
        main, _ = with_constants(mod["main"], {name for names in self.units.values() for name in names})
        self.mod = mod if main.same_as(mod["main"]) else with_main(mod, main)
        self.labels = [f"{output.task}:{output.name}" for output in ir.task_outputs(mod)]
        self.inputs = self._inputs(held)
        asked.announce("quantizing: computing the float network")
        self.float = Remembered(self.mod, self.inputs)
        self.before = self._of(found)
        self.alone: dict[str, float] = {}

    def chosen(self) -> list[str]:
        """Return the units that stay float."""
        budget = self.asked.max_error
        if _worst(self.before) <= budget:
            return []
        least = self._error(self.units)
        budget = max(budget, 1.1 * least)
        for n, unit in enumerate(self.units):
            if n % max(1, len(self.units) // 10) == 0:
                self.asked.announce(f"quantizing: layer {n + 1} of {len(self.units)} alone")
            self.alone[unit] = self._error(self.units.keys() - {unit})
        squares = {unit: max(0.0, error**2 - least**2) for unit, error in self.alone.items()}
        order = sorted(self.units, key=lambda unit: -squares[unit] / self._cost(unit))
        self.asked.announce("quantizing: looking for the fewest layers that must stay float")
        count = self._fewest(order, [squares[unit] for unit in order], budget)
        kept = order[:count]
        reached = self._error(kept)
        for unit in sorted(kept, key=lambda unit: -self._cost(unit))[:_RETURNED]:
            if reached**2 + squares[unit] <= budget**2:
                rest = [other for other in kept if other != unit]
                error = self._error(rest)
                if error <= budget:
                    kept, reached = rest, error
        spare = [unit for unit in order if unit not in kept]
        while spare and _worst(self.corrected(self.leaving(kept), self.mod)) > budget:
            kept = [*kept, spare.pop(0)]
        return kept

    def leaving(self, kept: Collection[str]) -> Policy:
        """Return the policy with some units in float32."""
        policy, layers = self.asked.policy, dict(self.asked.policy.layers)
        for unit in self.units:
            if unit in kept:
                layers[unit] = {**layers.get(unit, {}), "bits": FLOAT32.weights}
        return policy.parse({"default": policy.default, "layers": layers})

    def corrected(self, policy: Policy, mod: tvm.IRModule) -> dict[str, float]:
        """Return the error of each output of a module that is quantized as a policy says, biases corrected."""
        return self._of(self.quantize(policy)(mod))

    def _of(self, mod: tvm.IRModule) -> dict[str, float]:
        answers, exact = self.float.run(mod["main"]), self.float.outputs
        return {
            label: error_bound([row[n] for row in answers], [row[n] for row in exact])
            for n, label in enumerate(self.labels)
        }

    def _error(self, kept: Collection[str]) -> float:
        return _worst(self._of(self.quickly(self.leaving(kept))(self.mod)))

    def _is_open(self, name: str) -> bool:
        """Tell whether a layer gets fewer bits, and only because all do."""
        policy = self.asked.policy
        return (
            policy.for_layer(name, self.lineage).precision == self.asked.precision
            and not policy.states(name, "weights", self.lineage)
            and not policy.states(name, "activations", self.lineage)
        )

    def _fewest(self, order: list[str], squares: list[float], budget: float) -> int:
        """Return how many of the first units must stay float; that none is too few, and all are enough, is known."""
        low, high = 0, len(order)
        guess = next(n for n in range(len(order) + 1) if math.sqrt(sum(squares[n:])) <= budget)
        step = 1
        guess = min(max(guess, 1), max(high - 1, 1))
        while high - low > 1:
            if not low < guess < high:
                guess = (low + high) // 2
            if self._error(order[:guess]) <= budget:
                high, guess = guess, guess - step
            else:
                low, guess = guess, guess + step
            step *= 2
        return high

    def _cost(self, unit: str) -> float:
        """Return what a unit costs more in float, in multiply-accumulates."""
        return sum(ops.macs(self.calls[name]) + _MOVED * _elements(self.calls[name]) for name in self.units[unit])

    def _inputs(self, found: Sequence[dict[str, np.ndarray]]) -> list[dict[str, np.ndarray]]:
        """Return the inferences that errors are measured on, evenly spread over those that there are."""
        runs = _TRIALS + len(self.units) / 2
        macs = max(1, sum(map(ops.macs, self.calls.values())))
        made = [b.var for b in bindings(self.mod["main"]) if isinstance(b.var.ty, relax.TensorType)]
        size = 4 * sum(math.prod(static_shape(var)) for var in made)
        by_macs, by_calls = int(_MACS / (macs * runs)), max(_LEAST, int(_CALLS / (len(made) * runs)))
        count = max(1, min(len(found), _SAMPLES, by_macs, by_calls, _BYTES // max(1, size)))
        return spread(found, count)


def _halves(
    samples: Mapping[str, np.ndarray], mod: tvm.IRModule
) -> tuple[Mapping[str, np.ndarray], list[dict[str, np.ndarray]]]:
    """Return samples to quantize by, and inferences to measure errors on: all for both if they are few."""
    found = list(batches(samples, mod["main"].params))
    if len(found) < _HALVED:
        return samples, found
    seen = {name: np.concatenate([np.atleast_1d(each[name]) for each in found[::2]]) for name in samples}
    return seen, found[1::2]


def _worst(errors: Mapping[str, float]) -> float:
    return max(errors.values(), default=0.0)


def _elements(call: tvm.ir.Call) -> int:
    """Return how many elements a layer reads and makes."""
    return math.prod(static_shape(call)) + math.prod(static_shape(call.args[0]))
