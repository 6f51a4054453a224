"""The graphs of a compilation: networks as loaded, merged, and compressed method by method; none is lowered."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.bundle import unfit
from nnfuze_tvm.deploy.executor import calibration_executor
from nnfuze_tvm.deploy.manifest import describe_target
from nnfuze_tvm.devices.targets import llvm_features, resolve
from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.links import wire
from nnfuze_tvm.graph.wiring import Wiring
from nnfuze_tvm.jobs.announce import NOTE, Announce, note_threads, silent
from nnfuze_tvm.jobs.learnt_trunk import with_learnt_trunk
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.prune_channels import METHOD as PRUNED
from nnfuze_tvm.passes.compress.within_budget import Choice, choice_of

if TYPE_CHECKING:
    from nnfuze_tvm.jobs.finetuning import FineTuning


@dataclass(frozen=True)
class Graphs:
    """The graphs of a compilation, stage by stage.

    Attributes
    ----------
    loaded : tvm.IRModule
        One function per task.
    stages : dict of str to tvm.IRModule
        ``merged``, ``trunk learnt`` if there is one, and the name of every compression method that was asked for, in
        the order in which they follow; what was trained is called ``<method>, fine-tuned``.
    calibration : dict of str to numpy.ndarray, optional
        Samples by input.
    integer : collection of str
        The layers of the last stage whose weights were to be integers.
    wiring : Wiring
        How the networks hang together.
    """

    loaded: tvm.IRModule
    wiring: Wiring
    stages: Mapping[str, tvm.IRModule]
    calibration: Mapping[str, np.ndarray] | None = None
    integer: Collection[str] = ()

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order they were given."""
        return ir.tasks(self.loaded)

    @property
    def last(self) -> tvm.IRModule:
        """The graph of the last stage."""
        return list(self.stages.values())[-1]

    @property
    def in_floats(self) -> tuple[str, tvm.IRModule]:
        """The last stage before ``int8``, and its graph."""
        stages = list(self.stages.items())
        return stages[list(self.stages).index("int8") - 1]

    def but_floats(self) -> Graphs:
        """Return the graphs with one more stage, ``float32``: what was before ``int8``."""
        return replace(self, stages={**self.stages, "float32": self.in_floats[1]}, integer=())

    @property
    def choice(self) -> Choice | None:
        """Which layers stay float so that the outputs are within a budget, where that was asked for and not all do."""
        if "float32" in self.stages:
            return None
        return next((found for mod in self.stages.values() if (found := choice_of(mod)) is not None), None)

    def alone(self, task: str) -> tvm.IRModule:
        """Return the graph of one task, as if it were the only one."""
        outputs = [output for output in ir.task_outputs(self.loaded) if output.task == task]
        functions = {
            var: func
            for var, func in self.loaded.functions.items()
            if not isinstance(func, relax.Function) or var.name_hint == task
        }
        own = ir.with_task_outputs(tvm.IRModule(functions), outputs)
        return _run(pipeline.merge_phases(), ir.with_small_weights(own) if ir.small_weights(self.loaded) else own)


