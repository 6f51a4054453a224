"""A tuning job on two emulated boards under one key, with everything that can go wrong."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nnfuze_tvm.devices.remote import emulator, server
from nnfuze_tvm.jobs import tuning
from tests.jobs.tuning import faulty
from tests.running_jobs import running_job, until, until_measuring
from tests.servers import KEY, free_port, running_tracker

CPU = "cortex-a72"
TIMEOUT = 8.0
CANDIDATES = len(faulty.NAPS) + 2
CRASHES, LOOPS = (len(faulty.NAPS),), (len(faulty.NAPS) + 1,)


def sessions(board: subprocess.Popen) -> list[psutil.Process]:
    return psutil.Process(board.pid).children()


def send(board: subprocess.Popen, number: signal.Signals) -> None:
    for process in [psutil.Process(board.pid), *sessions(board)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)


# tests/jobs/tuning/test_faults.py does each of these to boards of this machine.
@pytest.mark.slow
@pytest.mark.timeout(900)
def test_two_boards_survive_everything_and_the_job_its_end(tmp_path: Path) -> None:
    port = free_port()
    address = f"127.0.0.1:{port}"
    options = (tmp_path, port, "mixed", CANDIDATES, TIMEOUT, "aarch64")
    with contextlib.ExitStack() as stack:
        with running_tracker(port):
            first, second = stack.enter_context(emulator.emulate(CPU, address, KEY, 2))
            with running_job(*options) as job:
                until(lambda: len(job.trials()) >= 4, 240)
                until(lambda: sessions(first) and sessions(second))
                job.process.kill()
                job.process.wait()
            before = tuning.read_journal(tmp_path)
            assert 4 <= len(before) < CANDIDATES * len(faulty.ROWS)

            job = stack.enter_context(running_job(*options))
            until(lambda: len(job.trials()) > len(before), 240)
            until_measuring(lambda: sessions(second))
            # A board hangs, and goes on when its run has been made up for.
            send(second, signal.SIGSTOP)
            until(lambda: any(t.lost for t in job.trials()))
            send(second, signal.SIGCONT)
            until(lambda: sessions(second))
            # The other one dies while it measures.
            until_measuring(lambda: sessions(first))
            first.kill()
            # Then the tracker dies, too, and is started again.
        time.sleep(2)
        with running_tracker(port):
            trials = job.finish()
    assert trials[: len(before)] == before
    assert Counter(t.kernel for t in trials) == {t.kernel: CANDIDATES for t in trials}
    assert max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1
    assert sum(len(t.lost) for t in trials) == 2
    assert len({t.device for t in trials}) == 2
    for trial in trials:
        if trial.decisions == CRASHES:
            assert (trial.error or "").startswith(f"{server.CRASH_ERROR}: the session ended with SIG")
        elif trial.decisions == LOOPS:
            assert (trial.error or "").startswith(server.TIMEOUT_ERROR)
        else:
            assert trial.seconds
    finals = [json.loads(line) for line in (tmp_path / "finals.jsonl").read_text().splitlines()]
    assert len(finals) == len(faulty.ROWS)
