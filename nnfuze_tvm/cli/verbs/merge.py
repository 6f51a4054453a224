"""``nnfuze merge``: networks that were trained apart in, the same with a common trunk out."""

from __future__ import annotations

import os
from typing import Annotated, Any

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import SHARE_INPUT, AsJson, check_files
from nnfuze_tvm.reading.limits import MOST_EPOCHS

POSITION = 2.2
EXAMPLES = """
Examples:

[bold]nnfuze merge keyword.onnx speaker.onnx --data unlabelled.npz -o merged[/bold]
Make two networks share a trunk, as deep as they lose at most one point of agreement with what they were.

[bold]nnfuze compile merged/*.onnx -o out[/bold]
Compile them; the common trunk is computed once.

[bold]nnfuze merge -o merged[/bold]
Go on with a merge that was interrupted.
"""


def command(
    models: Annotated[
        list[str] | None,
        typer.Argument(
            help="ONNX files over the same inputs, PATH or TASK=PATH; without them the merge in --output goes on.",
            show_default=False,
        ),
    ] = None,
    *,
    output: Annotated[
        str, typer.Option("--output", "-o", help="Directory of the merged networks and the job.", show_default=False)
    ],
    data: Annotated[
        str | None, typer.Option(help="What to learn from: an .npz file with samples [N, …] per input, no labels.")
    ] = None,
    share_input: Annotated[list[str] | None, SHARE_INPUT] = None,
    evaluation: Annotated[
        str | None, typer.Option(help="Inputs to judge by, in the same form; labels [N] under the tasks' names.")
    ] = None,
    budget: Annotated[
        float | None,
        typer.Option(
            help="Points that a task may lose, 0 to 100, 1 for a new merge: of accuracy where there are labels, else "
            "of agreement with what it was."
        ),
    ] = None,
    epochs: Annotated[
        int | None, typer.Option(help=f"How often a trial sees each sample, 1 to {MOST_EPOCHS}; 20 for a new merge.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of what is random; 0 for a new merge.")] = None,
    threads: Annotated[int | None, typer.Option(help="Threads to learn with; 1 for a new merge.")] = None,
    as_json: AsJson = False,
) -> None:
    """Let networks that were trained apart share a trunk, learnt from samples without labels.

    Interrupted, it goes on where it stopped: nnfuze merge -o DIR
    """
    if models:
        check_files(models, {"shapes": {}})
    given: dict[str, Any] = {"shared_inputs": share_input, "evaluation": evaluation, "budget": budget, "epochs": epochs}
    given |= {"seed": seed, "threads": threads}
    given = {name: value for name, value in given.items() if value is not None}
    with progress() as announce:
        from nnfuze_tvm.jobs.merge import merge

        report = merge(models, output, data=data, announce=announce, **given)
    if as_json:
        print(report.to_json(), end="")
        return
    from nnfuze_tvm.report.merging import render_merge

    for part in render_merge(report):
        out().print(part, highlight=False)
    networks, page = (os.path.join(output, name) for name in ("*.onnx", "report.html"))
    out().print(f"networks: {networks}   report: {page}", highlight=False)
