"""``nnfuze compile``: networks in, a bundle and its report out."""

from __future__ import annotations

import os
import sys
from typing import TYPE_CHECKING, Annotated

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import (
    A_TRIAL,
    AsJson,
    Boards,
    Calibration,
    Compression,
    DumpIR,
    Inputs,
    Models,
    Optimize,
    Target,
    Threads,
    WorkDir,
    check_files,
)

if TYPE_CHECKING:
    from nnfuze_tvm.report import Report

POSITION = 0
EXAMPLES = """
Examples:

[bold]nnfuze compile keyword.onnx speaker.onnx -o out[/bold]
Merge two networks; their common trunk is computed once.

[bold]nnfuze compile keyword.onnx speaker.onnx --quantize int8 --calibration calibration.npz -o out[/bold]
The same in int8.

[bold]nnfuze compile a=net1.onnx b=net2.onnx --prune 0.75 --trials 64 --work-dir tuning -o out[/bold]
Name the tasks, drop a quarter of the channels, tune on this machine.

[bold]nnfuze compile a.onnx b.onnx --target aarch64 --tracker pi.local:9190 --key rpi4 --trials 64 -o out[/bold]
Tune on the boards that are registered as rpi4.
"""


def command(
    models: Models,
    *,
    output: Annotated[str, typer.Option("--output", "-o", help="Directory of the bundle.", show_default=False)],
    target: Target = "host",
    optimize: Optimize = "speed",
    calibration: Calibration = None,
    evaluation: Annotated[
        str | None,
        typer.Option(help="Inputs to judge the result on, in the same form; labels [N] under the tasks' names."),
    ] = None,
    compression: Compression,
    inputs: Inputs,
    trials: Annotated[int, typer.Option(help=f"Tuning trials per kernel, {A_TRIAL}; 0: no tuning.")] = 0,
    boards: Boards,
    work_dir: WorkDir = None,
    threads: Threads = 1,
    no_compare: Annotated[
        bool, typer.Option("--no-compare", help="Build and measure the last stage alone, not every one for the report.")
    ] = False,
    no_check: Annotated[
        bool,
        typer.Option("--no-check", help="Don't compare what was built with the networks as given, on a few samples."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a bundle that is already there.")] = False,
    dump_ir: DumpIR = None,
    as_json: AsJson = False,
) -> None:
    """Compile networks into one bundle, with a report."""
    check_files(models, inputs, calibration=calibration, evaluation=evaluation)
    with progress() as announce:
        from nnfuze_tvm.jobs.compile import compile

        report = compile(
            models,
            output,
            force=force,
            dump_ir=dump_ir,
            announce=announce,
            progress=not as_json,
            target=target,
            optimize=optimize,
            calibration=calibration,
            evaluation=evaluation,
            trials=trials,
            work_dir=work_dir,
            threads=threads,
            compare=not no_compare,
            check=not no_check,
            **compression,
            **inputs,
            **boards,
        )
    _show(report, output, as_json)


def _show(report: Report, output: str, as_json: bool) -> None:
    from nnfuze_tvm.report import left_in_float, no_gain, render_table, within_budget

    for note in (left_in_float(report), no_gain(report)):
        if note:
            print(f"nnfuze: {note}", file=sys.stderr)
    if as_json:
        print(report.to_json(), end="")
        return
    out().print(render_table(report))
    if report.budget is not None:
        out().print(f"{within_budget(report)}; again: --policy {os.path.join(output, 'policy.json')}", highlight=False)
    if report.check is not None:
        out().print(f"check: {report.check.text}", highlight=False)
    out().print(f"bundle: {output}   report: {os.path.join(output, 'report.html')}", highlight=False)