def make_graphs(
    request: NetworkRequest,
    announce: Announce = silent,
    *,
    portable: bool = False,
    on_merged: Callable[[Graphs], object] = lambda _: None,
) -> Graphs:
    """Load the networks, merge them, with a learnt trunk if there is one, and compress that as options and policy say.

    Parameters
    ----------
    request : NetworkRequest
        What was asked for.
    announce : callable
        Is told what is being done.
    portable : bool
        The graphs are for any machine, so the target need not have what the methods want.
    on_merged : callable
        Is given the graphs before anything is compressed, which may take long: it may complain.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit.
    """
    policy = _policy(request)
    if not portable and request.tracker is None and unfit(describe_target(resolve(request.target))) is None:
        note_threads(request.threads, announce)
    announce("loading the networks")
    loaded = load(request.models, shared_inputs=request.shared_inputs, shapes=request.shapes or None)
    if request.optimize == "memory":
        loaded = ir.with_small_weights(loaded)
    announce("merging")
    links = (request.shared_inputs, request.chains, request.states)
    wiring = wire(loaded, *links)
    merged = _run(pipeline.merge_phases(*links), loaded)
    stages = {"merged": merged}
    if request.merge is not None:
        stages["trunk learnt"] = with_learnt_trunk(request.merge, request.models, request.shared_inputs or (), merged)
    graph = list(stages.values())[-1]
    asked = _asked_for(policy, graph, request.options)
    method_settings.check_used(pipeline.METHODS, asked, request.options)
    samples = None
    if request.calibration is not None:
        samples = load_calibration(request.calibration, merged, calibration_executor)
        _note_constants(samples, ir.states(merged), announce)
    on_merged(Graphs(loaded, wiring, stages, samples))
    features = None if portable else llvm_features(resolve(request.target))
    for one in asked:
        if samples is None:
            one.check_samples(str(request.policy))
        if features is not None:
            one.check_features(features, request.target)
    trained = None
    if request.finetune is not None:
        # What it needs may be missing; nothing else needs that.
        from nnfuze_tvm.jobs.finetuning import FineTuning

        trained = FineTuning(merged, asked, request, announce)
    inputs = method.Inputs(policy, samples, request.options, calibration_executor, announce)
    stages |= _compressed(graph, asked, inputs, trained)
    return Graphs(loaded, wiring, stages, samples, _integer(policy, list(stages.values())[-1]))


def _note_constants(samples: Mapping[str, np.ndarray], states: Collection[str], announce: Announce) -> None:
    """Say so if samples of an input are such that nothing can be learnt of its range."""
    for name, values in samples.items():
        if values.size > 1 and name not in states and values.min() == values.max():
            announce(
                f"{NOTE}calibration data: {name!r} is always {values.min():g}; what 8 bits make of others is chance"
            )


def _compressed(
    before: tvm.IRModule, asked: Sequence[method.Method], inputs: method.Inputs, trained: FineTuning | None
) -> dict[str, tvm.IRModule]:
    """Return the graph of a network behind each method and its training."""
    stages = {}
    for one in asked:
        inputs.announce(one.activity)
        compressed = stages[one.name] = pipeline.compression_phase(one, inputs)(before)
        if one is PRUNED and (names := _kept_whole(inputs.policy, before, compressed)):
            inputs.announce(
                f"{NOTE}keep changes nothing of {', '.join(names)}: all channels are needed, as for outputs"
            )
        if trained is not None and one.training is not None:
            compressed = stages[f"{one.name}, fine-tuned"] = trained.after(compressed, one)
        before = compressed
    return stages


def _policy(request: NetworkRequest) -> Policy:
    """Return the policy file's policy; where it says nothing of all layers, the options do."""
    stated = method_settings.settings(pipeline.METHODS, request.options)
    return (Policy.load(request.policy) if request.policy else Policy()).with_default(stated)


def _asked_for(policy: Policy, merged: tvm.IRModule, options: Mapping[str, Any]) -> list[method.Method]:
    """Return the methods that options, or the policy on any layer, ask for, in the pipeline's order."""
    names = [layer.name for layer in metrics.layers(merged)]
    lineage = ir.lineage(merged)
    policy.validate_layers(names, lineage)
    return method.asked(pipeline.METHODS, [policy.for_layer(name, lineage) for name in names], options)


def _kept_whole(policy: Policy, before: tvm.IRModule, after: tvm.IRModule) -> list[str]:
    """Return the layers that a policy asks by name to lose channels and that lose none: outputs, say."""
    lineage = ir.lineage(before)
    sizes = {layer.name: layer.shape for layer in metrics.layers(after)}
    return [
        layer.name
        for layer in metrics.layers(before)
        if policy.states(layer.name, "keep", lineage) and policy.for_layer(layer.name, lineage).keep < 1
        if layer.shape == sizes.get(layer.name)
    ]


def _integer(policy: Policy, graph: tvm.IRModule) -> set[str]:
    """Return the layers that the policy gives weights of integers."""
    lineage = ir.lineage(graph)
    names = [layer.name for layer in metrics.layers(graph)]
    return {name for name in names if policy.for_layer(name, lineage).precision.format == "int"}


def _run(phases: Sequence[tvm.transform.Pass], mod: tvm.IRModule) -> tvm.IRModule:
    return tvm.transform.Sequential(list(phases))(mod)
