"""Jobs and boards that are ended at any moment: nothing is lost, nothing runs on, and what is started again goes on."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from nnfuze_tvm.devices.remote import tracker
from nnfuze_tvm.jobs import tuning
from tests.jobs.tuning import standin
from tests.servers import KEY, free_port, running_board, running_tracker

TRIALS = 6


@pytest.mark.slow
@pytest.mark.timeout(1200)
@pytest.mark.parametrize("seed", range(5))
def test_a_job_that_is_ended_again_and_again(tmp_path: Path, seed: int) -> None:
    """Four times each: while it starts, while it tunes, by every signal; with a tracker and a server of its own."""
    rng = random.Random(seed)
    command = [sys.executable, "-m", "tests.jobs.tuning.standin", str(tmp_path), str(TRIALS)]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    journal = tmp_path / "journal.jsonl"
    before: list[tuning.Trial] = []
    for n in range(5):
        with subprocess.Popen(command, env=env, stderr=subprocess.DEVNULL) as process:
            if n == 4:
                assert process.wait(300) == 0
                break
            lines = len(before) + n
            deadline = time.monotonic() + 60
            while process.poll() is None and n and time.monotonic() < deadline:
                if journal.exists() and journal.read_bytes().count(b"\n") >= lines:
                    break
                time.sleep(0.01)
            time.sleep(rng.uniform(0, 0.3 if n else 5))
            with contextlib.suppress(psutil.NoSuchProcess):
                children = psutil.Process(process.pid).children(recursive=True)
                process.send_signal(rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT]))
                process.wait(60)
                assert not psutil.wait_procs(children, timeout=60)[1]
        now = tuning.read_journal(tmp_path) if journal.exists() else []
        assert now[: len(before)] == before
        before = now
    trials = tuning.read_journal(tmp_path)
    assert trials[: len(before)] == before
    assert max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1
    assert set(Counter(t.kernel for t in trials).values()) <= {4, 5, TRIALS}
    assert {t.decisions for t in trials} <= standin.CANDIDATES
    assert len(tuning.load_database(tmp_path)) == 2
    assert not list((tmp_path / "scratch").glob("*"))


def _use(address: str) -> None:
    """Open sessions, one after another."""
    while True:
        with contextlib.suppress(Exception):
            client = tracker.connect(address)
            client._sock.settimeout(5)
            remote, _ = tracker.request(client, KEY, 10)
            remote.upload(bytearray(1000), "file")
            tracker.end_session(remote)


@pytest.mark.parametrize("count", [5, pytest.param(40, marks=pytest.mark.slow)])
def test_a_board_that_is_killed_at_any_moment(count: int) -> None:
    rng = random.Random(count)
    port = free_port()
    address = f"127.0.0.1:{port}"
    with running_tracker(port), running_board(port) as board:
        user = multiprocessing.get_context("fork").Process(target=_use, args=(address,))
        user.start()
        try:
            for _ in range(count):
                time.sleep(rng.uniform(0, 0.4))
                sessions = board.sessions()
                board.kill()
                assert not psutil.wait_procs(sessions, timeout=30)[1]
                board.start()
        finally:
            user.kill()
            user.join()
        client = tracker.connect(address)
        client._sock.settimeout(30)
        remote, _ = tracker.request(client, KEY, 10)
        assert remote.get_function("runtime.NumThreads")() >= 1
        assert len(tracker.wait_for_device(client, KEY, 30)) == 1
