"""Building the stages of a compilation: from graphs to libraries that run, with what is known before they do."""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy import build, loading, weights
from nnfuze_tvm.deploy.apart import Apart, take_apart
from nnfuze_tvm.deploy.bundle import LIBRARY, unfit
from nnfuze_tvm.deploy.manifest import describe_target, interface
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.deploy.runner import LOAD, Output, Runner, Signature, signature
from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote.timing import Network
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.wiring import Run, Wiring
from nnfuze_tvm.jobs.announce import Announce
from nnfuze_tvm.jobs.data import Arrays
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.reading import memory
from nnfuze_tvm.report import Stage


@dataclass
class Built:
    """A stage that was built: one library per network, and what is known without running it.

    Attributes
    ----------
    record : Stage
        Its row of the report.
    lowered : list of tvm.IRModule
        The lowered networks.
    libraries : list of Path
        Their libraries, for the target.
    weights : list of Apart
        Their weights, which the libraries don't hold.
    signatures : list of Signature
        What each network takes and gives.
    kernels : list of LoweredKernel
        What the library of the only network consists of; empty if it goes nowhere.
    wiring : Wiring, optional
        How the networks hang together; None if they are one.
    runners : list of Runner
        The networks, loaded here; empty if this CPU can't run them.
    """

    record: Stage
    lowered: list[tvm.IRModule]
    libraries: list[Path]
    weights: list[Apart]
    signatures: list[Signature]
    kernels: list[metrics.LoweredKernel]
    wiring: Wiring | None = None
    runners: list[Runner] = field(default_factory=list)

    @property
    def outputs(self) -> list[Output]:
        """The outputs of all networks."""
        return [output for one in self.signatures for output in one.outputs]

    def caller(self, sample: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a function that runs all networks once on a sample."""
        if self.wiring is None:
            (runner,) = self.runners
            return lambda: runner.run(sample)
        wiring, runs = self.wiring, self._runs(self.wiring)
        given = {**sample, **wiring.zeros()}
        return lambda: wiring.step(runs, given)

    def networks(self, sample: Arrays) -> list[Network]:
        """Return each network's library with its inputs, in order, from a sample; zeros for what networks feed."""
        found = []
        for path, apart, taken in zip(self.libraries, self.weights, self.signatures, strict=True):
            own = self.wiring.taken(taken.outputs[0].task, sample) if self.wiring is not None else sample
            arrays = [own.get(i.name, np.zeros(i.shape, i.dtype)) for i in [*taken.inputs, *taken.states]]
            found.append(Network(path, arrays, {LOAD: apart.arrays} if apart.arrays else {}))
        return found

    def answers(self, batches: Sequence[Arrays]) -> list[np.ndarray]:
        """Return all networks' outputs for all batches, which follow each other."""
        if self.wiring is None:
            return measure.answers(self.runners[0].stream().step, batches)
        return measure.answers(self.wiring.stepper(self._runs(self.wiring)), batches)

    def _runs(self, wiring: Wiring) -> dict[str, Run]:
        return {task: runner.stream().step for task, runner in zip(wiring.tasks, self.runners, strict=True)}


class Builder:
    """Builds stages for one target into a directory.

    Parameters
    ----------
    target : tvm.target.Target
        The machine to build for.
    threads : int
        Threads per inference.
    directory : Path
        Where libraries go.
    """

    def __init__(self, target: Target, threads: int, directory: Path) -> None:
        self.target = target
        self.threads = threads
        self.directory = directory
        self.here = unfit(describe_target(target)) is None

    def build(
        self,
        name: str,
        modules: Sequence[tvm.IRModule],
        wiring: Wiring | None = None,
        database: ms.Database | None = None,
        bundle: Path | None = None,
    ) -> Built:
        """Lower, build, link and (where this CPU can run it) load a stage of one or several networks.

        Parameters
        ----------
        name : str
            The stage's name.
        modules : sequence of tvm.IRModule
            Its networks, each with ``main``, not lowered.
        wiring : Wiring, optional
            How they hang together if they are several, one per task.
        database : tvm.s_tir.meta_schedule.Database, optional
            Tuning records.
        bundle : Path, optional
            The directory where the library and the weights of the only network go.
        """
        lowered = [build.lower(mod, self.target, database) for mod in modules]
        signatures = [signature(mod) for mod in modules]
        paths = []
        sizes = [metrics.size(module) for module in lowered]
        parts = [take_apart(module) for module in lowered]
        finished = [build.finished(part.mod, self.target) for part in parts]
        peak = sum(usage(module, self.target).total(self.threads) for module in finished)
        reason = memory.too_large(peak + sum(part.resident for part in parts)) if self.here else ""
        if reason:
            raise InputError(f"{', '.join(ir.tasks(modules[0]))}: running it {reason}; use smaller shapes")
        kernels: list[metrics.LoweredKernel] = []
        for n, module in enumerate(finished):
            path = self.directory / f"{name}-{n}.so"
            _require_space(self.directory)
            # What a bundle's manifest says of its kernels and weights is believed if its library says so, too.
            kernels = metrics.kernels(module) if bundle is not None else []
            said = interface(signatures[n], [(k.name, k.arguments) for k in kernels], parts[n].record)
            export_library(build.generate(module, self.target, said if bundle else ""), path, self.target)
            if bundle is not None:
                path = Path(shutil.copyfile(path, bundle / LIBRARY))
                weights.write(bundle / weights.WEIGHTS, parts[n].arrays)
            paths.append(path)
        record = describe(name, modules)
        record.peak_memory = peak
        record.bytes = sum(path.stat().st_size for path in paths) + sum(weights.size(part.record) for part in parts)
        record.weight_memory = sum(part.resident for part in parts)
        record.parameters = sum(size.parameters for size in sizes)
        record.parameter_bytes = sum(size.bytes for size in sizes)
        built = Built(record, lowered, paths, parts, signatures, kernels, wiring)
        if self.here:
            built.runners = [
                Runner(loading.load(path), *io, threads=self.threads, tensors=part.tensors())
                for path, io, part in zip(paths, signatures, parts, strict=True)
            ]
        return built

    def separate(self, graphs: Graphs) -> Built:
        """Build every task's network on its own."""
        return self.build("separate", [graphs.alone(task) for task in graphs.tasks], graphs.wiring)


def build_stages(
    builder: Builder,
    graphs: Graphs,
    database: ms.Database | None,
    bundle: Path,
    *,
    compare: bool,
    trace: AbstractContextManager[object],
    announce: Announce,
) -> list[Built]:
    """Build the stages; what the last one needs is the bundle's.

    Parameters
    ----------
    builder : Builder
        Builds for the target.
    graphs : Graphs
        The stages' graphs.
    database : tvm.s_tir.meta_schedule.Database, optional
        Tuning records: with them the last stage, ``tuned``, is the last graph built with them.
    bundle : Path
        The directory where the last stage's library and weights go.
    compare : bool
        Whether to build all stages, not only the last.
    trace : context manager
        Entered around the build of the last stage.
    announce : callable
        Is told which stage is being built.
    """
    wanted: list[tuple[str, tvm.IRModule, ms.Database | None]] = [
        (name, mod, None) for name, mod in graphs.stages.items()
    ]
    if database is not None:
        wanted.append(("tuned", graphs.last, database))
    *others, (name, mod, records) = wanted
    built = []
    if compare:
        if len(graphs.tasks) > 1:
            announce("building: separate")
            built.append(builder.separate(graphs))
        for stage, graph, _ in others:
            announce(f"building: {stage}")
            built.append(builder.build(stage, [graph]))
    announce(f"building: {name}")
    with trace:
        built.append(builder.build(name, [mod], database=records, bundle=bundle))
    return built


def answering_stages(builder: Builder, built: Sequence[Built], graphs: Graphs, *, compare: bool) -> Sequence[Built]:
    """Return stages that give the answers of ``built`` on this CPU: integers give the same answers on every one.

    Where this CPU can't run code for the target, they are built for this one, untuned.
    """
    if builder.here:
        return built
    host = Builder(targets.resolve("host"), builder.threads, builder.directory / "host")
    host.directory.mkdir()
    wanted = graphs.stages if compare else {"final": graphs.last}
    twins = {name: host.build(name, [mod]) for name, mod in wanted.items()}
    if not compare:
        return list(twins.values())
    if len(graphs.tasks) > 1:
        twins["separate"] = host.separate(graphs)
    found: list[Built] = []
    for stage in built:
        # What is tuned computes what the stage before it does.
        found.append(twins[stage.record.name] if stage.record.name in twins else found[-1])
    return found


def _require_space(directory: Path) -> None:
    # LLVM ends the whole process when it can't write an object file, so it must not come to that.
    if shutil.disk_usage(directory).free < 4 << 20:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(directory))


def describe(name: str, modules: Sequence[tvm.IRModule]) -> Stage:
    """Return the row of a stage with what its graphs alone tell."""
    layers = [layer for mod in modules for layer in metrics.layers(mod)]
    weights = [(metrics.weight_sparsity(mod), metrics.size(mod).parameters) for mod in modules]
    total = sum(count for _, count in weights)
    return Stage(
        name=name,
        macs=sum(layer.macs for layer in layers),
        parameters=total,
        sparsity=sum(zeros * count for zeros, count in weights) / total if total else 0.0,
    )
