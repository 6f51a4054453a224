"""What strangers get from trackers and boards, also those who have an account on the same machine: nothing."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import socket
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from tvm import rpc
from tvm.rpc import base

from nnfuze_tvm.devices.remote import secret, server, tracker, wire
from nnfuze_tvm.devices.remote.session import open_session
from nnfuze_tvm.errors import DeviceError
from tests.own_secret import SECRET
from tests.servers import KEY, free_port, running_board, running_tracker

NOBODY = 65534
# Whom to look at: the tracker, and the processes of tracker and boards.
Scene = tuple[tracker.Place, list[int]]


@contextlib.contextmanager
def _embedded() -> Iterator[Scene]:
    before = set(psutil.Process().children(recursive=True))
    with tracker.EmbeddedTracker(key=KEY) as running:
        yield running.place, [p.pid for p in set(psutil.Process().children(recursive=True)) - before]


@contextlib.contextmanager
def _separate() -> Iterator[Scene]:
    port = free_port()
    with running_tracker(port), running_board(port) as board:
        place = tracker.Place(f"127.0.0.1:{port}", SECRET)
        tracker.wait_for_device(tracker.connect(place), KEY, 30)
        yield place, [board.process.pid, os.getpid()]


@pytest.fixture(scope="module", params=[_embedded, _separate])
def scene(request: pytest.FixtureRequest) -> Iterator[Scene]:
    with request.param() as found:
        yield found


def _all_that_comes(address: tuple[str, int], *messages: bytes) -> bytes:
    came = b""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=1) as sock:
        for message in messages:
            sock.sendall(message)
        while part := sock.recv(4096):
            came += part
    return came


def _unlike(error: type[Exception] | tuple[type[Exception], ...], function: Callable[..., Any], *args: Any) -> str:
    """Return "" if a function fails as it should, else what it returned."""
    try:
        return repr(function(*args))
    except error:
        return ""


def _attempts(place: tracker.Place, pids: list[int], board: tuple[str, int], word: str) -> dict[str, str]:
    """Everything that a stranger may try, by name: what it got, "" for nothing. It overheard the tracker's word."""
    at = tracker.parse_address(place.address)
    known = place.secret or b"?"
    magic = struct.pack("<i", base.RPC_TRACKER_MAGIC)
    guess = tracker.Place(place.address, secret.fresh())
    key = f"client:{word}".encode()
    failures = (OSError, RuntimeError, DeviceError)
    found = {
        "a list of boards, as TVM asks for it": _unlike(failures, lambda: rpc.connect_tracker(*at).summary()),
        "a list of boards, without waiting": _all_that_comes(
            at, magic, wire.message([base.TrackerCode.SUMMARY]), wire.message([base.TrackerCode.REQUEST, KEY, "", 1])
        ).hex(),
        "a tracker's trust in a guess": _unlike(failures, tracker.connect, guess, 1),
        "a session as TVM opens it": _unlike(failures, rpc.connect, *board, word, 10),
        "a session without the proof": _all_that_comes(
            board, struct.pack("<ii", base.RPC_MAGIC, len(key)) + key
        ).hex(),
        "a session for a guess": _unlike(failures, open_session, guess.secret, *board, word),
        "a place as a board": _all_that_comes(
            at, magic, wire.message([base.TrackerCode.PUT, KEY, [1, "me"], None])
        ).hex(),
    }  # fmt: skip
    for pid in pids:
        for name in ("environ", "mem"):
            path = Path(f"/proc/{pid}/{name}")
            found[str(path)] = _unlike(OSError, path.read_bytes)
        found[f"{pid}'s files"] = _unlike(OSError, os.listdir, f"/proc/{pid}/fd")
        with contextlib.suppress(OSError):
            assert known not in Path(f"/proc/{pid}/cmdline").read_bytes()
    found["the secret's file"] = _unlike(OSError, secret.where().read_bytes)
    return found


def _as_nobody(place: tracker.Place, pids: list[int], board: tuple[str, int], word: str, pipe: Any) -> None:
    os.setgroups([])
    os.setgid(NOBODY)
    os.setuid(NOBODY)
    pipe.send(_attempts(place, pids, board, word))


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root to be somebody else")
def test_another_user_gets_nothing(scene: Scene) -> None:
    place, pids = scene
    connections = [c for pid in pids if pid != os.getpid() for c in psutil.Process(pid).net_connections()]
    assert {c.laddr.ip for c in connections if c.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
    client = tracker.connect(place)
    host, port, word = tracker.reserve(client, KEY)
    ours, theirs = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(
        target=_as_nobody, args=(place, pids, (host, port), word, theirs)
    )
    process.start()
    theirs.close()
    found = ours.recv()
    process.join()
    assert {name: got for name, got in found.items() if got} == {}
    # Meanwhile the board waited for whom the tracker had sent.
    assert open_session(place.secret, host, port, word, 10).get_function("runtime.NumThreads")() >= 1


def test_without_a_secret_they_would_get_it() -> None:
    port = free_port()
    with running_tracker(port, None), running_board(port, None):
        place = tracker.Place(f"127.0.0.1:{port}", None)
        client = tracker.connect(place)
        tracker.wait_for_device(client, KEY, 30)
        host, own_port, word = tracker.reserve(client, KEY)
        found = _attempts(place, [], (host, own_port), word)
    assert found["a list of boards, as TVM asks for it"] and found["a list of boards, without waiting"]
    assert found["a session as TVM opens it"] and found["a place as a board"]


def test_an_impostor_of_a_board_is_sent_nothing() -> None:
    """Whoever takes a dead board's port is not talked to: TVM's client would run what such a server answers."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        process = multiprocessing.get_context("fork").Process(target=_impostor, args=(impostor,))
        process.start()
        with pytest.raises(OSError, match="doesn't know the secret"):
            open_session(SECRET, *impostor.getsockname(), "word")
        process.join(10)
        assert process.exitcode == 0


def _impostor(sock: socket.socket) -> None:
    visitor, _ = sock.accept()
    visitor.settimeout(5)
    hello = base.recvall(visitor, 36)
    visitor.sendall(hello)
    visitor.sendall(base.recvall(visitor, 32))
    os._exit(1 if visitor.recv(1) else 0)


@pytest.mark.parametrize("given", [("127.0.0.1", None), ("0.0.0.0", "other machines reach port")])
def test_nothing_listens_beyond_loopback_unasked(
    given: tuple[str, str | None], capfd: pytest.CaptureFixture[str]
) -> None:
    from nnfuze_tvm.cli.verbs import devices

    host, said = given
    with server.listen(host, 0) as sock:
        assert sock.getsockname()[0] == host
    devices._explain(host, 9190, False)
    err = capfd.readouterr().err
    assert not err if said is None else (said in err and "ssh -L 9190" in err and err.count("\n") == 1)


def test_a_board_of_a_tracker_elsewhere_says_what_it_needs() -> None:
    with pytest.raises(DeviceError, match=r"on another machine, whose clients don't reach 127.0.0.1; give --host"):
        server.start(("192.0.2.1", 9190), KEY, SECRET)
