"""``nnfuze inspect``: what is in a bundle."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out
from nnfuze_tvm.cli.options import AsJson, BundlePath, Trust

POSITION = 6


def command(
    bundle: BundlePath,
    *,
    kernels: Annotated[bool, typer.Option("--kernels", help="List the kernels, too.")] = False,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Show what a bundle says of itself, without running any of it; it may be made for another machine."""
    from nnfuze_tvm.jobs import bundles

    found = bundles.inspect(bundle, trust)
    if as_json:
        print(json.dumps(found, indent=1))
        return
    from nnfuze_tvm.report import render_manifest

    for part in render_manifest(found, kernels=kernels):
        out().print(part, highlight=False)
    signed = f"signed with the key of {trust}" if trust else "signed; see --trust" if found["signed"] else "not signed"
    print(f"{signed}. Loading a bundle runs its code: load those of people you trust.")
