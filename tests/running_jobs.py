"""Tuning jobs on `tests.jobs.tuning.faulty` as processes of their own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import psutil

from nnfuze_tvm.jobs import tuning
from tests.servers import KEY


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def until_measuring(sessions: Callable[[], list[psutil.Process]]) -> None:
    """Wait until a board is in the middle of a candidate's run; ``sessions`` are its server's children."""
    # One that is there already may be about to end, its result delivered.
    before = {process.pid for process in sessions()}
    until(lambda: {process.pid for process in sessions()} - before)
    time.sleep(0.2)


class Job:
    """``timeout`` is that of one candidate; the other arguments are those of `tests.jobs.tuning.faulty`."""

    def __init__(
        self, work_dir: Path, port: int, space: str, trials: int, timeout: float, target: str, kernels: int
    ) -> None:
        self._work_dir = work_dir
        options = [str(work_dir), f"127.0.0.1:{port}", KEY, space, str(trials), str(timeout), target, str(kernels)]
        command = [sys.executable, "-m", "tests.jobs.tuning.faulty", *options]
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
        self.process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)

    def trials(self) -> list[tuning.Trial]:
        """What the journal says now; the job must be running or have ended well."""
        assert self.process.poll() in (None, 0), self.process.communicate()[1]
        return tuning.read_journal(self._work_dir)

    def finish(self) -> list[tuning.Trial]:
        _, errors = self.process.communicate(timeout=240)
        assert self.process.returncode == 0, errors
        return self.trials()


@contextlib.contextmanager
def running_job(
    work_dir: Path, port: int, space: str, trials: int, timeout: float = 4, target: str = "host", kernels: int = 2
) -> Iterator[Job]:
    job = Job(work_dir, port, space, trials, timeout, target, kernels)
    try:
        yield job
    finally:
        job.process.kill()
        job.process.wait()
