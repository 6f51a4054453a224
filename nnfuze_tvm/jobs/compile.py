"""What ``nnfuze compile`` does, from the options to the bundle and its report."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

from nnfuze_tvm.deploy.bundle import check_destination
from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.jobs.announce import NOTE, Announce, silent
from nnfuze_tvm.jobs.data import EvaluationData, evaluation_data, read_arrays
from nnfuze_tvm.jobs.dump import open_dump
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import CompileRequest
from nnfuze_tvm.jobs.tune import check_device
from nnfuze_tvm.report import Report


def compile(
    models: Sequence[str],
    output: str | os.PathLike[str],
    *,
    force: bool = False,
    dump_ir: str | os.PathLike[str] | None = None,
    announce: Announce = silent,
    progress: bool = False,
    **fields: Any,
) -> Report:
    """Compile networks into a bundle, with its report in ``report.json`` and ``report.html``.

    Parameters
    ----------
    models : sequence of str
        ONNX files, one per task: ``path`` or ``task=path``.
    output : path
        The bundle's directory.
    force : bool
        Replace a bundle that is already there.
    dump_ir : path, optional
        A directory for the module after every pass, as text.
    announce : callable
        Is told what is being done, in a few words.
    progress : bool
        Whether tuning shows bars on the terminal.
    **fields
        As on the command line; ``nnfuze compile --help`` has them all:

        - ``target`` (``host``), ``threads`` (1): the machine, see `devices.targets.resolve`;
        - ``optimize``: ``speed``, or ``memory``: weights stay as small as they are and are used where they lie;
        - ``calibration``, ``evaluation``: ``.npz`` files with samples ``[N, …]`` by input, the evaluation's perhaps
          with labels ``[N]`` by task;
        - ``quantize``, ``prune``, …: the options of the compression methods; ``policy``, a file that says them layer
          by layer;
        - ``shared_inputs``: names of inputs that are one and the same in all tasks; ``shapes``: shapes of inputs by
          name or ``task:name``, where the files leave them open;
        - ``chains``, ``states``: inputs that are outputs of other networks (``heads.x=embedding:0``) or of the same
          one at the call before (``h=next_h``), see `graph.links.wire`;
        - ``trials`` (0) per kernel of tuning, kept in ``work_dir``, with ``tracker`` (``host:port``), ``key`` and
          ``wait`` (60 s) on boards;
        - ``compare`` (True): build and measure every stage for the report, not only the last;
        - ``check`` (True): compare what was built with the networks as they were given, on a few samples.

    Returns
    -------
    Report
        What the compilation achieved.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or there is no such option; nothing is written then.
    CheckError
        If what was built doesn't compute what the networks compute; nothing is written then, either.
    """
    request = CompileRequest.parse(models, fields)
    target = targets.resolve(request.target)
    if request.trials:
        check_device(request, target)
    arrays = read_arrays(request.evaluation, "evaluation data") if request.evaluation else {}
    destination = check_destination(output, force=force)
    if os.path.islink(output):
        announce(f"{NOTE}replacing {destination}, which {output} points to")
    dump = open_dump(dump_ir, output)
    trackers.check_reachable(request.place, request.key, request.wait)
    data: list[EvaluationData] = []
    with dump:
        graphs = make_graphs(
            request, announce, on_merged=lambda mod: data.append(evaluation_data(mod, request.evaluation, arrays))
        )
    # With all that schedules kernels: what can be said before is said before.
    from nnfuze_tvm.jobs.write_bundle import write_bundle

    return write_bundle(
        request, graphs, data[0], target, output, force=force, dump=dump, announce=announce, bars=progress
    )
