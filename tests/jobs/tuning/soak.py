"""Tuning for minutes while boards die and hang, trackers die, and strangers bother both; beside it, the same in peace.

As a program: ``python -m tests.jobs.tuning.soak [MINUTES]``, which is ``make soak``.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm.devices import targets
from nnfuze_tvm.devices.remote import server
from nnfuze_tvm.devices.remote.tracker import parse_address
from nnfuze_tvm.jobs import tuning
from tests.devices.remote.conversations import mutants, send
from tests.jobs.tuning import faulty
from tests.running_jobs import Job
from tests.servers import Board, free_port, running_board, running_tracker

BOARDS = 4
# Each naps once per row, eight times, in a session of four seconds.
KERNELS = 5
# Of `faulty.mixed`: those that nap, the one that crashes and the one that never ends.
CANDIDATES = len(faulty.NAPS) + 2
SECONDS_BETWEEN_FAULTS = 15.0
MOST_TIME = 1.5


class Site:
    """A tracker with boards, and the jobs there, one after another."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.boards: list[Board] = []
        self.trials = 0
        self.seconds = 0.0
        self._folder = folder
        self._tracker = contextlib.ExitStack()
        self._jobs = 0
        self._job: Job | None = None

    @contextlib.contextmanager
    def open(self) -> Iterator[Site]:
        self.start_tracker()
        with contextlib.ExitStack() as stack:
            stack.callback(self.stop_tracker)
            self.boards = [stack.enter_context(running_board(self.port)) for _ in range(BOARDS)]
            self._start()
            stack.callback(self._kill)
            yield self

    def start_tracker(self) -> None:
        self._tracker.enter_context(running_tracker(self.port))

    def stop_tracker(self) -> None:
        self._tracker.close()

    def go_on(self, more: bool) -> bool:
        """See whether a job is done, check it, and begin the next one if ``more``; return whether there is one."""
        if self._job is None or self._job.process.poll() is None:
            return self._job is not None
        trials = self._job.finish()
        # Where kernels ran, boards can't be forked any more.
        checking = multiprocessing.get_context("fork").Process(target=check, args=(self._work_dir, trials))
        checking.start()
        checking.join()
        assert checking.exitcode == 0, self._work_dir
        self.trials += len(trials)
        self.seconds += max(t.finished for t in trials) - min(t.started for t in trials)
        self._job = None
        if more:
            self._start()
        return more

    def _start(self) -> None:
        self._jobs += 1
        self._work_dir = self._folder / f"job-{self._jobs}"
        self._job = Job(self._work_dir, self.port, "mixed", CANDIDATES, 4, "host", KERNELS)

    def _kill(self) -> None:
        if self._job is not None:
            self._job.process.kill()
            self._job.process.wait()


def check(work_dir: Path, trials: list[tuning.Trial]) -> None:
    """Every candidate of every kernel was measured once, what failed is what had to, and what was kept is right."""
    assert Counter(t.kernel for t in trials) == {t.kernel: CANDIDATES for t in trials}
    assert len({t.kernel for t in trials}) == KERNELS
    assert max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1
    failing = {(len(faulty.NAPS),): server.CRASH_ERROR, (len(faulty.NAPS) + 1,): server.TIMEOUT_ERROR}
    for trial in trials:
        expected = failing.get(trial.decisions)
        assert bool(trial.seconds) == (expected is None), trial
        # A crash that took place while its board died says that the board was lost, and comes again.
        assert expected is None or (trial.error or "").startswith((expected, "2 devices were lost")), trial
    assert len((work_dir / "finals.jsonl").read_text().splitlines()) == KERNELS
    records = tuning.load_database(work_dir).get_all_tuning_records()
    assert len(records) == KERNELS
    for record in records:
        verify(record, targets.resolve("host"))


