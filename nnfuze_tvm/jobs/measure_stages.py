"""Measuring the stages of a compilation against each other and against ONNX Runtime: how fast, how well."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial

import numpy as np

from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy.runner import Output
from nnfuze_tvm.devices import cpu
from nnfuze_tvm.devices.remote.timing import time_on_device
from nnfuze_tvm.devices.remote.tracker import Place
from nnfuze_tvm.graph.wiring import Run
from nnfuze_tvm.jobs.build_stages import Built
from nnfuze_tvm.jobs.data import Arrays, EvaluationData
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.jobs.request import model_path
from nnfuze_tvm.report import KernelTime, Report, Stage, TaskQuality


class OnnxRuntime:
    """The given files in ONNX Runtime, one session per task: what one would run without this package."""

    def __init__(self, models: Sequence[str], graphs: Graphs, threads: int) -> None:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        settings.inter_op_num_threads = 1
        settings.log_severity_level = 4
        self.sessions = []
        self.wiring = graphs.wiring
        size = 0
        for model in models:
            path = model_path(model)
            size += os.path.getsize(path)
            self.sessions.append(onnxruntime.InferenceSession(path, settings, providers=["CPUExecutionProvider"]))
        self.record = Stage(
            name="ONNX Runtime, separate" if len(models) > 1 else "ONNX Runtime", reference=True, bytes=size
        )

    def caller(self, sample: Mapping[str, np.ndarray]) -> Callable[[], object]:
        """Return a function that runs all sessions once on a sample."""
        runs, given = self._runs(), {**sample, **self.wiring.zeros()}
        return lambda: self.wiring.step(runs, given)

    def answers(self, batches: Sequence[Arrays]) -> list[np.ndarray]:
        """Return all sessions' outputs for all batches, which follow each other."""
        return measure.answers(self.wiring.stepper(self._runs()), batches)

    def _runs(self) -> dict[str, Run]:
        return {
            task: partial(session.run, None) for task, session in zip(self.wiring.tasks, self.sessions, strict=True)
        }


def try_onnx_runtime(models: Sequence[str], graphs: Graphs, threads: int) -> OnnxRuntime | None:
    """Return the reference, or None where ONNX Runtime is missing or can't run the files."""
    try:
        return OnnxRuntime(models, graphs, threads)
    except Exception:  # a reference that fails, for whatever reason, is left out of the report
        return None


def judge(
    built: Sequence[Built], answering: Sequence[Built], peer: OnnxRuntime | None, data: EvaluationData, *, compare: bool
) -> None:
    """Fill in accuracy of every stage, and agreement with the networks as they were given.

    Parameters
    ----------
    built : sequence of Built
        The stages.
    answering : sequence of Built
        Stages that give the same answers on this CPU.
    peer : OnnxRuntime, optional
        The networks as they were given; without it, the first stage stands for them.
    data : EvaluationData
        What to judge them on.
    compare : bool
        Whether ``built`` are all stages, not only the last.
    """
    outputs = built[-1].outputs
    reference = None
    if peer is not None:
        reference = peer.answers(data.batches)
        peer.record.tasks = _qualities(outputs, reference, None, data.labels)
    for stage, twin in zip(built, answering, strict=True):
        answers = twin.answers(data.batches)
        if reference is None and compare:
            reference = answers
        stage.record.tasks = _qualities(outputs, answers, reference, data.labels)


def time_here(
    report: Report,
    built: Sequence[Built],
    peer: OnnxRuntime | None,
    sample: Arrays,
    kernels: Sequence[metrics.LoweredKernel],
) -> None:
    """Measure the latency of all stages in turns on this machine, and every kernel of the last one."""
    callers = {stage.record.name: stage.caller(sample) for stage in built}
    if peer is not None:
        callers = {peer.record.name: peer.caller(sample), **callers}
    latencies = measure.measure_interleaved(callers)
    for stage in report.stages:
        stage.latency = latencies[stage.name].median
        stage.latency_p95 = latencies[stage.name].p95
    report.measured_on = cpu.name()
    times = measure.kernel_times(built[-1].runners[0].library, [(k.name, k.arguments) for k in kernels])
    report.kernels = [
        KernelTime(
            name=k.name,
            calls=k.calls,
            seconds=times[k.name] * k.calls,
            tasks=list(k.tasks),
            layers=list(k.layers),
        )
        for k in kernels
        if k.name in times
    ]


def time_on_board(
    report: Report, built: Sequence[Built], sample: Arrays, tracker: Place, key: str, *, threads: int, wait: float
) -> None:
    """Measure the latency of all stages in turns on a board."""
    networks = {stage.record.name: stage.networks(sample) for stage in built}
    times, board = time_on_device(tracker, key, networks, threads=threads, wait=wait)
    for stage in built:
        values = times[stage.record.name]
        stage.record.latency = float(np.median(values))
        stage.record.latency_p95 = float(np.percentile(values, 95))
    report.measured_on = f"{key} at {board}"


def _qualities(
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
        found[_output_label(output, outputs)] = TaskQuality(**asdict(value))
    return found


def _output_label(output: Output, outputs: Sequence[Output]) -> str:
    """Return the task's name, with the output's where the task has several."""
    alone = sum(other.task == output.task for other in outputs) == 1
    return output.task if alone else f"{output.task}:{output.name}"
