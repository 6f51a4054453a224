"""``nnfuze policy``: compression policies written, checked and explained."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out, progress
from nnfuze_tvm.cli.options import AsJson, Calibration, Inputs, Models, Target, check_files, spread

POSITION = 2.7
_EXAMPLES = """
Examples:

[bold]nnfuze policy init keyword.onnx speaker.onnx --calibration calibration.npz -o policy.json[/bold]
Write a policy with every layer's costs as comments, to be filled in.

[bold]nnfuze policy check policy.json keyword.onnx speaker.onnx[/bold]
Does it fit these networks?

[bold]nnfuze policy show policy.json keyword.onnx speaker.onnx[/bold]
What it means, layer by layer.
"""

app = typer.Typer(
    help="Write, check and explain compression policies.",
    epilog=_EXAMPLES,
    rich_markup_mode="rich",
    no_args_is_help=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)

File = Annotated[str, typer.Argument(metavar="POLICY", help="The policy's file.", show_default=False)]


def init(
    models: Models,
    *,
    output: Annotated[str, typer.Option("--output", "-o", help="The policy's file.", show_default=False)],
    calibration: Calibration = None,
    target: Target = "host",
    inputs: Inputs,
    time: Annotated[bool, typer.Option(help="Build the kernels, and say how long each takes.")] = True,
    force: Annotated[bool, typer.Option("--force", help="Replace a file that is already there.")] = False,
) -> None:
    """Write a policy that changes nothing yet, with every layer's costs as comments.

    With --calibration, also what it costs to remove a layer's channels.
    """
    check_files(models, inputs)
    with progress() as announce:
        from nnfuze_tvm.jobs.policies import write_policy

        facts = write_policy(
            models, output, force=force, timed=time, announce=announce, calibration=calibration, target=target, **inputs
        )
    out().print(f"{output}: {len(facts)} layers", highlight=False)


def check(policy: File, models: Models, *, inputs: Inputs) -> None:
    """Say whether a policy fits networks: an error names the first thing that doesn't."""
    check_files(models, inputs)
    with progress() as announce:
        from nnfuze_tvm.jobs.policies import explained

        facts, asked = explained(models, policy, announce=announce, **inputs)
    what = f"asks for {', '.join(asked)}" if asked else "asks for nothing"
    out().print(f"{policy}: fits {len(facts)} layers; {what}", highlight=False)


def show(policy: File, models: Models, *, inputs: Inputs, as_json: AsJson = False) -> None:
    """Say what a policy means, layer by layer."""
    check_files(models, inputs)
    with progress() as announce:
        from nnfuze_tvm.jobs.policies import explained

        facts, _ = explained(models, policy, announce=announce, **inputs)
    if as_json:
        print(json.dumps([asdict(each) for each in facts], indent=1))
        return
    from nnfuze_tvm.report.policies import render_policy

    out().print(render_policy(facts), highlight=False)


for _command in (init, check, show):
    app.command(_command.__name__)(spread(_command, complete=True))
