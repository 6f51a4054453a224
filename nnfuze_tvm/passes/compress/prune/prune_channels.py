"""Structured pruning: whole channels leave the network, and the network becomes smaller."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from itertools import islice
from typing import TYPE_CHECKING, Annotated, Literal, get_args

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, op_name, substitute
from nnfuze_tvm.passes.compress.calibration import Executor, batches, load_calibration, prepare
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, PolicyField
from nnfuze_tvm.passes.compress.prune.channel_groups import ChannelGroup, Coupling, Labels, Layer
from nnfuze_tvm.passes.compress.prune.channel_rules import CONVOLUTIONS, ELEMENTWISE, slices

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

Calibration = str | os.PathLike[str] | Mapping[str, np.ndarray]
Criterion = Literal["l1", "l2", "activation"]

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
    criterion : {"l1", "l2", "activation"}
        How important a channel is. Scores are divided by the layer's mean before they are added up over the
        layers of a group; among equals the first channels stay.

        ``l1``, ``l2``
            Norm of the filters that make the channel, after Li et al., "Pruning Filters for Efficient
            ConvNets", ICLR 2017.
        ``activation``
            ``mean |x_c| * sum |W[:, c]|`` over the layers that read the channel: an upper bound of how much
            their results change, on average over the calibration data, when it goes. It is the weight times
            activation of Wanda (Sun et al., "A Simple and Effective Pruning Approach for Large Language
            Models", ICLR 2024), per channel instead of per weight.
    calibration : path of an ``.npz`` file, mapping of input name to ``[N, ...]``, or None
        Needed by ``activation``; at most 32 batches are used.
    executor : callable, optional
        Runs the float network for ``activation``; see :func:`nnfuze_tvm.passes.compress.calibration.prepare`.

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
        criterion: Criterion = "l1",
        calibration: Calibration | None = None,
        executor: Executor | None = None,
    ) -> None:
        if criterion not in get_args(Criterion):
            raise InputError(f"pruning criterion {criterion!r}: there are l1, l2 and activation")
        if criterion == "activation" and calibration is None:
            raise InputError("pruning criterion 'activation' needs calibration data")
        self.policy = policy
        self.criterion = criterion
        self.calibration = calibration
        self.executor = executor

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the channels removed; the module itself if none is."""
        functions = [(g, f) for g, f in mod.functions_items() if isinstance(f, relax.Function)]
        couplings = [(gvar, Coupling(func)) for gvar, func in functions]
        names = [
            b.var.name
            for _, coupling in couplings
            for b in coupling.bindings
            if op_name(b.value) in CONVOLUTIONS or op_name(b.value) == "matmul"
        ]
        lineage = ir.lineage(mod)
        self.policy.validate_layers(names, lineage)
        pruned: list[tuple[tvm.ir.GlobalVar, relax.Function]] = []
        for gvar, coupling in couplings:
            wanted = [(group, self._count(group, lineage)) for group in coupling.groups()]
            shrinking = [(group, count) for group, count in wanted if count < len(group.classes)]
            if shrinking:
                scores = self._scores(coupling, mod)
                dropped = [worst(group.classes, scores, count) for group, count in shrinking]
                pruned.append((gvar, remove(coupling, np.concatenate(dropped))))
        if not pruned:
            return mod
        mod = mod.clone()
        for gvar, func in pruned:
            mod.update_func(gvar, func)
        return mod

    def _count(self, group: ChannelGroup, lineage: ir.Lineage) -> int:
        """Return how many channels of a group stay."""
        asked = [
            self.policy.for_layer(layer.name, lineage).keep
            for layer in group.layers
            if layer.has_own_channels or self.policy.states(layer.name, "keep", lineage)
        ]
        return max(1, round(max(asked) * len(group.classes)))

    def _scores(self, coupling: Coupling, mod: tvm.IRModule) -> np.ndarray:
        """Return the importance of every class of channels, by its representative."""
        roots = coupling.channels.roots()
        scores = np.zeros(len(roots))
        activations: dict[str, np.ndarray] = {}
        if self.criterion == "activation":
            assert self.calibration is not None
            activations = mean_magnitudes(coupling, load_calibration(self.calibration, mod), self.executor)
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


def worst(classes: np.ndarray, scores: np.ndarray, keep: int) -> np.ndarray:
    """Return all of ``classes`` but the ``keep`` best; among equals the first are better."""
    return classes[np.argsort(-scores[classes], kind="stable")[keep:]]


