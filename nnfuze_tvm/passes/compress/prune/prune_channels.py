"""Structured pruning: whole channels leave the network, and the network becomes smaller."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate, ir, ops
from nnfuze_tvm.graph.channels import CoupledLayer, Labels, Removal
from nnfuze_tvm.graph.dataflow import Emitter, Value, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.passes.compress.calibration import load_calibration, observed
from nnfuze_tvm.passes.compress.method import GIVEN, Inputs, Method, Option, PolicyField
from nnfuze_tvm.passes.compress.prune.budget import Budget, within
from nnfuze_tvm.passes.compress.prune.channel_groups import ChannelGroup, CoupledFunction
from nnfuze_tvm.passes.compress.prune.elimination import Elimination, eliminations
from nnfuze_tvm.passes.compress.repair import Compressed, repaired

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

Calibration = str | os.PathLike[str] | Mapping[str, np.ndarray]
Criterion = Literal["l1", "l2", "activation", "repair"]

_BY_SAMPLES = ("activation", "repair")
# The mean magnitude of an activation settles after a few samples, and here they cost whole inferences.
_MOST_BATCHES = 32


@module_pass(opt_level=0, name="PruneChannels")
class PruneChannels:
    """Remove the least important channels of every group of coupled channels.

    For every group of ``n`` channels (see :mod:`nnfuze_tvm.passes.compress.prune.channel_groups`; of a grouped
    convolution, n is the number in one of its groups, which all keep the same places) ``max(1, round(keep * n))`` stay.
    Where coupled layers ask for different ``keep``, the largest wins, so no layer loses more than its policy
    allows. A depthwise convolution has no channels of its own and is asked only if the policy names it.
    Network inputs and task outputs stay whole.

    Parameters
    ----------
    policy : Policy
        How much of each layer stays.
    criterion : {"l1", "l2", "activation", "repair"}, optional
        How important a channel is; by default ``repair`` with calibration data, and ``l2`` without. Scores are divided
        by the layer's mean before they are added up over the layers of a group; among equals the first channels stay.

        ``l1``, ``l2``
            Norm of the filters that make the channel, after Li et al., "Pruning Filters for Efficient
            ConvNets", ICLR 2017.
        ``activation``
            ``mean |x_c| * sum |W[:, c]|`` over the layers that read the channel: an upper bound of how much
            their results change, on average over the calibration data, when it goes. It is the weight times
            activation of Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language
            Models", ICLR 2024), per channel instead of per weight.
        ``repair``
            How much the layers that read the channel would lose if they were fitted anew without it; see
            :mod:`nnfuze_tvm.passes.compress.prune.elimination`.
    calibration : path of an ``.npz`` file, mapping of input name to ``[N, ...]``, or None
        Needed by ``activation``, of which at most 32 batches are used, and ``repair``.
    executor : callable
        Runs the float network for these; by default with NumPy.
    budget : Budget, optional
        What of the whole network may be left: groups of whose layers the policy states nothing then keep as many
        channels as that allows, by what the criterion ``repair`` says is lost.
    repair : bool
        Fit what is left to the calibration data, if there is any, see :mod:`nnfuze_tvm.passes.compress.repair`.
    announce : callable
        Is told how far the repair is.

    Raises
    ------
    InputError
        If the criterion is unknown or calibration data is missing or does not fit.
    PolicyError
        If the policy names a layer that the module does not have.
    """

    def __init__(
        self,
        policy: Policy,
        criterion: Criterion | None = None,
        calibration: Calibration | None = None,
        executor: Executor = evaluate.executor,
        *,
        budget: Budget | None = None,
        repair: bool = True,
        announce: Callable[[str], None] = lambda _: None,
    ) -> None:
        if criterion is None:
            criterion = "l2" if calibration is None else "repair"
        if criterion not in get_args(Criterion):
            raise InputError(f"pruning criterion {criterion!r}: there are l1, l2, activation and repair")
        if criterion in _BY_SAMPLES and calibration is None:
            raise InputError(f"pruning criterion {criterion!r} needs calibration data")
        if budget is not None and criterion != "repair":
            raise InputError(f"pruning criterion {criterion!r}: a budget for the whole network goes with repair only")
        self.policy = policy
        self.criterion = criterion
        self.calibration = calibration
        self.executor = executor
        self.budget, self.repair, self.announce = budget, repair, announce

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the channels removed; the module itself if none is."""
        functions = [(g, f) for g, f in mod.functions_items() if isinstance(f, relax.Function)]
        couplings = [(gvar, CoupledFunction(func)) for gvar, func in functions]
        names = [b.var.name for _, coupling in couplings for b in coupling.bindings if ops.is_layer(b.value)]
        lineage = ir.lineage(mod)
        self.policy.validate_layers(names, lineage)
        pruned: list[tuple[tvm.ir.GlobalVar, relax.Function]] = []
        for gvar, coupling in couplings:
            groups = coupling.groups()
            counts = [kept_channels(self.policy, group, lineage) for group in groups]
            orders: list[Elimination] = []
            if self.criterion == "repair" and (self.budget or any(map(_shrinks, groups, counts))):
                self.announce("pruning: looking for channels that others can stand in for")
                assert self.calibration is not None
                orders = eliminations(mod, coupling, load_calibration(self.calibration, mod), self.executor)
            if self.budget:
                counts = self._within_budget(coupling, groups, orders, counts, lineage)
            if any(map(_shrinks, groups, counts)):
                scores = _ranks(orders, coupling) if orders else self._scores(coupling, mod)
                shrinking = zip(groups, counts, strict=True)
                dropped = [worst(group.classes, scores, count) for group, count in shrinking]
                removed = remove(coupling, np.concatenate(dropped))
                pruned.append((gvar, self._repaired(mod, removed)))
        if not pruned:
            return mod
        mod = mod.clone()
        for gvar, func in pruned:
            mod.update_func(gvar, func)
        return mod

    def _repaired(self, mod: tvm.IRModule, removed: Compressed) -> relax.Function:
        if self.calibration is None or not self.repair:
            return removed.after
        return repaired(mod, removed, load_calibration(self.calibration, mod), self.announce)

    def _within_budget(
        self,
        coupling: CoupledFunction,
        groups: list[ChannelGroup],
        orders: list[Elimination],
        most: list[int],
        lineage: ir.Lineage,
    ) -> list[int]:
        """Return how many channels of each group stay, so that the budget is kept; of what is stated, as many."""
        assert self.budget is not None
        free = [not any(self.policy.states(name, "keep", lineage) for name in group.names) for group in groups]
        errors = [order.errors for order in orders]

        def bits(name: str) -> int:
            return int(self.policy.for_layer(name, lineage).weights)

        return within(self.budget, coupling, groups, errors, most, free, bits)

    def _scores(self, coupling: CoupledFunction, mod: tvm.IRModule) -> np.ndarray:
        """Return the importance of every class of channels, by its representative."""
        roots = coupling.channels.roots()
        scores = np.zeros(len(roots))
        activations: dict[str, np.ndarray] = {}
        if self.criterion == "activation":
            assert self.calibration is not None
            activations = mean_magnitudes(mod, coupling, load_calibration(self.calibration, mod), self.executor)
        for layer in coupling.layers.values():
            if self.criterion == "activation":
                if layer.name not in activations:
                    continue
                labels, values = layer.inputs, activations[layer.name] * input_norms(layer)
            else:
                labels, values = layer.outputs, output_norms(layer, self.criterion)
            mean = values.mean()
            if mean > 0:
                np.add.at(scores, roots[labels], values / mean)
        return scores


