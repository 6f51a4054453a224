"""Runs commands on hostile input, each in a fork of one process that has imported everything; judges how they end."""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import pkgutil
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# Of processor time, and on any clock.
SECONDS, PATIENCE = 10, 60
LONGEST = 300


@dataclass(frozen=True)
class Case:
    """A command line and the exit codes that are right for it; paths in it are absolute or in an empty directory."""

    name: str
    arguments: Sequence[str | Path]
    codes: tuple[int, ...] = (2,)


@dataclass(frozen=True)
class Outcome:
    """How a case ended; ``faults`` are what is wrong with that."""

    case: Case
    code: int
    seconds: float
    errors: str
    faults: list[str]


def import_everything() -> None:
    """Import what verbs import when they run, so that forks need not."""
    import nnfuze_tvm
    from nnfuze_tvm.errors import NNFuzeError

    for module in pkgutil.walk_packages(nnfuze_tvm.__path__, "nnfuze_tvm."):
        # PyTorch is not there.
        with contextlib.suppress(NNFuzeError):
            if not module.name.endswith("__main__"):
                importlib.import_module(module.name)
    for name in ("onnx.reference", "onnxruntime", "tvm.rpc.server"):
        importlib.import_module(name)


def run(cases: Sequence[Case], folder: Path, workers: int = 2) -> Iterator[Outcome]:
    """Run all cases, some at a time, each in an empty directory below ``folder``."""
    # What is never freed is not copied for every fork.
    gc.collect()
    gc.freeze()
    waiting = list(enumerate(cases))[::-1]
    running: dict[int, tuple[Case, Path, float]] = {}
    while waiting or running:
        while waiting and len(running) < workers:
            number, case = waiting.pop()
            directory = folder / f"run{number}"
            running[_start(case, directory)] = case, directory, time.monotonic()
        pid, status, seconds = _next(running)
        case, directory, started = running.pop(pid)
        late = seconds > SECONDS or time.monotonic() - started > PATIENCE
        # Whatever it has started ends with it.
        _end_group(pid)
        code = os.waitstatus_to_exitcode(status)
        errors = (directory / "stderr").read_text(errors="surrogateescape")
        faults = [f"not within {SECONDS} s of processor time"] if late else _faults(case, code, errors, directory)
        yield Outcome(case, code, seconds, errors, faults)
        shutil.rmtree(directory, ignore_errors=True)


def _start(case: Case, directory: Path) -> int:
    for name in ("cwd", "tmp", "home"):
        (directory / name).mkdir(parents=True)
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return pid
    code = 70
    try:
        os.setpgid(0, 0)
        _enter(directory)
        from nnfuze_tvm import cli

        sys.argv = ["nnfuze", *map(str, case.arguments)]
        try:
            cli.main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def _enter(directory: Path) -> None:
    """Become a process as a shell would start it in an empty directory."""
    for number, name in ((0, os.devnull), (1, directory / "stdout"), (2, directory / "stderr")):
        file = os.open(name, os.O_RDWR | os.O_CREAT, 0o600)
        os.dup2(file, number)
        os.close(file)
    os.chdir(directory / "cwd")
    for name in ("XDG_STATE_HOME", "XDG_CACHE_HOME"):
        os.environ.pop(name, None)
    os.environ.update(HOME=str(directory / "home"), TMPDIR=str(directory / "tmp"))
    tempfile.tempdir = None
    resource.setrlimit(resource.RLIMIT_CPU, (2 * SECONDS, 2 * SECONDS))


def _next(running: dict[int, tuple[Case, Path, float]]) -> tuple[int, int, float]:
    """Wait until one has ended, or end one that is late; return its status and its seconds of processor time."""
    while True:
        for pid, (_, _, started) in running.items():
            found, status, usage = os.wait4(pid, os.WNOHANG)
            if not found and time.monotonic() - started > PATIENCE:
                _end_group(pid)
                found, status, usage = os.wait4(pid, 0)
            if found:
                return pid, status, usage.ru_utime + usage.ru_stime
        time.sleep(0.005)


def _end_group(pid: int) -> None:
    try:
        os.killpg(pid, signal.SIGKILL)
    except ProcessLookupError:
        pass


def _faults(case: Case, code: int, errors: str, directory: Path) -> list[str]:
    found = []
    if code not in case.codes:
        found.append(f"exit code {code}")
    lines = [line for line in errors.splitlines() if not line.startswith("nnfuze: ")]
    if "Traceback" in errors:
        found.append("a traceback")
    if "fault of nnfuze" in errors:
        found.append("a fault of nnfuze")
    if len(lines) != (1 if code else 0):
        found.append(f"{len(lines)} lines")
    for line in errors.splitlines():
        if len(line) > LONGEST:
            found.append(f"a line of {len(line)} characters")
        if not line.isprintable():
            found.append("a line that can't be printed")
    # What a run that ends well leaves is its result.
    left = [path for name in ("tmp", "home", "cwd") for path in (directory / name).iterdir() if code or name == "tmp"]
    if left:
        found.append(f"left behind: {', '.join(path.name for path in left)}")
    return found