def output_norms(layer: Layer, order: str) -> np.ndarray:
    """Return the norm of the filter of each output channel of ``layer``."""
    filters = np.abs(layer.filters.unpack(layer.weight).astype("float64"))
    kernel = tuple(range(2, filters.ndim))
    return (filters.sum(kernel) if order == "l1" else np.sqrt(np.square(filters).sum(kernel))).ravel()


def input_norms(layer: Layer) -> np.ndarray:
    """Return the l1 norm of the weights that each input channel of ``layer`` meets."""
    filters = np.abs(layer.filters.unpack(layer.weight).astype("float64"))
    return filters.sum((1, *range(3, filters.ndim))).ravel()


def mean_magnitudes(
    coupling: Coupling, samples: Mapping[str, np.ndarray], executor: Executor | None = None
) -> dict[str, np.ndarray]:
    """Return ``mean |x|`` per channel of what each layer reads, for layers that mix removable channels.

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
    observed = []
    for layer in layers:
        others = [axis for axis in range(len(coupling.tensor(layer.data))) if axis != layer.axis]
        magnitude = emitter.emit(relax.op.abs(done[layer.data]))
        observed.append(emitter.emit(relax.op.mean(magnitude, others) if others else magnitude))
    main = emitter.finish(coupling.func.params, observed).with_attr("global_symbol", "main")
    run = prepare(tvm.IRModule({"main": main}), executor)
    totals = [np.zeros(len(layer.inputs)) for layer in layers]
    used = 0
    for batch in islice(batches(samples, coupling.func), _MOST_BATCHES):
        totals = [total + values for total, values in zip(totals, run(batch), strict=True)]
        used += 1
    if not all(np.isfinite(total).all() for total in totals):
        raise InputError("calibration data: the network makes NaN or infinity of it")
    return {layer.name: total / used for layer, total in zip(layers, totals, strict=True)}


def remove(coupling: Coupling, dropped: np.ndarray) -> relax.Function:
    """Return the function without the channels of the classes ``dropped``."""
    return _Remover(coupling, dropped).rewrite()


class _Remover:
    """Writes a function anew with smaller constants."""

    def __init__(self, coupling: Coupling, dropped: np.ndarray) -> None:
        self.coupling = coupling
        self.stays = ~np.isin(coupling.channels.roots(), dropped)
        self.done: dict[Value, Value] = {}
        self.rules: dict[str, Callable[[tvm.ir.Var, Call, list[Value]], Value]] = {
            **dict.fromkeys(ELEMENTWISE, self._broadcast),
            **dict.fromkeys(CONVOLUTIONS, self._convolution),
            "matmul": self._matmul,
            "nn.batch_norm": self._per_channel,
            "nn.instance_norm": self._per_channel,
            "nn.prelu": self._per_channel,
            "reshape": self._reshape,
            "split": self._split,
            "strided_slice": self._slice,
        }

    def rewrite(self) -> relax.Function:
        """Return the smaller function."""
        emitter = Emitter()
        func = self.coupling.func
        for param in func.params:
            emitter.unique(param.name)
        for binding in self.coupling.bindings:
            var, value = binding.var, binding.value
            if not isinstance(value, Call):
                new = self._read(value)
            else:
                args = [self._read(arg) for arg in value.args]
                rule = self.rules.get(op_name(value))
                new = Call(value.op, args, value.attrs, value.ty_args) if rule is None else rule(var, value, args)
            self.done[var] = emitter.emit(new, var.name)
            self._check(var)
        return emitter.finish(func.params, [self._read(out) for out in self.coupling.outputs], func.attrs)

    def _read(self, value: Value) -> Value:
        """Return an operand in terms of the new Vars; a tuple is made anew, because its type changes."""
        if isinstance(value, relax.Tuple):
            return relax.Tuple([self._read(each) for each in value.fields])
        if isinstance(value, relax.TupleGetItem):
            return relax.TupleGetItem(self._read(value.tuple_value), value.index)
        return self.done.get(value, value)

    def _check(self, var: tvm.ir.Var) -> None:
        """Stop if analysis and rewriting disagree: the network would compute something else."""

        def agrees(labels: Labels | tuple, ty: tvm.ir.Type) -> bool:
            if isinstance(labels, tuple):
                return all(agrees(each, field) for each, field in zip(labels, ty.fields, strict=True))
            if not labels:
                return True
            return [int(size) for size in ty.shape.values] == self._sizes(labels)

        if not agrees(self.coupling.labels[var], self.done[var].ty):
            raise AssertionError(f"pruned {var.name!r} has type {self.done[var].ty}")

    def _sizes(self, labels: Labels) -> list[int]:
        return [int(self.stays[axis].sum()) for axis in labels]

    def _cut(self, value: GenericConst, labels: Labels) -> GenericConst:
        """Return a constant that is broadcast against a tensor with these ``labels``, without what goes."""
        old = array(value)
        new = old
        for axis in range(old.ndim):
            stays = self.stays[labels[axis - old.ndim]]
            if old.shape[axis] != 1 and not stays.all():
                new = new.compress(stays, axis)
        return value if new is old else constant(new)

    def _broadcast(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        labels = self.coupling.tensor(var)
        cut = [self._cut(arg, labels) if isinstance(arg, GenericConst) else arg for arg in args]
        return Call(call.op, cut, call.attrs, call.ty_args)

    def _per_channel(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        attrs = call.attrs
        axis = attrs.channel_axis if op_name(call) == "nn.instance_norm" else attrs.axis
        labels = self.coupling.tensor(call.args[0])[int(axis)]
        return Call(call.op, [args[0], *(self._cut(arg, [labels]) for arg in args[1:])], attrs, call.ty_args)

    def _matmul(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        layer = self.coupling.layers.get(var)
        if layer is not None:
            args = [args[0], self._cut(args[1], [layer.inputs, layer.outputs])]
        return Call(call.op, args, call.attrs, call.ty_args)

    def _convolution(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        layer = self.coupling.layers.get(var)
        if layer is None:
            return Call(call.op, args, call.attrs, call.ty_args)
        groups = layer.filters.groups
        inputs, outputs = (self.stays[each].reshape(groups, -1) for each in (layer.inputs, layer.outputs))
        if inputs.all() and outputs.all():
            return Call(call.op, args, call.attrs, call.ty_args)
        # Either whole groups go (depthwise), or every group keeps the same places.
        rows = inputs.any(axis=1)
        filters = layer.filters.unpack(layer.weight)[rows][:, outputs[rows][0]][:, :, inputs[rows][0]]
        args = [args[0], constant(layer.filters.pack(filters))]
        if rows.all():
            return Call(call.op, args, call.attrs, call.ty_args)
        names = ["strides", "padding", "dilation", "data_layout", "kernel_layout", "out_layout", "out_dtype"]
        if layer.filters.transposed:
            names.append("output_padding")
        attrs = {name: getattr(call.attrs, name) for name in names}
        function = getattr(relax.op.nn, op_name(call).removeprefix("nn."))
        return function(*args, groups=int(rows.sum()), **attrs)

    def _reshape(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        return relax.op.reshape(args[0], self._sizes(self.coupling.tensor(var)))

    def _split(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        axis = int(call.attrs.axis)
        pieces = self.coupling.labels[var]
        sizes = [int(self.stays[piece[axis]].sum()) for piece in pieces]
        return relax.op.split(args[0], np.cumsum(sizes)[:-1].tolist(), axis)

    def _slice(self, var: tvm.ir.Var, call: Call, args: list[Value]) -> Value:
        source = self.coupling.tensor(call.args[0])
        cuts = slices(call, len(source))
        if cuts is None or all(self.stays[labels].all() for labels in source):
            return Call(call.op, args, call.attrs, call.ty_args)
        new: list[tuple[int, slice]] = []
        for axis, cut in cuts.items():
            stays = self.stays[source[axis]]
            if not stays.all():
                first, last, _ = cut.indices(len(stays))
                cut = slice(int(stays[:first].sum()), int(stays[:last].sum()), 1)
            new.append((axis, cut))
        return relax.op.strided_slice(
            args[0],
            [axis for axis, _ in new],
            [cut.start for _, cut in new],
            [cut.stop for _, cut in new],
            [cut.step for _, cut in new],
            bool(call.attrs.assume_inbound),
        )


_FRACTION = Annotated[float, Field(gt=0, le=1)]
_CRITERION = Option(
    name="criterion",
    type=Criterion,
    default="l2",
    help="Which channels go first: l1, l2 or activation.",
    samples=("activation",),
)


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    return [PruneChannels(inputs.policy, inputs.value(_CRITERION), inputs.samples, inputs.executor)]


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
    ),
)
