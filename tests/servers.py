"""Trackers and boards' servers as processes of their own, to be stopped and killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import psutil

from nnfuze_tvm.devices.remote import server, tracker

KEY = "board"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextlib.contextmanager
def running_tracker(port: int) -> Iterator[None]:
    """TVM's own tracker; killed at the end, so that it can be started again on its port at once."""
    where = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    command = [sys.executable, "-m", "tvm.exec.rpc_tracker", *where]
    with subprocess.Popen(
        command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        try:
            tracker.connect(f"127.0.0.1:{port}", 60).close()
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)


class Board:
    """Our server under a tracker at ``port``, which need not run yet; it keeps its address when it is started again."""

    def __init__(self, port: int) -> None:
        self._tracker = ("127.0.0.1", port)
        self._port = free_port()
        self.address = f"127.0.0.1:{self._port}"
        self.start()

    def _main(self) -> None:
        while True:
            with contextlib.suppress(OSError):
                # The port is taken until the last session of the killed server has ended, too.
                sock = socket.create_server(("127.0.0.1", self._port))
                break
            time.sleep(0.01)
        server.serve(sock, self._tracker, KEY)

    def start(self) -> None:
        self._process = multiprocessing.get_context("fork").Process(target=self._main)
        self._process.start()

    @property
    def process(self) -> psutil.Process:
        return psutil.Process(self._process.pid)

    @property
    def alive(self) -> bool:
        return self._process.is_alive()

    def sessions(self) -> list[psutil.Process]:
        return self.process.children()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to the server and its session."""
        for process in [self.process, *self.sessions()]:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(number)

    def kill(self) -> None:
        self._process.kill()
        self._process.join()


@contextlib.contextmanager
def running_board(port: int) -> Iterator[Board]:
    board = Board(port)
    try:
        yield board
    finally:
        board.kill()
