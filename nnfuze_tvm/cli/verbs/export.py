"""``nnfuze export``: networks in, one merged and compressed ONNX file out."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import AsJson, Calibration, Compression, Inputs, Models, check_files

POSITION = 2.5
EXAMPLES = """
Examples:

[bold]nnfuze export keyword.onnx speaker.onnx -o merged.onnx[/bold]
Merge two networks into one file; their common trunk is computed once.

[bold]nnfuze export keyword.onnx speaker.onnx --quantize int8 --calibration calibration.npz -o merged.onnx[/bold]
The same in int8, with QuantizeLinear and DequantizeLinear.
"""


def command(
    models: Models,
    *,
    output: Annotated[str, typer.Option("--output", "-o", help="The ONNX file.", show_default=False)],
    calibration: Calibration = None,
    compression: Compression,
    inputs: Inputs,
    no_check: Annotated[
        bool, typer.Option("--no-check", help="Don't compare ONNX Runtime's answers, if it is installed, with ours.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is already there.")] = False,
    as_json: AsJson = False,
) -> None:
    """Merge and compress networks into one ONNX file, for any engine."""
    check_files(models, inputs, calibration=calibration)
    with progress() as announce:
        from nnfuze_tvm.jobs.export import export

        written = export(
            models,
            output,
            force=force,
            check=not no_check,
            announce=announce,
            calibration=calibration,
            **compression,
            **inputs,
        )
    if as_json:
        print(json.dumps({"path": output, **asdict(written)}, indent=1))
        return
    from nnfuze_tvm.report import text

    out().print(f"inputs: {', '.join(written.inputs)}   outputs: {', '.join(written.outputs)}", highlight=False)
    size = f"{written.nodes} nodes, {text.count(written.macs)} MACs, {text.size(written.bytes)}"
    out().print(f"{output}: {size}", highlight=False)
    out().print(f"check: {written.check}", highlight=False)
