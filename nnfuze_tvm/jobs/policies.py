"""What ``nnfuze policy`` does: policies written for networks, checked against them, and explained layer by layer."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.graph import ir
from nnfuze_tvm.jobs.announce import Announce, silent
from nnfuze_tvm.jobs.destination import destination, whole
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.channel_groups import CoupledFunction
from nnfuze_tvm.passes.compress.prune.elimination import eliminations
from nnfuze_tvm.passes.compress.prune.prune_channels import kept_channels

# For these fractions of a layer's channels, what their loss costs is told.
_KEEPS = (0.75, 0.5)


@dataclass(frozen=True)
class LayerFacts:
    """A layer as it is, and what a policy makes of it.

    Attributes
    ----------
    name, op : str
        Its name, and its operator.
    macs, bytes : int
        Its multiply-accumulates, and the bytes of its parameters in float32.
    seconds : float, optional
        What its kernel takes on the target.
    losses : dict of float to float
        By fractions of its channels that stay: the error of what reads them, as a part of its size, where the weights
        are fitted anew.
    channels : tuple of int, optional
        How many of its channels stay, and how many there are; none where they can't be removed.
    values : dict
        The fields of the policy.
    """

    name: str
    op: str
    macs: int
    bytes: int
    seconds: float | None = None
    losses: Mapping[float, float] = field(default_factory=dict)
    channels: tuple[int, int] | None = None
    values: Mapping[str, Any] = field(default_factory=dict)


def write_policy(
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    timed: bool = True,
    announce: Announce = silent,
    **fields: Any,
) -> list[LayerFacts]:
    """Write a policy that changes nothing, with a comment for every layer.

    Parameters
    ----------
    models : sequence of str
        ONNX files, ``path`` or ``task=path``.
    output : path
        The policy's file.
    force : bool
        Replace a file that is already there.
    timed : bool
        Whether kernels are built and timed, see `analyze.analyze`.
    announce : callable
        Is told what is being done, in a few words.
    **fields
        See `request.NetworkRequest`.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or the file is there.
    """
    target = destination(output, force=force)
    graphs = make_graphs(NetworkRequest.parse(models, fields), announce)
    losses = {}
    if graphs.calibration is not None:
        announce("looking for channels that others can stand in for")
        losses = _losses(graphs.last, graphs.calibration)
    seconds = _seconds(models, announce, fields) if timed else {}
    facts = [
        _facts(layer, seconds=seconds.get(layer.name), losses=losses.get(layer.name, {}))
        for layer in metrics.layers(graphs.last)
    ]
    policy = Policy(Policy.uniform(keep=1.0, bits=32).default, {each.name: {} for each in facts})
    with whole(target, output) as file:
        policy.save(file, {each.name: _comment(each, sum(one.macs for one in facts)) for each in facts})
    return facts


def explained(
    models: Sequence[str], policy: str, *, announce: Announce = silent, **fields: Any
) -> tuple[list[LayerFacts], list[str]]:
    """Return what a policy makes of each layer, and the names of the methods that it asks for.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit: a layer that isn't there, or what no method takes.
    """
    read = Policy.load(policy)
    graph = make_graphs(NetworkRequest.parse(models, fields), announce).last
    layers, lineage = metrics.layers(graph), ir.lineage(graph)
    read.validate_layers([layer.name for layer in layers], lineage)
    said = {layer.name: read.for_layer(layer.name, lineage) for layer in layers}
    stays = _stays(graph, read)
    known = method.policy_fields(pipeline.METHODS)
    facts = [
        _facts(
            layer,
            channels=stays.get(layer.name),
            values={name: getattr(said[layer.name], name) for name in known},
        )
        for layer in layers
    ]
    return facts, [one.name for one in method.asked(pipeline.METHODS, list(said.values()))]


def telling(facts: Sequence[LayerFacts]) -> list[str]:
    """Return the fields of the policy that say something of a layer: all others are at their defaults everywhere."""
    known = method.policy_fields(pipeline.METHODS)
    return [name for name in known if any(each.values[name] != known[name].default for each in facts)]


def _facts(layer: metrics.LayerCost, **more: Any) -> LayerFacts:
    """Return a layer as it is, and more of it."""
    return LayerFacts(name=layer.name, op=layer.op, macs=layer.macs, bytes=4 * layer.parameters, **more)


def _losses(graph: tvm.IRModule, samples: Mapping[str, np.ndarray]) -> dict[str, dict[float, float]]:
    """Return what layers' channels are worth, by the names of the layers that make them."""
    from nnfuze_tvm.deploy.executor import calibration_executor

    coupling = CoupledFunction(graph["main"])
    found: dict[str, dict[float, float]] = {}
    for group, gone in zip(
        coupling.groups(), eliminations(graph, coupling, samples, calibration_executor), strict=True
    ):
        size = len(group.classes)
        errors = {keep: float(np.sqrt(gone.errors[size - max(1, round(keep * size))])) for keep in _KEEPS}
        for name in group.names:
            before = found.get(name, {})
            found[name] = {keep: max(error, before.get(keep, 0.0)) for keep, error in errors.items()}
    return found


def _seconds(models: Sequence[str], announce: Announce, fields: Mapping[str, Any]) -> dict[str, float]:
    """Return what the kernels of layers take: measured, or of a board that is not at hand the least by its figures."""
    from nnfuze_tvm.jobs.analyze import analyze

    found: dict[str, float] = {}
    for kernel in analyze(models, announce=announce, **fields).kernels:
        taken = kernel.seconds if kernel.seconds is not None else max(kernel.bounds.values(), default=0.0)
        for name in kernel.layers:
            found[name] = found.get(name, 0.0) + taken / len(kernel.layers)
    return found


def _stays(graph: tvm.IRModule, policy: Policy) -> dict[str, tuple[int, int]]:
    """Return how many channels of each layer stay, and how many there are, where they can be removed."""
    coupling, lineage = CoupledFunction(graph["main"]), ir.lineage(graph)
    found: dict[str, tuple[int, int]] = {}
    for group in coupling.groups():
        share = kept_channels(policy, group, lineage) / len(group.classes)
        roots = coupling.channels.roots()
        for layer in group.layers:
            count = int(np.isin(roots[layer.outputs], group.classes).sum())
            kept, there = found.get(layer.name, (0, 0))
            found[layer.name] = kept + round(share * count), there + count
    return found


def _comment(layer: LayerFacts, macs: int) -> str:
    """Return a layer's costs in a line."""
    share = f" ({layer.macs / macs:.0%})" if macs else ""
    parts = [layer.op, f"{layer.macs / 1e6:.3g} M MACs{share}", f"{layer.bytes / 1e3:.3g} KB"]
    if layer.seconds is not None:
        parts.append(f"{layer.seconds * 1e6:.3g} µs")
    if layer.losses:
        parts.append("; ".join(f"keep {keep:g} loses {loss:.1%}" for keep, loss in layer.losses.items()))
    return ", ".join(parts)
