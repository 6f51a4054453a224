"""What ``nnfuze analyze`` does: a network's kernels built and timed, beside what the machine can do."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import tvm
from tvm.target import Target

from nnfuze_tvm.analysis import measure, metrics, roofline
from nnfuze_tvm.analysis.kernels import Analysis, kernel_uses
from nnfuze_tvm.analysis.roofline import Machine
from nnfuze_tvm.deploy import build, loading
from nnfuze_tvm.deploy.bundle import unfit
from nnfuze_tvm.deploy.manifest import MANIFEST, describe_target
from nnfuze_tvm.devices import cpu, targets
from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.errors import DeviceError, InputError, last_line
from nnfuze_tvm.jobs.announce import Announce, silent
from nnfuze_tvm.jobs.dump import open_dump
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest, model_path
from nnfuze_tvm.jobs.tune import found_earlier


def analyze(
    models: Sequence[str],
    *,
    dump_ir: str | os.PathLike[str] | None = None,
    announce: Announce = silent,
    **fields: Any,
) -> Analysis:
    """Build the network's kernels, time each of them and the machine, and say what each is bound by.

    Code for another CPU is not run without a tracker: then the catalogue's figures of the board are taken, no kernel is
    compiled further than to its loops, and nothing is timed.

    Parameters
    ----------
    models : sequence of str
        ONNX files, ``path`` or ``task=path``.
    dump_ir : path, optional
        A directory for the module after every pass, as text.
    announce : callable
        Is told what is being done, in a few words.
    **fields
        See `request.NetworkRequest`.

    Raises
    ------
    NNFuzeError
        If anything given doesn't fit, or the target can neither be measured nor is a board of the catalogue.
    """
    request = NetworkRequest.parse(models, fields)
    _refuse_bundles(models)
    target = targets.resolve(request.target)
    misfit = unfit(describe_target(target)) if request.tracker is None else None
    expected = roofline.of_board(target, request.threads) if misfit or request.tracker else None
    if misfit:
        _check_catalogue(request.target, target, request.threads, misfit, expected)
    trackers.check_reachable(request.place, request.key, request.wait)
    with open_dump(dump_ir):
        graphs = make_graphs(request, announce)
        database = found_earlier(request.work_dir) if request.work_dir else None
        announce("building the kernels")
        fused = build.fuse(graphs.last, target)
        lowered = build.schedule(fused, target, database)
    times: dict[str, float] = {}
    if misfit and expected:
        machine = expected
    else:
        with _session(request.place, request.key) as (remote, source):
            machine, times = _measure(lowered, target, request.threads, remote, source, announce)
    uses = kernel_uses(graphs.last, fused, lowered, target, machine, times)
    return Analysis(uses, machine, None if misfit else expected)


def _refuse_bundles(models: Sequence[str]) -> None:
    for model in models:
        if (Path(model_path(model)) / MANIFEST).is_file():
            raise InputError(
                f"{model}: a bundle holds machine code only; give the ONNX files and the options it was compiled with"
            )


def _check_catalogue(name: str, target: Target, threads: int, misfit: str, expected: Machine | None) -> None:
    """Check that the catalogue knows the board that is not at hand."""
    if expected is None:
        known = ", ".join(board.name for board in CATALOGUE if roofline.of_board(Target(board.target)))
        raise InputError(
            f"--target {name}: {misfit}, and the catalogue doesn't say how fast such a board is; give the "
            f"--tracker and --key of one, or name a board ({known})"
        )
    if threads > (cores := Hardware.of(target).cores):
        raise InputError(f"--threads {threads}: {name} has {cores} cores")


def _measure(
    lowered: tvm.IRModule,
    target: Target,
    threads: int,
    remote: tvm.rpc.RPCSession | None,
    source: str,
    announce: Announce,
) -> tuple[Machine, dict[str, float]]:
    """Return what this machine or a board can do, and the seconds of one call of each kernel on it."""
    kernels = metrics.kernels(lowered)
    functions = {k.name: lowered[k.name].with_attr("global_symbol", k.name) for k in kernels}
    with temporary.folder() as scratch:
        path = Path(scratch) / "kernels.so"
        with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
            export_library(tvm.compile(tvm.IRModule(functions), target=target), path, target)
        announce("measuring the machine")
        machine = roofline.measure(target, threads, remote, source)
        announce("measuring the kernels")
        if remote is None:
            library, device = loading.load(path), tvm.cpu()
        else:
            remote.upload(str(path))
            library, device = remote.load_module(path.name), remote.cpu()
        return machine, measure.kernel_times(library, [(k.name, k.arguments) for k in kernels], device)


@contextmanager
def _session(tracker: trackers.Place | None, key: str | None) -> Iterator[tuple[tvm.rpc.RPCSession | None, str]]:
    """Open a session on a board and say what it is called; without a tracker, None stands for this machine."""
    if tracker is None or key is None:
        yield None, cpu.name()
        return
    remote = None
    try:
        remote, board = trackers.request(trackers.connect(tracker), key)
        yield remote, f"{key} at {board}"
    except (OSError, RuntimeError, tvm.error.RPCError) as error:
        raise DeviceError(f"device {key!r} of tracker {tracker}: measuring failed ({last_line(error)})") from None
    finally:
        if remote is not None:
            trackers.end_session(remote)
