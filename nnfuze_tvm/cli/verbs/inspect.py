"""``nnfuze inspect``: what is in a bundle."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out
from nnfuze_tvm.cli.options import AsJson, BundlePath

POSITION = 6


def command(
    bundle: BundlePath,
    *,
    kernels: Annotated[bool, typer.Option("--kernels", help="List the kernels, too.")] = False,
    as_json: AsJson = False,
) -> None:
    """Show what is in a bundle; it may be made for another machine."""
    from nnfuze_tvm.jobs import bundles

    found = bundles.inspect(bundle)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from nnfuze_tvm.report import render_manifest

    for part in render_manifest(found, kernels=kernels):
        out().print(part, highlight=False)
