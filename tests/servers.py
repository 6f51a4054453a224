"""Trackers and boards' servers as processes of their own, to be stopped and killed."""

from __future__ import annotations

import contextlib
import multiprocessing
import signal
import socket
import time
from collections.abc import Iterator
from typing import Any

import psutil

from nnfuze_tvm.devices.remote import server, tracker, tracker_server
from tests.own_secret import SECRET

KEY = "board"


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def embedded(**options: Any) -> tracker.EmbeddedTracker:
    """An embedded tracker with the secret that commands read from the file."""
    return tracker.EmbeddedTracker(**options, known=SECRET)


@contextlib.contextmanager
def running_tracker(port: int, known: bytes | None = SECRET) -> Iterator[None]:
    """A tracker with a secret or without; killed at the end, so that it can be started again on its port at once."""

    def main() -> None:
        tracker_server.serve(server.listen("127.0.0.1", port), known)

    process = multiprocessing.get_context("fork").Process(target=main)
    process.start()
    try:
        tracker.connect(tracker.Place(f"127.0.0.1:{port}", known), 60).close()
        yield
    finally:
        process.kill()
        process.join()


class Board:
    """Our server under a tracker at ``port``, which need not run yet; it keeps its address when it is started again."""

    def __init__(self, port: int, known: bytes | None = SECRET, limit: float = server.SESSION_SECONDS) -> None:
        self._known = known
        self._limit = limit
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
        server.serve(sock, self._tracker, KEY, self._known, limit=self._limit)

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
def running_board(port: int, known: bytes | None = SECRET, limit: float = server.SESSION_SECONDS) -> Iterator[Board]:
    board = Board(port, known, limit)
    try:
        yield board
    finally:
        board.kill()
