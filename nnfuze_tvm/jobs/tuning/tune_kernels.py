"""A tuning job: every kernel's candidates compiled here, measured over RPC, and kept."""

from __future__ import annotations

import contextlib
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

import tvm
from tvm import te
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm import schedules
from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.devices import toolchain
from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.errors import DeviceError, InputError
from nnfuze_tvm.jobs.board_queue import BoardQueue
from nnfuze_tvm.jobs.fleet import Fleet
from nnfuze_tvm.jobs.pool import Pool
from nnfuze_tvm.jobs.tuning import workers
from nnfuze_tvm.jobs.tuning.directory import TuningDirectory, load_database
from nnfuze_tvm.jobs.tuning.kernels import extract
from nnfuze_tvm.jobs.tuning.loop import Loop
from nnfuze_tvm.jobs.tuning.progress import Bars, Progress

# The device ends a session that takes too long by itself; only if it doesn't, we stop listening.
_GRACE = 5.0


def tune_kernels(
    mod: tvm.IRModule,
    target: tvm.target.Target,
    *,
    trials: int,
    work_dir: str | os.PathLike[str],
    tracker: trackers.Place | None = None,
    key: str | None = None,
    progress: bool = True,
    threads: int = 1,
    timeout: float = 30.0,
    wait_for_device: float = 60.0,
    seed: int = 0,
    space: workers.Space | None = None,
) -> ms.database.JSONDatabase:
    """Measure candidate schedules of every kernel of ``mod`` on devices and keep the best ones.

    The first candidate of a kernel is the untuned schedule, so the result is never slower than that (as far
    as the device's times repeat). Kernels whose rule leaves nothing to choose are not measured.

    ``work_dir`` is the truth: a job that was stopped or killed goes on from there, with no candidate measured
    twice, and a finished one can be given more trials. See ``nnfuze_tvm.jobs.tuning.directory`` for the files.

    Parameters
    ----------
    mod : tvm.IRModule
        A fused module, from ``build.fuse``.
    target : tvm.target.Target
        What the devices are.
    trials : int
        The most candidates that are measured *per kernel*, those of earlier runs in ``work_dir`` included.
        Small spaces end earlier.
    work_dir : path
        Where the job keeps everything.
    tracker : Place, optional
        An RPC tracker. Without it, the job starts a tracker and a server on this machine and
        stops them at the end.
    key : str, optional
        The devices' key at the tracker; all devices under it are used at once, also those that come later.
    progress : bool
        Show bars on the terminal.
    threads : int
        Threads that a kernel may use while it is measured; as many as inferences will have.
    timeout : float
        Seconds that one candidate may take to compile, and again to measure.
    wait_for_device : float
        Seconds to wait for a tracker that does not answer, and for a device while none is registered; at the
        beginning, and whenever the last one has gone.
    seed : int
        Makes the choice of candidates repeatable, as far as the measured times repeat.
    space : callable, optional
        The schedule rules to tune, ``schedules.apply`` by default: ``space(sch, target, tunable)`` schedules
        the PrimFunc ``main`` of ``sch``; its knobs are ``sch.sample_categorical`` decisions, candidate 0 being
        the untuned choice. Must be importable by name.

    Returns
    -------
    tvm.s_tir.meta_schedule.database.JSONDatabase
        The best record of every tuned kernel, for ``relax.transform.MetaScheduleApplyDatabase``.

    Raises
    ------
    DeviceError
        If there is no linker for the target, no tracker or no device, or if no candidate ran at all.
    InputError
        If ``trials`` is not positive, or ``work_dir`` is in use, damaged or belongs to another target or
        device.
    KeyboardInterrupt
        On Ctrl-C, after everything was stopped.
    """
    if trials < 1:
        raise InputError(f"trials is {trials}: at least one trial per kernel is needed")
    key = _device_key(target, tracker, key)
    if space is None:
        space = schedules.apply
    if space.__module__ == "__main__":
        raise ValueError("space is defined in the main script: move it into a module that can be imported")
    _check_toolchain(target)
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(contextlib.closing(TuningDirectory(work_dir)))
        scratch = stack.enter_context(directory.scratch())
        stack.enter_context(directory.logging("tune"))
        preload = ("tvm.rpc.server", space.__module__, workers.__name__)
        nursery = stack.enter_context(Nursery(preload=preload, log=directory.process_log, scratch=scratch))
        kernels = extract(mod, target, directory.workloads)
        facts = {
            "target": str(target),
            "key": key,
            "tracker": str(tracker or "embedded"),
            "trials": trials,
            "seed": seed,
            "threads": threads,
            "versions": {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")},
            "kernels": [{"id": k.id, "name": k.name, "weight": k.weight} for k in kernels],
        }
        directory.claim(facts, fixed=("target", "key", "threads", "versions"))
        directory.write_workloads(kernels, target)
        place = tracker or stack.enter_context(trackers.EmbeddedTracker(key=key, nursery=nursery)).place
        fleet = Fleet(place, key, wait_for_device)
        display: Progress = Bars() if progress else Progress()
        stack.callback(display.stop)
        modules = {kernel.id: kernel.mod for kernel in kernels}
        compilers = Pool(nursery, os.cpu_count() or 1, timeout, workers.compile_loop, modules, target, space)
        measuring = (workers.measure_loop, place, key, timeout, threads)
        measurers = Pool(nursery, len(fleet.devices), timeout + _GRACE, *measuring, from_note=True)
        boards: BoardQueue[Any] = BoardQueue(measurers, fleet, wait_for_device, display.say)
        loop = Loop(directory, compilers, boards, fleet, scratch=scratch, limit=trials, seed=seed, display=display)
        try:
            loop.run(kernels)
        finally:
            directory.write_records()
        return load_database(directory.path)


def _device_key(target: tvm.target.Target, tracker: trackers.Place | None, key: str | None) -> str:
    """Return the key of the devices, that of this machine where there is no tracker."""
    if tracker is None:
        if not toolchain.runs_here(target):
            raise DeviceError(f"this machine can't run {target}: give the tracker of a board that can")
        return key or trackers.LOCAL_KEY
    if not key:
        raise DeviceError(f"tracker {tracker}: give the key of the devices to use, too")
    return key


def _check_toolchain(target: tvm.target.Target) -> None:
    """Link something small: fails early, and fills the linker's caches before anything is timed."""
    zeros = te.create_prim_func([te.compute((1,), lambda _: 0.0)]).with_attr("global_symbol", "main")
    with temporary.folder() as folder:
        built = tvm.compile(tvm.IRModule({"main": zeros}), target=target)
        toolchain.export_library(built, Path(folder) / "probe.so", target)
