"""``nnfuze analyze``: every kernel beside what the machine could do."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import (
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
)

POSITION = 2
EXAMPLES = """
Examples:

[bold]nnfuze analyze keyword.onnx --threads 2[/bold]
Measure on this machine.

[bold]nnfuze analyze keyword.onnx --target rpi4 --tracker pi.local:9190 --key rpi4[/bold]
Measure on a board.

[bold]nnfuze analyze keyword.onnx --target rpi4[/bold]
What a board would allow that is not at hand, by the catalogue.
"""


def command(
    models: Models,
    *,
    target: Target = "host",
    optimize: Optimize = "speed",
    calibration: Calibration = None,
    compression: Compression,
    inputs: Inputs,
    boards: Boards,
    work_dir: Annotated[
        str | None, typer.Option(help="Directory of a tuning job whose results the kernels are built with.")
    ] = None,
    threads: Threads = 1,
    dump_ir: DumpIR = None,
    as_json: AsJson = False,
) -> None:
    """Time every kernel beside what the machine could do at most, and say what holds it back.

    For a board without --tracker and --key: the least times that the catalogue's figures of it allow.
    """
    with progress() as announce:
        from nnfuze_tvm.jobs.analyze import analyze

        analysis = analyze(
            models,
            dump_ir=dump_ir,
            announce=announce,
            target=target,
            optimize=optimize,
            calibration=calibration,
            work_dir=work_dir,
            threads=threads,
            **compression,
            **inputs,
            **boards,
        )
    if as_json:
        print(json.dumps(analysis.to_dict(), indent=1))
        return
    from nnfuze_tvm.report.roofline import render_analysis

    for part in render_analysis(analysis):
        out().print(part, highlight=False)
