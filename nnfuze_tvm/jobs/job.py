"""What ``nnfuze compile`` and ``nnfuze tune`` do, from the options to the bundle and its report."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.bundle import LIBRARY, check_destination, seal, staged
from nnfuze_tvm.deploy.manifest import (
    HardwareRecord,
    KernelRecord,
    Manifest,
    describe_target,
    package_versions,
    signature_records,
)
from nnfuze_tvm.deploy.runner import made_up, sample_batches, signature
from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs import stages
from nnfuze_tvm.jobs.options import Announce, Arrays, Graphs, Options, check_names, read_arrays
from nnfuze_tvm.jobs.stages import Builder, Built
from nnfuze_tvm.report import KernelTime, LayerUse, Report, render_html

# The options of a tuning job, kept in its directory so that it can go on without being told again.
OPTIONS_FILE = "options.json"


def _silent(_: str) -> None:
    pass


def compile_bundle(
    options: Options,
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    announce: Announce = _silent,
    progress: bool = False,
) -> Report:
    """Compile networks into a bundle, with its report in ``report.json`` and ``report.html``.

    Parameters
    ----------
    options : Options
        What to compile and how.
    output : path
        The bundle's directory.
    force : bool
        Replace a bundle that is already there.
    announce : callable
        Is told what is being done, in a few words.
    progress : bool
        Whether tuning shows bars on the terminal.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit; nothing is written then.
    """
    check_destination(output, force=force)
    target = targets.resolve(options.target)
    evaluation = read_arrays(options.evaluation, "evaluation data") if options.evaluation else {}
    check_reachable(options)
    graphs = Graphs(options, announce)
    batches, labels, data = _evaluation(graphs, options, evaluation)
    database = tuning_database(options, graphs, target, announce, progress)
    with staged(output, force=force) as directory, tempfile.TemporaryDirectory(prefix="nnfuze-") as scratch:
        builder = Builder(target, options.threads, Path(scratch))
        built = _build(builder, graphs, options, database, directory / LIBRARY, announce)
        report = Report(
            tasks=graphs.tasks,
            target=options.target,
            threads=options.threads,
            data=data,
            stages=[stage.record for stage in built],
            layers=_layers(graphs.last),
            versions=package_versions(),
        )
        announce("measuring")
        peer = stages.onnx_runtime(options.models, graphs, options.threads) if options.compare else None
        if peer is not None:
            report.stages.insert(0, peer.record)
        _judge(built, peer, builder, graphs, options, batches, labels)
        kernels = metrics.kernels(built[-1].lowered[0])
        if options.tracker is not None:
            _time_remotely(report, built, graphs, options, batches)
        elif builder.here:
            _time(report, built, peer, graphs, batches, kernels)
        announce("writing the bundle")
        seal(
            directory,
            _manifest(report, graphs, target, options, kernels),
            {"report.json": report.to_json(), "report.html": render_html(report)},
        )
    return report


def tune_networks(
    options: Options, *, announce: Announce = _silent, progress: bool = False
) -> ms.database.JSONDatabase:
    """Tune the kernels of the final network; everything is kept in ``options.work_dir``.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or no device answers.
    """
    if options.work_dir is None:
        raise InputError("--work-dir: give the directory of the tuning job")
    if options.trials < 1:
        raise InputError(f"--trials {options.trials}: tuning needs at least one trial per kernel")
    target = targets.resolve(options.target)
    check_reachable(options)
    graphs = Graphs(options, announce)
    database = tuning_database(options, graphs, target, announce, progress)
    assert database is not None
    return database


def saved_options(work_dir: str | None, changes: Mapping[str, Any]) -> Options:
    """Return the options that a tuning job was started with, with some of them changed.

    Raises
    ------
    InputError
        If the directory holds none.
    """
    if work_dir is None:
        raise InputError("nnfuze tune: give networks to tune, or the --work-dir of a job to go on with")
    path = Path(work_dir) / OPTIONS_FILE
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise InputError(f"--work-dir {work_dir}: no tuning job to go on with; give the networks, too") from None
    return Options.parse(**{**fields, **changes, "work_dir": work_dir})


def check_reachable(options: Options) -> None:
    """Find out that a tracker or a device is missing before the time-consuming part, not after it."""
    if options.tracker is not None:
        from nnfuze_tvm.devices.remote import tracker

        assert options.key is not None
        session = tracker.connect(options.tracker, min(options.wait, 10.0))
        tracker.wait_for_device(session, options.key, options.wait)


def tuning_database(
    options: Options, graphs: Graphs, target: Target, announce: Announce, progress: bool = False
) -> ms.database.JSONDatabase | None:
    """Return the database of the tuning job: what it finds now or, without trials, what it found earlier."""
    if options.trials == 0:
        if options.work_dir is None:
            return None
        records = Path(options.work_dir) / "database_tuning_record.json"
        if not records.is_file():
            raise InputError(f"--work-dir {options.work_dir}: no tuning records in it; give --trials to make some")
        return ms.database.JSONDatabase(work_dir=options.work_dir)
    from nnfuze_tvm.jobs.tuning import tune

    work_dir = Path(options.work_dir or "nnfuze-tuning")
    announce(f"tuning, up to {options.trials} trials per kernel")
    try:
        work_dir.mkdir(parents=True, exist_ok=True)
        text = options.model_copy(update={"models": _absolute(options.models)}).model_dump_json(indent=1)
        (work_dir / OPTIONS_FILE).write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise InputError(f"--work-dir {work_dir}: can't be written ({error.strerror})") from None
    return tune(
        build.fuse(graphs.last, target),
        target,
        trials=options.trials,
        work_dir=work_dir,
        tracker=options.tracker,
        key=options.key,
        progress=progress,
        threads=options.threads,
        wait_for_device=options.wait,
    )


def _absolute(models: Sequence[str]) -> list[str]:
    found = []
    for model in models:
        path = stages.model_path(model)
        found.append(model[: len(model) - len(path)] + os.path.abspath(path))
    return found


def _evaluation(
    graphs: Graphs, options: Options, evaluation: Arrays
) -> tuple[list[dict[str, np.ndarray]], dict[str, np.ndarray], str]:
    """Return the batches to judge the stages on, the labels, and a line that says what they are."""
    inputs, outputs = signature(graphs.last)
    if options.evaluation:
        check_names(evaluation, [*(i.name for i in inputs), *graphs.tasks], options.evaluation)
        batches = sample_batches(evaluation, inputs)
        labels = measure.labels_of(evaluation, outputs)
        kind = "labelled samples" if labels else "samples without labels"
        return batches, labels, f"{len(batches) * _batch(inputs)} {kind} of {Path(options.evaluation).name}."
    if graphs.calibration is not None:
        batches = sample_batches(graphs.calibration, inputs)
        return batches, {}, f"Agreement on the calibration samples ({len(batches) * _batch(inputs)})."
    return [], {}, ""


def _batch(inputs: Sequence[stages.Input]) -> int:
    return inputs[0].shape[0] if inputs and inputs[0].shape else 1


def _build(
    builder: Builder,
    graphs: Graphs,
    options: Options,
    database: ms.Database | None,
    library: Path,
    announce: Announce,
) -> list[Built]:
    """Build the stages; the last one's library is the bundle's."""
    wanted: list[tuple[str, tvm.IRModule, ms.Database | None]] = [
        (name, mod, None) for name, mod in graphs.stages.items()
    ]
    if database is not None:
        wanted.append(("tuned", graphs.last, database))
    built = []
    if not options.compare:
        wanted = wanted[-1:]
    elif len(graphs.tasks) > 1:
        announce("building: separate")
        built.append(builder.separate(graphs))
    for n, (name, mod, records) in enumerate(wanted, 1):
        announce(f"building: {name}")
        final = library if n == len(wanted) else None
        built.append(builder.build(name, [mod], database=records, library=final))
    return built


def _judge(
    built: Sequence[Built],
    peer: stages.OnnxRuntime | None,
    builder: Builder,
    graphs: Graphs,
    options: Options,
    batches: Sequence[dict[str, np.ndarray]],
    labels: Arrays,
) -> None:
    """Fill in accuracy of every stage, and agreement with the networks as they were given."""
    if not batches:
        return
    outputs = built[-1].outputs
    reference = None
    if peer is not None:
        reference = peer.answers(batches)
        peer.record.tasks = stages.qualities(outputs, reference, None, labels)
    for stage, twin in zip(built, built if builder.here else _host_twins(graphs, builder, options), strict=True):
        answers = twin.answers(batches)
        if reference is None and options.compare:
            reference = answers
        stage.record.tasks = stages.qualities(outputs, answers, reference, labels)


def _host_twins(graphs: Graphs, builder: Builder, options: Options) -> list[Built]:
    """Return the stages built for this CPU: integers give the same answers on every one."""
    host = Builder(targets.resolve("host"), options.threads, builder.directory / "host")
    host.directory.mkdir()
    wanted = graphs.stages if options.compare else {"final": graphs.last}
    twins = [host.build(name, [mod]) for name, mod in wanted.items()]
    if options.trials or options.work_dir:
        twins.append(twins[-1])
    if not options.compare:
        return twins[-1:]
    return [host.separate(graphs), *twins] if len(graphs.tasks) > 1 else twins


def _time(
    report: Report,
    built: Sequence[Built],
    peer: stages.OnnxRuntime | None,
    graphs: Graphs,
    batches: Sequence[dict[str, np.ndarray]],
    kernels: Sequence[metrics.Kernel],
) -> None:
    """Measure the latency of all stages in turns, and every kernel of the last one."""
    sample = batches[0] if batches else made_up(signature(graphs.last)[0])
    callers = {stage.record.name: stage.caller(sample) for stage in built}
    if peer is not None:
        callers = {peer.record.name: peer.caller(sample), **callers}
    latencies = measure.measure_interleaved(callers)
    for stage in report.stages:
        stage.latency = latencies[stage.name].median
        stage.latency_p95 = latencies[stage.name].p95
    report.measured_on = stages.machine_name()
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


def _time_remotely(
    report: Report,
    built: Sequence[Built],
    graphs: Graphs,
    options: Options,
    batches: Sequence[dict[str, np.ndarray]],
) -> None:
    """Measure the latency of all stages in turns on a board."""
    from nnfuze_tvm.devices.remote.timing import time_on_device

    assert options.tracker is not None and options.key is not None
    sample = batches[0] if batches else made_up(signature(graphs.last)[0])
    networks = {stage.record.name: stage.networks(sample) for stage in built}
    times, board = time_on_device(options.tracker, options.key, networks, threads=options.threads, wait=options.wait)
    for stage in built:
        values = times[stage.record.name]
        stage.record.latency = float(np.median(values))
        stage.record.latency_p95 = float(np.percentile(values, 95))
    report.measured_on = f"{options.key} at {board}"


def _layers(mod: tvm.IRModule) -> list[LayerUse]:
    return [
        LayerUse(
            name=layer.name,
            op=layer.op,
            macs=layer.macs,
            parameters=layer.parameters,
            integer=layer.integer,
            tasks=list(layer.tasks),
            depth=layer.depth,
            origins=list(layer.origins),
        )
        for layer in metrics.layers(mod)
    ]


def _manifest(
    report: Report, graphs: Graphs, target: Target, options: Options, kernels: Sequence[metrics.Kernel]
) -> Manifest:
    return Manifest(
        **signature_records(*signature(graphs.last)),
        target=describe_target(target),
        threads=options.threads,
        quantization={
            "integer_layers": sum(layer.integer for layer in report.layers),
            "float_layers": report.float_layers,
            "method": options.calibration_method if "int8" in graphs.stages else None,
        },
        kernels=[
            KernelRecord(
                name=k.name,
                calls=k.calls,
                arguments=[(list(shape), dtype) for shape, dtype in k.arguments],
                tasks=list(k.tasks),
                layers=list(k.layers),
                rule=k.rule,
                knobs=k.knobs,
                parallel=k.parallel,
            )
            for k in kernels
        ],
        hardware=HardwareRecord.model_validate(Hardware.of(target), from_attributes=True),
        metrics=report.final.model_dump(mode="json", exclude={"name", "reference"}, exclude_none=True),
        versions=report.versions,
    )