def kept_channels(policy: Policy, group: ChannelGroup, lineage: ir.Lineage) -> int:
    """Return how many channels of a group stay, as a policy says."""
    asked = [
        policy.for_layer(layer.name, lineage).keep
        for layer in group.layers
        if layer.has_own_channels or policy.states(layer.name, "keep", lineage)
    ]
    return max(1, round(max(asked) * len(group.classes)))


def _shrinks(group: ChannelGroup, count: int) -> bool:
    return count < len(group.classes)


def _ranks(orders: list[Elimination], coupling: CoupledFunction) -> np.ndarray:
    """Return for every class of channels how many of its group go before it."""
    ranks = np.zeros(len(coupling.channels.roots()))
    for each in orders:
        ranks[each.order] = np.arange(len(each.order))
    return ranks


def worst(classes: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """Return all of ``classes`` but the ``keep`` best; among equals the first are better."""
    return classes[np.argsort(-scores[classes], kind="stable")[keep:]]


def output_norms(layer: CoupledLayer, order: str) -> np.ndarray:
    """Return the norm of the filter of each output channel of ``layer``."""
    filters = np.abs(layer.filters.unpack(layer.weight).astype("float64"))
    kernel = tuple(range(2, filters.ndim))
    return (filters.sum(kernel) if order == "l1" else np.sqrt(np.square(filters).sum(kernel))).ravel()


def input_norms(layer: CoupledLayer) -> np.ndarray:
    """Return the l1 norm of the weights that each input channel of ``layer`` meets."""
    filters = np.abs(layer.filters.unpack(layer.weight).astype("float64"))
    return filters.sum((1, *range(3, filters.ndim))).ravel()


def mean_magnitudes(
    mod: tvm.IRModule,
    coupling: CoupledFunction,
    samples: Mapping[str, np.ndarray],
    executor: Executor = evaluate.executor,
) -> dict[str, np.ndarray]:
    """Return ``mean |x|`` per channel of what layers of a function of ``mod`` read that mix removable channels.

    Raises
    ------
    InputError
        If the samples make the network produce NaN or infinity.
    """
    layers = [layer for layer in coupling.layers.values() if layer.inputs.any() and layer.has_own_channels]
    emitter = Emitter()
    done: dict[Value, Value] = {}
    for binding in coupling.bindings:
        done[binding.var] = emitter.emit(substitute(binding.value, done), binding.var.name)
    means = []
    for layer in layers:
        others = [axis for axis in range(len(coupling.tensor(layer.data))) if axis != layer.axis]
        magnitude = emitter.emit(relax.op.abs(done[layer.data]))
        means.append(emitter.emit(relax.op.mean(magnitude, others) if others else magnitude))
    func = emitter.finish(coupling.func.params, means)
    totals = [np.zeros(len(layer.inputs)) for layer in layers]
    used = 0
    for found in observed(mod, func, samples, executor, _MOST_BATCHES):
        totals = [total + values for total, values in zip(totals, found, strict=True)]
        used += 1
    return {layer.name: total / used for layer, total in zip(layers, totals, strict=True)}


def remove(coupling: CoupledFunction, dropped: np.ndarray) -> Compressed:
    """Return the function without the channels of the classes ``dropped``, and what it was."""
    removal = Removal(coupling, ~np.isin(coupling.channels.roots(), dropped))
    emitter = Emitter()
    done: dict[Value, Value] = {}

    def read(value: Value) -> Value:
        """Return an operand in terms of the new Vars; a tuple is made anew, because its type changes."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([read(each) for each in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(read(value.tuple_value), value.index)
        return done.get(value, value)

    for param in coupling.func.params:
        emitter.unique(param.name)
    for binding in coupling.bindings:
        var, value = binding.var, binding.value
        if not isinstance(value, Call):
            new = read(value)
        else:
            args = [read(arg) for arg in value.args]
            operator = ops.of(value)
            cut = None if operator is None else operator.cut
            new = Call(value.op, args, value.attrs, value.ty_args) if cut is None else cut(removal, var, value, args)
        done[var] = emitter.emit(new, var.name)
        if not _agrees(removal, coupling.labels[var], done[var].ty):
            # The network would compute something else.
            raise AssertionError(f"pruned {var.name!r} has type {done[var].ty}")
    outputs = [read(out) for out in coupling.outputs]
    after = emitter.finish(coupling.func.params, outputs, coupling.func.attrs)
    same = {new.name: old for old, new in done.items() if isinstance(new, tvm.ir.Var)}
    return Compressed(coupling.func, after, same, partial(_left, removal))


def _left(removal: Removal, var: Value, value: np.ndarray) -> np.ndarray:
    """Return what is left of a tensor's value."""
    for axis, labels in enumerate(removal.coupling.tensor(var)):
        stays = removal.stays[labels]
        value = value if stays.all() else value.compress(stays, axis)
    return value


def _agrees(removal: Removal, labels: Labels | tuple, ty: tvm.ir.Type) -> bool:
    """Tell whether what was rewritten has the shape that the labels promise."""
    if isinstance(labels, tuple):
        return all(_agrees(removal, each, field) for each, field in zip(labels, ty.fields, strict=True))
    return not labels or [int(size) for size in ty.shape.values] == removal.sizes(labels)


_FRACTION = Annotated[float, Field(gt=0, le=1)]
_CRITERION = Option(
    name="criterion",
    type=Criterion,
    default=None,
    help="Which channels go first: l1, l2, activation or repair; with samples repair, else l2.",
    samples=_BY_SAMPLES,
)
_BUDGETS = tuple(
    Option(
        name=name,
        type=Annotated[_FRACTION, Field(allow_inf_nan=False)],
        default=None,
        help=f"Fraction of the {what} that may be left; which layers shrink is found out.",
        samples=GIVEN,
    )
    for name, what in (("macs", "multiply-accumulates"), ("bytes", "layers' bytes in float32"))
)


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    macs, bytes_ = map(inputs.value, _BUDGETS)
    budget = None if macs is None and bytes_ is None else Budget(macs, bytes_)
    criterion = inputs.value(_CRITERION)
    make = partial(PruneChannels, budget=budget, announce=inputs.announce)
    return [make(inputs.policy, criterion, inputs.samples, inputs.executor)]


METHOD = Method(
    name="pruned",
    activity="pruning",
    passes=_passes,
    wants=lambda layer: layer.keep < 1,
    fields=(
        PolicyField(
            name="keep",
            type=Annotated[_FRACTION, Field(strict=True, allow_inf_nan=False)],
            default=1.0,
            help="fraction of the layer's output channels that stays",
        ),
    ),
    options=(
        Option(
            name="prune",
            type=_FRACTION,
            default=None,
            help="Fraction of the channels to keep, for example 0.75.",
            sets=lambda keep: {"keep": keep},
        ),
        _CRITERION,
        *_BUDGETS,
    ),
    starts=tuple(option.name for option in _BUDGETS),
)
