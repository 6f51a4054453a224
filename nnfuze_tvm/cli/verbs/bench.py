"""``nnfuze bench``: a bundle's latency on this machine."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from nnfuze_tvm.cli.console import out
from nnfuze_tvm.cli.options import AsJson, BundlePath, SomeThreads, Trust

POSITION = 5


def command(
    bundle: BundlePath,
    *,
    repeats: Annotated[int, typer.Option(min=1, help="How many inferences to time.")] = 500,
    threads: SomeThreads = None,
    trust: Trust = None,
    as_json: AsJson = False,
) -> None:
    """Measure a bundle's latency on this machine, kernel by kernel."""
    from nnfuze_tvm.jobs import bundles

    result = bundles.bench(bundles.load_bundle(bundle, threads, trust), repeats)
    if as_json:
        print(json.dumps(result, indent=1))
        return
    from nnfuze_tvm.report import KernelTime, render_kernels, text

    out().print(
        f"latency {text.seconds(result['latency'])} (p95 {text.seconds(result['latency_p95'])}), "
        f"{text.rate(result['throughput'])}, {text.threads(result['threads'])}, "
        f"{text.size(result['bytes'])} on disk with its manifest",
        highlight=False,
    )
    out().print(render_kernels([KernelTime(**kernel) for kernel in result["kernels"]]))
