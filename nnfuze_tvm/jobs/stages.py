"""Building the stages of a compilation and measuring them against each other."""

from __future__ import annotations

import errno
import os
import platform
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.bundle import unfit
from nnfuze_tvm.deploy.manifest import describe_target
from nnfuze_tvm.deploy.runner import Input, Output, Runner, signature
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.jobs.options import Arrays, Graphs
from nnfuze_tvm.report import Stage, TaskQuality


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
    signatures : list
        Inputs and outputs of each network.
    feeds : list of dict
        Per network: name in the merged graph → its own name, of each input.
    runners : list of Runner
        The networks, loaded here; empty if this CPU can't run them.
    """

    record: Stage
    lowered: list[tvm.IRModule]
    libraries: list[Path]
    signatures: list[tuple[list[Input], list[Output]]]
    feeds: list[dict[str, str]]
    runners: list[Runner] = field(default_factory=list)

    @property
    def outputs(self) -> list[Output]:
        """The outputs of all networks."""
        return [output for _, outputs in self.signatures for output in outputs]

    def caller(self, sample: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a function that runs all networks once on a sample."""
        pairs = [
            (runner, {own: sample[name] for name, own in feed.items()})
            for runner, feed in zip(self.runners, self.feeds, strict=True)
        ]
        if len(pairs) == 1:
            runner, inputs = pairs[0]
            return lambda: runner.run(inputs)
        return lambda: [runner.run(inputs) for runner, inputs in pairs]

    def networks(self, sample: Arrays) -> list[tuple[Path, list[np.ndarray]]]:
        """Return each network's library with its inputs, in order, from a sample."""
        found = []
        for path, (inputs, _), feed in zip(self.libraries, self.signatures, self.feeds, strict=True):
            own = {own: sample[name] for name, own in feed.items()}
            found.append((path, [own[i.name] for i in inputs]))
        return found

    def answers(self, batches: Sequence[Arrays]) -> list[np.ndarray]:
        """Return all networks' outputs for all batches."""
        collected = []
        for runner, feed in zip(self.runners, self.feeds, strict=True):
            own = [{own: batch[name] for name, own in feed.items()} for batch in batches]
            collected.extend(measure.answers(runner, own))
        return collected


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
        feeds: Sequence[dict[str, str]] | None = None,
        database: ms.Database | None = None,
        library: Path | None = None,
    ) -> Built:
        """Lower, build, link and (where this CPU can run it) load a stage of one or several networks.

        Parameters
        ----------
        name : str
            The stage's name.
        modules : sequence of tvm.IRModule
            Its networks, each with ``main``, not lowered.
        feeds : sequence of dict, optional
            Name in the merged graph → own name of each network's inputs; by default they are the same.
        database : tvm.s_tir.meta_schedule.Database, optional
            Tuning records.
        library : Path, optional
            Where the library of the only network goes.
        """
        lowered = [build.lower(mod, self.target, database) for mod in modules]
        signatures = [signature(mod) for mod in modules]
        if feeds is None:
            feeds = [{i.name: i.name for i in inputs} for inputs, _ in signatures]
        paths = []
        sizes = [metrics.size(module) for module in lowered]
        for n, module in enumerate(lowered):
            path = self.directory / f"{name}-{n}.so"
            _require_space(self.directory, sizes[n].bytes)
            export_library(build.generate(module, self.target), path, self.target)
            if library is not None:
                shutil.copyfile(path, library)
                path = library
            paths.append(path)
        record = describe(name, modules)
        record.peak_memory = sum(metrics.peak_memory(module) for module in lowered)
        record.bytes = sum(path.stat().st_size for path in paths)
        record.parameters = sum(size.parameters for size in sizes)
        record.parameter_bytes = sum(size.bytes for size in sizes)
        built = Built(record, lowered, paths, signatures, list(feeds))
        if self.here:
            built.runners = [
                Runner(tvm.runtime.load_module(str(path)), *io, threads=self.threads)
                for path, io in zip(paths, signatures, strict=True)
            ]
        return built

    def separate(self, graphs: Graphs) -> Built:
        """Build every task's network on its own."""
        feeds = [{graphs.inputs[task, p.name]: p.name for p in graphs.loaded[task].params} for task in graphs.tasks]
        return self.build("separate", [graphs.alone(task) for task in graphs.tasks], feeds)


def _require_space(directory: Path, constants: int) -> None:
    # LLVM ends the whole process when it can't write an object file, so it must not come to that.
    needed = 3 * constants + (4 << 20)
    if shutil.disk_usage(directory).free < needed:
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


def qualities(
    outputs: Sequence[Output],
    answers: Sequence[np.ndarray],
    reference: Sequence[np.ndarray] | None,
    labels: Mapping[str, np.ndarray],
) -> dict[str, TaskQuality]:
    """Return the quality of every output, by the name it has in the report."""
    found = {}
    for n, (output, answer) in enumerate(zip(outputs, answers, strict=True)):
        original = None if reference is None else reference[n]
        value = measure.quality(output, answer, original, labels.get(output.task))
        found[output_label(output, outputs)] = TaskQuality(**asdict(value))
    return found


def output_label(output: Output, outputs: Sequence[Output]) -> str:
    """Return the task's name, with the output's where the task has several."""
    alone = sum(other.task == output.task for other in outputs) == 1
    return output.task if alone else f"{output.task}:{output.name}"


class OnnxRuntime:
    """The given files in ONNX Runtime, one session per task: what one would run without this package."""

    def __init__(self, models: Sequence[str], graphs: Graphs, threads: int) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self.sessions = []
        self.feeds = []
        size = 0
        for model, task in zip(models, graphs.tasks, strict=True):
            path = model_path(model)
            size += os.path.getsize(path)
            self.sessions.append(onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]))
            self.feeds.append({graphs.inputs[task, p.name]: p.name for p in graphs.loaded[task].params})
        self.record = Stage(
            name="ONNX Runtime, separate" if len(models) > 1 else "ONNX Runtime", reference=True, bytes=size
        )

    def caller(self, sample: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a function that runs all sessions once on a sample."""
        pairs = [
            (session, {own: sample[name] for name, own in feed.items()})
            for session, feed in zip(self.sessions, self.feeds, strict=True)
        ]
        return lambda: [session.run(None, inputs) for session, inputs in pairs]

    def answers(self, batches: Sequence[Arrays]) -> list[np.ndarray]:
        """Return all sessions' outputs for all batches."""
        collected: list[np.ndarray] = []
        for session, feed in zip(self.sessions, self.feeds, strict=True):
            rows = [session.run(None, {own: b[name] for name, own in feed.items()}) for b in batches]
            collected.extend(np.concatenate(values) for values in zip(*rows, strict=True))
        return collected


def onnx_runtime(models: Sequence[str], graphs: Graphs, threads: int) -> OnnxRuntime | None:
    """Return the reference, or None where ONNX Runtime is missing or can't run the files."""
    try:
        return OnnxRuntime(models, graphs, threads)
    except Exception:  # a reference that fails, for whatever reason, is left out of the report
        return None


def model_path(model: str) -> str:
    """Return the path of ``path`` or ``task=path``."""
    _, found, path = model.partition("=")
    return path if found and not os.path.exists(model) else model


def machine_name() -> str:
    """Return what this machine calls its CPU."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()}, {os.cpu_count()} CPUs"
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} CPUs"
