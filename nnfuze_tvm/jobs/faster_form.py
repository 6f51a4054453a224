"""Which form of a network is faster on its target: with integers, or in floats."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnfuze_tvm.analysis import measure
from nnfuze_tvm.devices.remote.timing import time_on_device
from nnfuze_tvm.jobs.announce import Announce
from nnfuze_tvm.jobs.build_stages import Builder, Built
from nnfuze_tvm.jobs.data import Arrays
from nnfuze_tvm.jobs.graphs import Graphs
from nnfuze_tvm.jobs.request import CompileRequest
from nnfuze_tvm.report import text

# What is measured is slower if it takes so much longer: two measurements of the same code differ by less.
_NOISE = 1.03


def why_floats(
    request: CompileRequest,
    graphs: Graphs,
    builder: Builder,
    built: Sequence[Built],
    sample: Arrays,
    announce: Announce,
) -> str:
    """Say why a network should stay in floats: on this machine, or on the board, it is slower with integers.

    Parameters
    ----------
    request : CompileRequest
        What was asked for.
    graphs : Graphs
        The stages' graphs, with an ``int8`` one.
    builder : Builder
        Builds for the target.
    built : sequence of Built
        The stages; the last one has integers.
    sample : mapping of str to np.ndarray
        Inputs of one inference.
    announce : callable
        Is told what is being done.

    Returns
    -------
    str
        Both times; empty where integers are no slower, or nothing can be measured.
    """
    place, key = request.place, request.key
    on_board = place is not None and key is not None
    if not builder.here and not on_board:
        return ""
    announce("comparing with float32")
    name, graph = graphs.in_floats
    floats = next((one for one in built if one.record.name == name), None) or builder.build(name, [graph])
    if place is not None and key is not None:
        networks = {"float32": floats.networks(sample), "int8": built[-1].networks(sample)}
        times, _ = time_on_device(place, key, networks, threads=request.threads, wait=request.wait)
        seconds = {form: float(np.median(values)) for form, values in times.items()}
    else:
        calls = {"float32": floats.caller(sample), "int8": built[-1].caller(sample)}
        seconds = {form: latency.median for form, latency in measure.measure_interleaved(calls).items()}
    if seconds["int8"] <= _NOISE * seconds["float32"]:
        return ""
    return f"float32 takes {text.seconds(seconds['float32'])}, int8 {text.seconds(seconds['int8'])}"
