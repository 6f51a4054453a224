"""Trackers and boards go on serving, whatever anybody sends them, or doesn't."""

from __future__ import annotations

import contextlib
import socket
import time
from collections.abc import Iterator

import pytest
from tvm.rpc import base

from nnfuze_tvm.devices.remote import server, tracker, wire
from nnfuze_tvm.devices.remote.session import open_session
from tests.devices.remote.conversations import (
    BAD_BEGINNINGS,
    BAD_QUESTIONS,
    BAD_SECONDS,
    client,
    mutants,
    send,
)
from tests.own_secret import SECRET
from tests.servers import KEY, Board, free_port, running_board, running_tracker

Address = tuple[str, int]

# Far more than it takes on a machine that is busy, far less than if each of many silent ones were waited for.
SOON = 60.0


class Pair:
    """A tracker and a board under it."""

    def __init__(self, port: int, board: Board, known: bytes | None) -> None:
        self.place = tracker.Place(f"127.0.0.1:{port}", known)
        self.tracker = ("127.0.0.1", port)
        self.board = tracker.parse_address(board.address)
        self._board = board

    def works(self) -> bool:
        """Whether a client gets a session, and soon; the very tracker and board that were started."""
        start = time.monotonic()
        session = tracker.connect(self.place)
        remote, _ = tracker.request(session, KEY, 10)
        threads = remote.get_function("runtime.NumThreads")()
        tracker.end_session(remote)
        return threads >= 1 and self._board.alive and time.monotonic() - start < SOON


@pytest.fixture(scope="module", params=[SECRET, None], ids=["secret", "insecure"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    port = free_port()
    with running_tracker(port, request.param), running_board(port, request.param) as board:
        yield Pair(port, board, request.param)


def test_beginnings(pair: Pair) -> None:
    for words in BAD_BEGINNINGS.values():
        for address in (pair.tracker, pair.board):
            send(address, words)
    assert pair.works()


def test_questions_to_a_tracker(pair: Pair) -> None:
    for what, words in BAD_QUESTIONS.items():
        answer = send(pair.tracker, words, wire.to_tracker(pair.place.secret))
        assert answer == b"", what
    found = tracker.boards(tracker.connect(pair.place))
    assert set(found) == {KEY} and len(found[KEY].addresses) == 1
    assert pair.works()


def test_sessions_of_no_time(pair: Pair) -> None:
    host, port, word = tracker.reserve(tracker.connect(pair.place), KEY)
    for seconds in BAD_SECONDS:
        greeting = None if pair.place.secret is None else wire.prove(pair.place.secret, wire.SESSION)
        assert send((host, port), client(f"client:{word} -timeout={seconds}".encode()), greeting) == b""
    # The client that the tracker sent is still expected, and may ask for more than it gets.
    remote = open_session(pair.place.secret, host, port, word, 1e308)
    assert remote.get_function("runtime.NumThreads")() >= 1
    del remote
    assert pair.works()


@pytest.mark.parametrize("count", [200, pytest.param(3000, marks=pytest.mark.slow)])
def test_mutants(pair: Pair, count: int) -> None:
    for n, words in enumerate(mutants(7, count)):
        address, purpose = ((pair.tracker, wire.TRACKER), (pair.board, wire.SESSION))[n % 2]
        # Half of them from those who know the secret.
        proof = wire.prove(pair.place.secret, purpose) if pair.place.secret and n // 2 % 2 else None
        send(address, words, proof)
    assert pair.works()


def test_silence_of_many(pair: Pair) -> None:
    with contextlib.ExitStack() as stack:
        for address in [pair.tracker, pair.board] * 80:
            stack.enter_context(socket.create_connection(address))
        assert pair.works()


def test_a_drip_is_cut_off() -> None:
    """A byte now and then is not an answer in time."""
    port = free_port()
    with running_tracker(port), socket.create_connection(("127.0.0.1", port)) as sock:
        start = time.monotonic()
        with contextlib.suppress(OSError):
            while time.monotonic() - start < 2 * SOON:
                sock.sendall(b"n")
                time.sleep(0.3)
        assert time.monotonic() - start < SOON


def test_a_session_that_talks_nonsense(pair: Pair) -> None:
    host, port, word = tracker.reserve(tracker.connect(pair.place), KEY)
    with socket.create_connection((host, port)) as sock:
        if pair.place.secret is not None:
            wire.converse(sock, wire.prove(pair.place.secret, wire.SESSION), 5)
        sock.sendall(client(f"client:{word}".encode()) + b"\xff" * 64)
        assert base.recvall(sock, 4)
    assert pair.works()


def test_a_client_that_never_ends_is_ended() -> None:
    port = free_port()
    with running_tracker(port), running_board(port, limit=1):
        client = tracker.connect(f"127.0.0.1:{port}")
        tracker.wait_for_device(client, KEY, 30)
        remote, _ = tracker.request(client, KEY)
        start = time.monotonic()
        with pytest.raises(Exception, match=f"{server.TIMEOUT_ERROR}: the session took longer than the 1 s"):
            while time.monotonic() - start < 2 * SOON:
                remote.get_function("runtime.NumThreads")()
                time.sleep(0.05)
        assert time.monotonic() - start < SOON
