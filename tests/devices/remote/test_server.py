"""A board's server with kernels, clients and trackers that misbehave, die and come back."""

from __future__ import annotations

import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm
from tvm import rpc

from nnfuze_tvm.devices.remote import server, tracker
from nnfuze_tvm.errors import DeviceError
from tests.devices.remote import misbehaving
from tests.own_secret import SECRET
from tests.servers import KEY, Board, free_port, running_board, running_tracker


@pytest.fixture(scope="module")
def running() -> Iterator[tuple[int, Board]]:
    port = free_port()
    with running_tracker(port), running_board(port) as board:
        yield port, board


@pytest.fixture
def port(running: tuple[int, Board]) -> int:
    return running[0]


def session(port: int, timeout: float = 0, wait: float = 15, known: bytes | None = SECRET) -> rpc.RPCSession:
    client = tracker.connect(tracker.Place(f"127.0.0.1:{port}", known))
    tracker.wait_for_device(client, KEY, wait)
    client._sock.settimeout(wait)
    return tracker.request(client, KEY, timeout)[0]


def run(remote: rpc.RPCSession, library: Path) -> float:
    remote.upload(str(library))
    operand = tvm.runtime.tensor(np.zeros(1, np.float32), remote.cpu(0))
    remote.load_module(library.name)["main"](operand)
    return float(operand.numpy()[0])


@pytest.fixture(scope="module")
def works(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], bool]:
    good = misbehaving.library(misbehaving.good, tmp_path_factory.mktemp("good"))
    return lambda port: run(session(port, 10), good) == 7.0


def test_a_crash_is_told_and_the_board_goes_on(port: int, works: Callable[[int], bool], tmp_path: Path) -> None:
    library = misbehaving.library(misbehaving.segfault, tmp_path)
    for _ in range(2):
        with pytest.raises(Exception, match=f"{server.CRASH_ERROR}: the session ended with SIGSEGV"):
            run(session(port, 10), library)
        assert works(port)


def test_an_endless_kernel_is_ended_by_the_board(port: int, works: Callable[[int], bool], tmp_path: Path) -> None:
    library = misbehaving.library(misbehaving.endless, tmp_path)
    with pytest.raises(Exception, match=f"{server.TIMEOUT_ERROR}: the session took longer than the 1 s"):
        run(session(port, 1), library)
    assert works(port)


def test_a_board_without_a_place_for_files_says_so(
    works: Callable[[int], bool], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    port = free_port()
    with running_tracker(port), running_board(port):
        assert works(port)
        (tmp_path / "tmp").rename(tmp_path / "elsewhere")
        with pytest.raises(Exception, match=f"{server.CRASH_ERROR}: no session: .*No such file or directory"):
            session(port)
        (tmp_path / "elsewhere").rename(tmp_path / "tmp")
        assert works(port)


def test_a_board_is_free_when_its_client_is_gone(
    running: tuple[int, Board], works: Callable[[int], bool], tmp_path: Path
) -> None:
    port, board = running
    library = misbehaving.library(misbehaving.endless, tmp_path)
    # No session timeout, and a client that is killed while its kernel runs.
    client = multiprocessing.get_context("fork").Process(target=lambda: run(session(port), library))
    client.start()
    while not any(process.cpu_times().user > 0.5 for process in board.sessions()):
        assert client.is_alive()
        time.sleep(0.05)
    client.kill()
    client.join()
    assert works(port)


def test_visitors_that_are_no_clients(port: int, works: Callable[[int], bool]) -> None:
    client = tracker.connect(f"127.0.0.1:{port}")
    (address,) = tracker.devices(client)[KEY]
    host, _, own_port = address.rpartition(":")
    for words in (b"GET / HTTP/1.1\r\n\r\n", b"", b"\x27\x7f\x0f\x00\x06\x00\x00\x00client"):
        with socket.create_connection((host, int(own_port))) as visitor:
            visitor.sendall(words)
    silent = socket.create_connection((host, int(own_port)))
    assert works(port)
    silent.close()


def test_a_killed_server_takes_its_session_along(tmp_path: Path) -> None:
    port = free_port()
    library = misbehaving.library(misbehaving.endless, tmp_path)
    with running_tracker(port), running_board(port) as board:
        client = multiprocessing.get_context("fork").Process(target=lambda: run(session(port), library))
        client.start()
        while not (children := board.sessions()):
            time.sleep(0.05)
        board.kill()
        assert not psutil.wait_procs(children, timeout=60)[1]
        client.join(60)
        assert client.exitcode == 1


def test_a_tracker_that_comes_late_and_goes(works: Callable[[int], bool]) -> None:
    port = free_port()
    with running_board(port):
        for _ in range(2):
            with running_tracker(port):
                assert works(port)
        with running_tracker(port):
            remote = session(port)
        # The tracker goes and comes while a session runs, which is not disturbed.
        with running_tracker(port):
            assert remote.get_function("runtime.NumThreads")() >= 1
            del remote
            assert works(port)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="needs Linux")
def test_threads_are_as_many_as_asked_for_and_bound_to_no_core(running: tuple[int, Board]) -> None:
    port, board = running
    allowed = os.sched_getaffinity(0)
    for count in (1, len(allowed)):
        remote = session(port, 10)
        tracker.use_threads(remote, count)
        assert remote.get_function("runtime.NumThreads")() == count
        (child,) = board.sessions()
        # Of every thread: a process has the affinity of its first one.
        for thread in child.threads():
            assert os.sched_getaffinity(thread.id) == allowed
        del remote


def test_too_few_threads_of_tvms_own_server() -> None:
    port, own = free_port(), free_port()
    where = ["--host", "127.0.0.1", "--port", str(own), "--port-end", str(own + 1)]
    command = [sys.executable, "-m", "tvm.exec.rpc_server", "--tracker", f"127.0.0.1:{port}", "--key", KEY, *where]
    env = {**os.environ, "TVM_NUM_THREADS": "1"}
    with running_tracker(port, None), subprocess.Popen(command, env=env, start_new_session=True) as process:
        try:
            remote = session(port, 10, wait=60, known=None)
            tracker.use_threads(remote, 1)
            with pytest.raises(DeviceError, match="on 1 of 2 threads"):
                tracker.use_threads(remote, 2)
        finally:
            os.killpg(process.pid, signal.SIGKILL)
