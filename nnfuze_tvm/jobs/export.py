"""What ``nnfuze export`` does: networks merged and compressed, as one ONNX file for any engine."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.runner import signature
from nnfuze_tvm.errors import CheckError, InputError, first_line
from nnfuze_tvm.frontend.export import export as to_onnx
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.jobs.announce import Announce, silent
from nnfuze_tvm.jobs.check.differences import largest, tolerated, typical
from nnfuze_tvm.jobs.check.originals import How, calls_of
from nnfuze_tvm.jobs.check.samples import samples
from nnfuze_tvm.jobs.check.unsaturated import multiplies_bytes
from nnfuze_tvm.jobs.data import Arrays, EvaluationData
from nnfuze_tvm.jobs.destination import destination, whole
from nnfuze_tvm.jobs.graphs import Graphs, make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest, model_path

# Largest differences relative to an output's range, in float32 and where there is float16; typical ones where 8 bits
# may be a step off.
_TOLERANCE, _HALF, _STEPS = 1e-4, 2e-2, 1e-2
# Seconds after which no further sample is tried.
_PATIENCE = 20.0

# What ONNX Runtime raises where a file is no network, by name, since it may be missing.
_REFUSED = frozenset({"Fail", "InvalidGraph", "InvalidProtobuf"})


@dataclass(frozen=True)
class Exported:
    """What was exported.

    Attributes
    ----------
    inputs, outputs : list of str
        Names, states last.
    nodes, macs, bytes : int
        Nodes of the network, its multiply-accumulates, and the file's size.
    check : str
        What ONNX Runtime says of it.
    """

    inputs: list[str]
    outputs: list[str]
    nodes: int
    macs: int
    bytes: int
    check: str


def export(
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    check: bool = True,
    announce: Announce = silent,
    **fields: Any,
) -> Exported:
    """Merge and compress networks, and write the result as one ONNX file.

    Parameters
    ----------
    models : sequence of str
        The networks, ``path`` or ``task=path``.
    output : path
        The file.
    force : bool
        Replace a file that is already there.
    check : bool
        Compare ONNX Runtime's answers, where it is installed, with those of the graph that was written.
    announce : callable
        Is told what is being done, in a few words.
    **fields
        Those of `jobs.compile.compile` that are about networks and compression.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or ONNX has no form for something; nothing is written then.
    CheckError
        If ONNX Runtime computes something else; nothing is written then, either.
    """
    request = NetworkRequest.parse(models, fields)
    path = _destination(output, models, force)
    graphs = make_graphs(request, announce, portable=True)
    announce("exporting")
    model = to_onnx(graphs.last)
    data = model.SerializeToString()
    said = "not checked"
    if check:
        announce("checking")
        said = _check(graphs, data)
    with whole(path, output) as file:
        file.write_bytes(data)
    return _described(graphs.last, model, len(data), said)


def _destination(output: str | os.PathLike[str], models: Sequence[str], force: bool) -> Path:
    path = destination(output, force=force)
    if any(path.exists() and path.samefile(model_path(model)) for model in models):
        raise InputError(f"--output {output}: is one of the networks; give the name of a new file")
    if path.suffix != ".onnx":
        raise InputError(f"--output {output}: what is written is an ONNX file; give a name that ends in .onnx")
    return path


def _described(mod: tvm.IRModule, model: onnx.ModelProto, size: int, said: str) -> Exported:
    graph = model.graph
    inputs, outputs = ([value.name for value in values] for values in (graph.input, graph.output))
    return Exported(inputs, outputs, len(graph.node), sum(layer.macs for layer in metrics.layers(mod)), size, said)


def _check(graphs: Graphs, data: bytes) -> str:
    try:
        import onnxruntime  # noqa: F401
    except ImportError:
        return "not checked: for that, pip install onnxruntime"
    try:
        return _compare(graphs, data)
    except CheckError:
        raise
    except Exception as error:
        if type(error).__name__ in _REFUSED:
            raise CheckError(
                f"check: ONNX Runtime can't run the file ({first_line(error)[:200]}); this is a fault of nnfuze: "
                "please report it; --no-check writes the file all the same"
            ) from None
        # That something can't be compared doesn't say that it is wrong: there are kernels that it doesn't have.
        return f"could not be checked: {first_line(error)}"


def _compare(graphs: Graphs, data: bytes) -> str:
    """Return what a comparison with ONNX Runtime says, which computes node by node and then as it likes best."""
    mod = graphs.last
    given, want = _answers(graphs)
    model = onnx.ModelProto.FromString(data)

    def differences(how: How) -> tuple[list[float], list[float]]:
        run = calls_of(model, how)
        got = [run(sample) for sample in given]
        return largest(got, want), typical(got, want)

    plain, usual = differences("plain"), differences("usual")
    kinds = {str(b.var.ty.dtype) for b in bindings(mod["main"]) if hasattr(b.var.ty, "dtype")}
    limit = _HALF if kinds & {"float16", "bfloat16"} else _TOLERANCE
    note = ""
    if max(usual[0], default=0.0) > limit and multiplies_bytes(model):
        exact = differences("exact")
        if max(exact[0]) < max(usual[0]):
            note = f"; it saturates products of bytes on CPUs such as this one, and is off by {max(usual[0]):.1g} then"
            usual = exact
    errors, steady = ([max(pair) for pair in zip(*both, strict=True)] for both in zip(plain, usual, strict=True))
    worst = max(errors, default=0.0)
    if worst <= limit:
        return f"ONNX Runtime's answers differ by at most {worst:.1g} of their range{note}"
    limits = [max(limit, each) for each in tolerated(mod, given, None, errors, want)]
    steps = _STEPS if "int8" in graphs.stages else 0.0
    for n, owner in enumerate(ir.task_outputs(mod)):
        if errors[n] > limits[n] and steady[n] > steps:
            raise CheckError(
                f"check: task {owner.task!r}: output {owner.name!r} differs in ONNX Runtime by {errors[n]:.2g} of its "
                f"range ({limits[n]:.2g} is allowed); this is a fault of nnfuze: please report it; --no-check writes "
                "the file all the same"
            )
    return f"ONNX Runtime's answers differ by {worst:.1g} of their range, by what rounding does to this network{note}"


def _answers(graphs: Graphs) -> tuple[list[Arrays], list[list[np.ndarray]]]:
    """Return samples that follow each other, and the answers to each."""
    run, states = evaluate.executor(graphs.last), graphs.wiring.zeros()
    given: list[Arrays] = []
    want: list[list[np.ndarray]] = []
    started = time.perf_counter()
    for inputs in samples(graphs, signature(graphs.last).inputs, EvaluationData()):
        given.append({**inputs, **states})
        want.append(run(given[-1]))
        states = dict(zip(states, want[-1][len(want[-1]) - len(states) :], strict=True))
        if time.perf_counter() - started > _PATIENCE:
            break
    return given, want
