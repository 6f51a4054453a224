"""From the graphs of a compilation to its bundle and report: build, check, measure, write."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from pathlib import Path
from typing import cast

import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.bundle import seal, staged
from nnfuze_tvm.deploy.manifest import (
    KernelRecord,
    Manifest,
    Metrics,
    WeightsRecord,
    describe_hardware,
    describe_target,
    package_versions,
    signature_records,
)
from nnfuze_tvm.deploy.runner import made_up, signature
from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.graph import ir
from nnfuze_tvm.jobs import measure_stages
from nnfuze_tvm.jobs.announce import NOTE, Announce
from nnfuze_tvm.jobs.build_stages import Builder, Built, answering_stages, build_stages
from nnfuze_tvm.jobs.check.check import check
from nnfuze_tvm.jobs.data import Arrays, EvaluationData
from nnfuze_tvm.jobs.faster_form import why_floats
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.jobs.request import WORK_DIR, CompileRequest
from nnfuze_tvm.jobs.tune import found_earlier, tune_graph
from nnfuze_tvm.jobs.tuning import has_records
from nnfuze_tvm.report import Budget, LayerUse, Report, render_html


def write_bundle(
    request: CompileRequest,
    graphs: Graphs,
    data: EvaluationData,
    target: Target,
    output: str | os.PathLike[str],
    *,
    force: bool,
    dump: AbstractContextManager[object],
    announce: Announce,
    bars: bool,
) -> Report:
    """Build the stages of a compilation, check and measure them, and write the bundle of the last one.

    Parameters
    ----------
    request : CompileRequest
        What was asked for.
    graphs : Graphs
        The graphs of its stages.
    data : EvaluationData
        What they are judged on.
    target : tvm.target.Target
        The machine to build for.
    output : path
        The bundle's directory.
    force : bool
        Replace a bundle that is already there.
    dump : context manager
        Entered around the build of the last stage.
    announce : callable
        Is told what is being done.
    bars : bool
        Whether tuning shows bars on the terminal.
    """
    database = _tuning_records(request, graphs.last, target, announce, bars)
    with staged(output, force=force) as directory, temporary.folder() as scratch:
        builder = Builder(target, request.threads, Path(scratch))
        sample = data.batches[0] if data.batches else made_up(signature(graphs.last)[0])
        built, graphs = _build(request, graphs, builder, database, sample, directory, dump, announce)
        report = Report(
            tasks=graphs.tasks,
            target=request.target,
            threads=request.threads,
            data=data.what,
            stages=[stage.record for stage in built],
            layers=_layers(graphs, built[-1].lowered[0]),
            versions=package_versions(),
            budget=None if graphs.choice is None else Budget(**asdict(graphs.choice)),
        )
        peer = measure_stages.try_onnx_runtime(request.models, graphs, request.threads) if request.compare else None
        if peer is not None:
            report.stages.insert(0, peer.record)
        if request.check:
            announce("checking")
            report.check = check(request, graphs, builder, built, data, peer)
        announce("measuring")
        if data.batches:
            answering = answering_stages(builder, built, graphs, compare=request.compare)
            measure_stages.judge(built, answering, peer, data, compare=request.compare)
        kernels = built[-1].kernels
        if (place := request.place) is not None and request.key is not None:
            board = (place, request.key)
            measure_stages.time_on_board(report, built, sample, *board, threads=request.threads, wait=request.wait)
        elif builder.here:
            measure_stages.time_here(report, built, peer, sample, kernels)
        announce("writing the bundle")
        manifest = _manifest(report, graphs, target, request, kernels, built[-1].weights[0].record)
        files = {"report.json": report.to_json(), "report.html": render_html(report)}
        if report.budget is not None:
            files["policy.json"] = json.dumps(report.budget.policy, indent=2) + "\n"
        seal(directory, manifest, files)
    return report


def _build(
    request: CompileRequest,
    graphs: Graphs,
    builder: Builder,
    database: ms.database.JSONDatabase | None,
    sample: Arrays,
    directory: Path,
    dump: AbstractContextManager[object],
    announce: Announce,
) -> tuple[list[Built], Graphs]:
    """Build the stages, the last one as the bundle's; within a budget, that is in floats where these are faster."""
    compare, within = request.compare, graphs.choice is not None
    # Of two forms, one becomes the bundle's.
    folders = [builder.directory / "int8", builder.directory / "float32"] if within else []
    for folder in folders:
        folder.mkdir()
    first = folders[0] if within else directory
    built = build_stages(builder, graphs, database, first, compare=compare, trace=dump, announce=announce)
    if not within:
        return built, graphs
    if why := why_floats(request, graphs, builder, built, sample, announce):
        announce(f"{NOTE}{why}: the bundle stays in float32")
        graphs = graphs.but_floats()
        last = builder.build("float32", [graphs.last], bundle=folders[1])
        built = [*built, last] if compare else [last]
    shutil.copytree(built[-1].libraries[0].parent, directory, dirs_exist_ok=True)
    return built, graphs


def _tuning_records(
    request: CompileRequest, graph: tvm.IRModule, target: Target, announce: Announce, progress: bool
) -> ms.database.JSONDatabase | None:
    """Return what tuning finds now or, without trials, what it found earlier; None if nothing is tuned."""
    if request.trials:
        return tune_graph(graph, target, request, request.work_dir or WORK_DIR, announce, progress)
    if request.work_dir is None or (request.finetune is not None and not has_records(request.work_dir)):
        return None
    return found_earlier(request.work_dir)


def _layers(graphs: Graphs, lowered: tvm.IRModule) -> list[LayerUse]:
    reasons: dict[str, str] = {}
    lineage = ir.lineage(lowered)
    for name, reason in ir.float_layers(lowered).items():
        reasons |= dict.fromkeys([name, *lineage.names(name)], reason)
    return [
        LayerUse(
            name=layer.name,
            op=layer.op,
            macs=layer.macs,
            parameters=layer.parameters,
            integer=layer.integer and layer.name not in reasons,
            tasks=list(layer.tasks),
            depth=layer.depth,
            origins=list(layer.origins),
            reason=reasons.get(layer.name, "") if layer.name in graphs.integer else "",
        )
        for layer in metrics.layers(graphs.last)
    ]


def _manifest(
    report: Report,
    graphs: Graphs,
    target: Target,
    request: CompileRequest,
    kernels: Sequence[metrics.LoweredKernel],
    weights: WeightsRecord,
) -> Manifest:
    return Manifest(
        **signature_records(*signature(graphs.last)),
        target=describe_target(target),
        threads=request.threads,
        quantization={
            "integer_layers": sum(layer.integer for layer in report.layers),
            "float_layers": report.float_layers,
            "method": request.options["calibration_method"] if any(layer.integer for layer in report.layers) else None,
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
        weights=weights,
        mapped=request.optimize == "memory",
        hardware=describe_hardware(target),
        metrics=cast(Metrics, report.final.model_dump(mode="json", exclude={"name", "reference"}, exclude_none=True)),
        versions=report.versions,
    )
