"""``nnfuze deploy``: a bundle on a board."""

from __future__ import annotations

import json
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any

import typer

from nnfuze_tvm.cli.console import out, print_arrays, progress
from nnfuze_tvm.cli.options import AsJson, BundlePath, Insecure, SecretFile, SomeThreads, Trust, check_wait

POSITION = 4
EXAMPLES = """
Examples:

[bold]nnfuze deploy out --tracker pi.local:9190 --key rpi4[/bold]
Run random numbers through a bundle on a board, and time it there.

[bold]nnfuze deploy out --tracker pi.local:9190 --key rpi4 --inputs samples.npz --output answers.npz[/bold]
Run every sample once, and keep the outputs.
"""


def command(
    bundle: BundlePath,
    *,
    tracker: Annotated[str, typer.Option(help="RPC tracker of the board: host:port.", show_default=False)],
    key: Annotated[str, typer.Option(help="Key of the board at the tracker.", show_default=False)],
    inputs: Annotated[
        str | None, typer.Option(help="An .npz file with samples [N, …] per input; random ones by default.")
    ] = None,
    repeat: Annotated[int, typer.Option(min=1, help="How many inferences to time.")] = 20,
    output: Annotated[str | None, typer.Option("--output", "-o", help="An .npz file for the outputs.")] = None,
    threads: SomeThreads = None,
    secret_file: SecretFile = None,
    insecure: Insecure = False,
    wait: Annotated[
        float, typer.Option(help="Seconds to wait for a tracker, a board, or its answer.", callback=check_wait)
    ] = 60.0,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Upload a bundle to a board, run it there, and bring back its outputs and timings."""
    with progress() as announce:
        from nnfuze_tvm.deploy.deployment import deploy
        from nnfuze_tvm.devices.remote.tracker import Place
        from nnfuze_tvm.jobs import data

        samples = data.read_arrays(inputs, "inputs") if inputs else None
        kept: AbstractContextManager[dict[str, Any]] = data.array_file(output) if output else nullcontext({})
        with kept as arrays:
            how: dict[str, Any] = {"repeat": repeat, "threads": threads, "wait": wait, "trust": trust}
            found = deploy(bundle, Place.of(tracker, secret_file, insecure), key, samples, **how, announce=announce)
            arrays.update(data.flat(found.answers))
    if as_json:
        times = {"latency": found.median, "least": min(found.seconds), "seconds": found.seconds}
        where = {"key": key, "board": found.board, "threads": found.threads}
        what = {"written": output} if output else {"outputs": {name: a.tolist() for name, a in arrays.items()}}
        print(json.dumps({**where, **times, **what}))
        return
    from nnfuze_tvm.report import text

    out().print(
        f"{key} at {found.board}: latency {text.seconds(found.median)} (least {text.seconds(min(found.seconds))}, "
        f"{len(found.seconds)} inferences), {text.threads(found.threads)}",
        highlight=False,
    )
    print_arrays(arrays)
    if output is not None:
        out().print(f"outputs: {output}", highlight=False)
