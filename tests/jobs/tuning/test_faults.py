"""Jobs on boards that die, hang, come back and join, with kernels that crash, loop or kill their board."""

from __future__ import annotations

import contextlib
import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnfuze_tvm.devices.remote import server
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.jobs import tuning
from tests.jobs.tuning import faulty
from tests.running_jobs import running_job, until, until_measuring
from tests.servers import KEY, Board, free_port, running_board, running_tracker


@pytest.fixture
def port() -> Iterator[int]:
    port = free_port()
    with running_tracker(port):
        yield port


def check_complete(trials: list[tuning.Trial], work_dir: Path, per_kernel: int) -> None:
    """Every candidate was measured once and has a time, and every kernel was decided."""
    assert Counter(t.kernel for t in trials) == {t.kernel: per_kernel for t in trials}
    assert max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1
    assert [t.error for t in trials if t.error] == []
    assert len(tuning.load_database(work_dir)) == len(faulty.ROWS)
    assert len((work_dir / "finals.jsonl").read_text().splitlines()) == len(faulty.ROWS)


def test_boards_measure_at_the_same_time_also_one_that_joins(port: int, tmp_path: Path) -> None:
    with running_board(port) as first, running_job(tmp_path, port, "napping", 12) as job:
        until(job.trials)
        with running_board(port) as second:
            until(lambda: first.sessions() and second.sessions())
            trials = job.finish()
    check_complete(trials, tmp_path, 12)
    assert {t.device for t in trials} == {first.address, second.address}
    assert not any(t.lost for t in trials)


def test_a_killed_board_costs_the_run_that_was_on_it(port: int, tmp_path: Path) -> None:
    with running_board(port) as first, running_board(port) as second:
        with running_job(tmp_path, port, "napping", 6) as job:
            until(job.trials)
            until_measuring(first.sessions)
            first.kill()
            before = len(job.trials())
            trials = job.finish()
    check_complete(trials, tmp_path, 6)
    assert [t.lost for t in trials if t.lost] == [(first.address,)]
    assert {t.device for t in trials[before + 1 :]} == {second.address}


def test_the_only_board_reboots(port: int, tmp_path: Path) -> None:
    with running_board(port) as board, running_job(tmp_path, port, "napping", 4) as job:
        until(job.trials)
        until_measuring(board.sessions)
        board.kill()
        time.sleep(3)
        board.start()
        trials = job.finish()
    check_complete(trials, tmp_path, 4)
    assert [t.lost for t in trials if t.lost] == [(board.address,)]


def test_a_board_that_hangs_is_used_again_when_it_goes_on(port: int, tmp_path: Path) -> None:
    with running_board(port) as first, running_board(port) as second:
        with running_job(tmp_path, port, "napping", 12) as job:
            until(job.trials)
            until_measuring(first.sessions)
            first.send(signal.SIGSTOP)
            at = len(job.trials())
            until(lambda: any(t.lost for t in job.trials()))
            # The candidate was measured elsewhere, and others were in the meantime.
            assert len(job.trials()) > at + 1
            assert {t.device for t in job.trials()[at + 1 :]} == {second.address}
            first.send(signal.SIGCONT)
            count = len(job.trials())
            until(lambda: first.address in {t.device for t in job.trials()[count:]})
            trials = job.finish()
    check_complete(trials, tmp_path, 12)
    assert [t.lost for t in trials if t.lost] == [(first.address,)]


def test_the_tracker_restarts(tmp_path: Path) -> None:
    port = free_port()
    with running_board(port) as first, running_board(port) as second, contextlib.ExitStack() as stack:
        with running_tracker(port):
            job = stack.enter_context(running_job(tmp_path, port, "napping", 8))
            until(lambda: len(job.trials()) > 2)
        time.sleep(3)
        with running_tracker(port):
            trials = job.finish()
    check_complete(trials, tmp_path, 8)
    assert {t.device for t in trials} == {first.address, second.address}
    assert not any(t.lost for t in trials)


def test_kernels_that_crash_or_never_end(port: int, tmp_path: Path) -> None:
    with running_board(port) as first, running_board(port) as second:
        with running_job(tmp_path, port, "bad", 5) as job:
            trials = job.finish()
        assert len(trackers.wait_for_device(trackers.connect(f"127.0.0.1:{port}"), KEY, 10, count=2)) == 2
        assert first.alive and second.alive and not first.sessions() and not second.sessions()
    assert Counter(t.decisions for t in trials) == dict.fromkeys([(0,), (1,), (2,), (3,), (4,)], len(faulty.ROWS))
    for trial in trials:
        assert trial.lost == () and trial.device in (first.address, second.address)
        if trial.decisions == (1,):
            assert (trial.error or "").startswith(f"{server.CRASH_ERROR}: the session ended with SIGSEGV")
        elif trial.decisions == (3,):
            assert (trial.error or "").startswith(f"{server.TIMEOUT_ERROR}: the session took longer")
        else:
            assert trial.seconds
    finals = [json.loads(line) for line in (tmp_path / "finals.jsonl").read_text().splitlines()]
    assert [sorted(final["decisions"]) for final in finals] == [[[0], [2], [4]]] * len(faulty.ROWS)


def test_a_kernel_that_kills_boards_is_to_blame_after_the_second(port: int, tmp_path: Path) -> None:
    ended = threading.Event()
    deaths: list[str] = []

    def restart(board: Board) -> None:
        while not ended.wait(0.05):
            if not board.alive:
                deaths.append(board.address)
                board.start()

    with running_board(port) as first, running_board(port) as second:
        nurses = [threading.Thread(target=restart, args=(board,)) for board in (first, second)]
        for nurse in nurses:
            nurse.start()
        try:
            with running_job(tmp_path, port, "deadly", 3) as job:
                trials = job.finish()
        finally:
            ended.set()
            for nurse in nurses:
                nurse.join()
    assert Counter(t.decisions for t in trials) == dict.fromkeys([(0,), (1,), (2,)], len(faulty.ROWS))
    assert len(deaths) == 2 * len(faulty.ROWS)
    for trial in trials:
        if trial.decisions == (1,):
            assert len(trial.lost) == 2 and set(trial.lost) <= set(deaths)
            assert (trial.error or "").startswith("2 devices were lost while it ran: ")
        else:
            assert trial.seconds and not trial.lost