def verify(record: ms.database.TuningRecord, target: tvm.target.Target) -> None:
    """Build a kept kernel once more and compare what it computes with NumPy."""
    schedule = tvm.s_tir.Schedule(record.workload.mod)
    record.trace.apply_to_schedule(schedule, remove_postproc=False)
    built = tvm.compile(schedule.mod, target=target)
    taken, _ = ms.arg_info.ArgInfo.from_prim_func(record.workload.mod["main"])
    shape = tuple(int(dim) for dim in taken.shape)
    given = np.random.default_rng(0).standard_normal(shape, np.float32)
    result = tvm.runtime.tensor(np.zeros(shape, np.float32))
    built["main"](tvm.runtime.tensor(given), result)
    np.testing.assert_array_equal(result.numpy(), given + np.float32(1))


def bother(site: Site, seed: int) -> None:
    """Strangers: nonsense, and connections that say nothing."""
    board = parse_address(site.boards[seed % BOARDS].address)
    for n, words in enumerate(mutants(seed, 60)):
        send((board, ("127.0.0.1", site.port))[n % 2], words)
    for address in [board, ("127.0.0.1", site.port)] * 50:
        with contextlib.suppress(OSError):
            socket.create_connection(address, timeout=1).close()


def fault(site: Site, which: int, rng: random.Random) -> str:
    """Let something happen to a board, or to what reaches it; it is all right again afterwards."""
    board = rng.choice(site.boards)
    if which % 3 == 0:
        board.kill()
        time.sleep(2)
        board.start()
        return f"board {board.address} killed"
    if which % 3 == 1:
        board.send(signal.SIGSTOP)
        # Longer than the job waits for it.
        time.sleep(12)
        board.send(signal.SIGCONT)
        return f"board {board.address} hung"
    bother(site, which)
    return "strangers came"


@contextlib.contextmanager
def quiet(log: Path) -> Iterator[None]:
    """Send what trackers and boards say to a file."""
    terminal = os.dup(2)
    with open(log, "wb") as file:
        os.dup2(file.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)


def run(minutes: float) -> None:
    folder = Path(tempfile.mkdtemp(prefix="nnfuze-soak-"))
    print(f"{minutes:g} minutes in {folder}", flush=True)
    with quiet(folder / "log"):
        faults, calm, site = soak(folder, minutes)
    shutil.rmtree(folder)
    peace, trouble = calm.seconds / calm.trials, site.seconds / site.trials
    print(
        f"{faults} faults, {site.trials} trials at {trouble:.3f} s; in peace {calm.trials} at {peace:.3f} s: "
        f"{trouble / peace:.2f} times as long; nothing lost, nothing twice, every kernel right"
    )
    if trouble > MOST_TIME * peace:
        sys.exit(f"more than {MOST_TIME:g} times as long")


def soak(folder: Path, minutes: float) -> tuple[int, Site, Site]:
    """Return how many faults there were, and what was done in peace and in trouble."""
    rng = random.Random(3)
    start = time.monotonic()
    faults = 0
    # The tracker dies at a third and at two thirds of the time.
    deaths = [minutes * 20, minutes * 40]
    with Site(folder / "calm").open() as calm, Site(folder / "faults").open() as site:
        busy = True
        while busy:
            passed = time.monotonic() - start
            more = passed < 60 * minutes
            if more and deaths and passed > deaths[0]:
                deaths.pop(0)
                site.stop_tracker()
                time.sleep(2)
                site.start_tracker()
                print(f"{passed:4.0f} s: the tracker killed", flush=True)
            if more and passed > faults * SECONDS_BETWEEN_FAULTS:
                print(f"{passed:4.0f} s: {fault(site, faults, rng)}", flush=True)
                faults += 1
            # Both are always asked.
            busy = any([calm.go_on(more), site.go_on(more)])
            time.sleep(0.2)
    return faults, calm, site


if __name__ == "__main__":
    run(float(sys.argv[1]) if len(sys.argv) > 1 else 10.0)
