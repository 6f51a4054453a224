"""What ``nnfuze tune`` does: networks into kernels, and a tuning job on these."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tvm
from tvm.s_tir import meta_schedule as ms
from tvm.target import Target

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices import targets, toolchain
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.errors import DeviceError, InputError, printable
from nnfuze_tvm.jobs import tuning
from nnfuze_tvm.jobs.announce import Announce, silent
from nnfuze_tvm.jobs.directory import replace
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import CompileRequest, TuneRequest, model_path
from nnfuze_tvm.reading.files import parse_json, read_file

_TRIALS = 64
# What a tuning job was asked for, kept in its directory so that it can go on without being told again.
_REQUEST_FILE = "options.json"
# What may be changed when it goes on.
_CHANGEABLE = ("trials", "tracker", "key", "secret_file", "insecure", "wait")


def tune(
    models: Sequence[str] | None = None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    announce: Announce = silent,
    progress: bool = False,
    **fields: Any,
) -> ms.database.JSONDatabase:
    """Tune the kernels of the merged network; `compile` with the same ``work_dir`` uses what was found.

    Parameters
    ----------
    models : sequence of str, optional
        ONNX files, ``path`` or ``task=path``. Without them the job in ``work_dir`` goes on.
    work_dir : path
        Where the job keeps everything; an interrupted one goes on.
    announce : callable
        Is told what is being done, in a few words.
    progress : bool
        Whether to show bars on the terminal.
    **fields
        ``trials``, the most candidates to measure per kernel (64), and the fields of `compile` but ``evaluation`` and
        ``compare``. Without models only ``trials``, ``wait`` and
        what says where the boards are may be given.

    Returns
    -------
    tvm.s_tir.meta_schedule.database.JSONDatabase
        The best record of every tuned kernel.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or no device answers.
    """
    if models:
        request = TuneRequest.parse(models, {"trials": _TRIALS, **fields, "work_dir": _text(work_dir)})
    else:
        request = _saved_request(_text(work_dir), fields)
    if request.work_dir is None:
        raise InputError("--work-dir: give the directory of the tuning job")
    if request.trials < 1:
        raise InputError(f"--trials {request.trials}: tuning needs at least one trial per kernel")
    target = targets.resolve(request.target)
    check_device(request, target)
    trackers.check_reachable(request.place, request.key, request.wait)
    graphs = make_graphs(request, announce)
    return tune_graph(graphs.last, target, request, request.work_dir, announce, progress)


def check_device(request: TuneRequest, target: Target) -> None:
    """Check that candidates can be measured.

    Raises
    ------
    DeviceError
        If there is neither a tracker nor a processor here that runs the target's code.
    """
    if request.tracker is None and not toolchain.runs_here(target):
        key = request.target if request.target.isalnum() else "KEY"
        raise DeviceError(
            f"--target {printable(request.target, 60)}: this machine can't run its code; to tune on a board, give "
            f"--tracker host:port --key {key}"
        )


def tune_graph(
    graph: tvm.IRModule, target: Target, request: TuneRequest, work_dir: str, announce: Announce, progress: bool
) -> ms.database.JSONDatabase:
    """Tune the kernels of a graph, and keep in ``work_dir`` what is needed to go on."""
    announce(f"tuning, up to {request.trials} trials per kernel")
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        given = {name: getattr(request, name) for name in ("calibration", "policy", "finetune", "merge")}
        absolute = {name: os.path.abspath(path) for name, path in given.items() if path is not None}
        absolute["models"] = [_absolute(model) for model in request.models]
        fields = request.model_copy(update=absolute).to_fields()
        replace(Path(work_dir) / _REQUEST_FILE, json.dumps(fields, indent=1) + "\n")
    except OSError as error:
        raise InputError(f"--work-dir {work_dir}: can't be written ({error.strerror})") from None
    return tuning.tune_kernels(
        build.fuse(graph, target),
        target,
        trials=request.trials,
        work_dir=work_dir,
        tracker=request.place,
        key=request.key,
        progress=progress,
        threads=request.threads,
        wait_for_device=request.wait,
    )


def found_earlier(work_dir: str) -> ms.database.JSONDatabase:
    """Return what an earlier tuning job found.

    Raises
    ------
    InputError
        If there was none, or its database is damaged.
    """
    if not tuning.has_records(work_dir):
        raise InputError(f"--work-dir {work_dir}: no tuning records in it; give --trials to make some")
    return tuning.load_database(work_dir)


def _saved_request(work_dir: str | None, changes: Mapping[str, Any]) -> TuneRequest:
    """Return what a tuning job was started with, with some of it changed."""
    for name in changes:
        if name not in _CHANGEABLE:
            raise InputError(f"option {name!r}: a job that goes on takes {', '.join(_CHANGEABLE)}, and no other")
    if work_dir is None:
        raise InputError("nnfuze tune: give networks to tune, or the --work-dir of a job to go on with")
    path = Path(work_dir) / _REQUEST_FILE
    try:
        fields = parse_json(read_file(path))
        models = fields.pop("models")
    except (OSError, ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"--work-dir {work_dir}: no tuning job to go on with; give the networks, too") from None
    # The job may be that of a compilation.
    return CompileRequest.parse(models, {**fields, **changes, "work_dir": work_dir})


def _text(path: str | os.PathLike[str] | None) -> str | None:
    return None if path is None else os.fspath(path)


def _absolute(model: str) -> str:
    path = model_path(model)
    return model[: len(model) - len(path)] + os.path.abspath(path)
