"""``nnfuze run``: a bundle on arrays from files."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out, print_arrays
from nnfuze_tvm.cli.options import AsJson, BundlePath, SomeThreads, Trust

POSITION = 3


def command(
    bundle: BundlePath,
    *,
    input: Annotated[
        list[str],
        typer.Option(
            help="An input: name=array.npy, once per input, or an .npz file with all of them; [N, …] for N inferences.",
            show_default=False,
        ),
    ],
    output: Annotated[str | None, typer.Option("--output", "-o", help="Directory for one .npy file per task.")] = None,
    as_json: AsJson = False,
    threads: SomeThreads = None,
    trust: Trust = None,
) -> None:
    """Run a bundle on arrays from files, once or several times in a row.

    A bundle is a program: run those of people you trust.
    """
    from nnfuze_tvm.jobs import bundles, data

    answers = bundles.run(bundles.load_bundle(bundle, threads, trust), data.read_inputs(input))
    arrays = data.flat(answers)
    if output is not None:
        for path in data.save_answers(answers, output):
            out().print(str(path), highlight=False)
    elif as_json:
        print(json.dumps({name: array.tolist() for name, array in arrays.items()}))
    else:
        print_arrays(arrays)
