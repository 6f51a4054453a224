"""What a tracker answers: who gets which board, and what becomes of those who go."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from tvm.rpc import base
from tvm.rpc.base import TrackerCode

from nnfuze_tvm.devices.remote import tracker
from tests.running_jobs import until
from tests.servers import free_port, running_tracker

Ask = Callable[..., Any]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    port = free_port()
    with running_tracker(port):
        yield f"127.0.0.1:{port}"


@contextlib.contextmanager
def peer(address: str) -> Iterator[Ask]:
    """A connection, as a function that sends a message, if there is one, and returns the next answer."""
    session = tracker.connect(address)
    session._sock.settimeout(10)

    def ask(*message: Any, answer: bool = True) -> Any:
        if message:
            base.sendjson(session._sock, message)
        return base.recvjson(session._sock) if answer else None

    try:
        yield ask
    finally:
        session.close()


def offer(board: Ask, key: str, word: str) -> None:
    assert board(TrackerCode.PUT, key, [9000, word], None) == TrackerCode.SUCCESS


def test_who_waits_longest_or_matters_most_is_first(address: str) -> None:
    with peer(address) as board, peer(address) as one, peer(address) as two, peer(address) as vip:
        for client, priority in ((one, 1), (two, 1), (vip, 2)):
            client(TrackerCode.REQUEST, "a", "", priority, answer=False)
            # It may be asked more than one thing at once, and answers when it has heard this one.
            assert client(TrackerCode.PING) == TrackerCode.SUCCESS
        for client, word in ((vip, "a:1"), (one, "a:2"), (two, "a:3")):
            offer(board, "a", word)
            assert client() == [TrackerCode.SUCCESS, ["127.0.0.1", 9000, word]]
            assert board(TrackerCode.GET_PENDING_MATCHKEYS) == []


def test_a_client_that_went_costs_no_board(address: str) -> None:
    with peer(address) as board, peer(address) as client:
        with peer(address) as gone:
            gone(TrackerCode.REQUEST, "b", "", 1, answer=False)
            assert gone(TrackerCode.PING) == TrackerCode.SUCCESS
        until(lambda: "b" not in client(TrackerCode.SUMMARY)[1]["queue_info"])
        client(TrackerCode.REQUEST, "b", "", 1, answer=False)
        assert client(TrackerCode.PING) == TrackerCode.SUCCESS
        offer(board, "b", "b:1")
        assert client()[1][2] == "b:1"


def test_a_board_offers_one_place_at_a_time(address: str) -> None:
    with peer(address) as client, peer(address) as other:
        with peer(address) as board:
            offer(board, "c", "c:1")
            offer(board, "c", "c:2")
            assert board(TrackerCode.GET_PENDING_MATCHKEYS) == ["c:2"]
            assert client(TrackerCode.SUMMARY)[1]["queue_info"]["c"] == {"free": 1, "pending": 0}
            assert client(TrackerCode.REQUEST, "c", "", 1)[1] == ["127.0.0.1", 9000, "c:2"]
            offer(board, "c", "c:3")
        # Gone, and what it offered with it.
        until(lambda: "c" not in client(TrackerCode.SUMMARY)[1]["queue_info"])
        other(TrackerCode.REQUEST, "c", "", 1, answer=False)
        with peer(address) as board:
            offer(board, "c", "c:4")
            assert other()[1][2] == "c:4"


def test_boards_are_listed_by_the_address_that_they_say(address: str) -> None:
    with peer(address) as board, peer(address) as client:
        for said, listed in ((None, "127.0.0.1"), ("pi.local", "pi.local")):
            info = {"key": "server:d", "addr": [said, 9000]}
            assert board(TrackerCode.UPDATE_INFO, info) == TrackerCode.SUCCESS
            assert client(TrackerCode.SUMMARY)[1]["server_info"] == [{"key": "server:d", "addr": [listed, 9000]}]
        assert client(TrackerCode.PING) == TrackerCode.SUCCESS
