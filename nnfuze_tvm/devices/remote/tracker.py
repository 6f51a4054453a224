"""TVM RPC trackers: finding devices, asking for one, and a tracker with servers on this machine."""

from __future__ import annotations

import contextlib
import os
import re
import socket
import time
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

from tvm import rpc
from tvm.rpc import base

from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.devices.remote import secret, server, tracker_server, wire
from nnfuze_tvm.devices.remote.session import open_session
from nnfuze_tvm.errors import DeviceError

LOCAL_KEY = "local"

_POLL = 0.25
# For one try.
_MOST_SECONDS = 10.0


@dataclass(frozen=True)
class Place:
    """Where a tracker is, and what it wants to know.

    Attributes
    ----------
    address : str
        Its ``host:port``.
    secret : bytes, optional
        None for one that lets everybody in, as TVM's own does.
    """

    address: str
    secret: bytes | None = field(repr=False)

    def __str__(self) -> str:
        return self.address

    @classmethod
    def of(
        cls, address: str | Place, secret_file: str | os.PathLike[str] | None = None, insecure: bool = False
    ) -> Place:
        """Return the place with the secret that is in a file, see `secret.read`; a place is one already.

        Raises
        ------
        DeviceError
            If the address is no address, or there is no secret in the file.
        """
        if isinstance(address, Place):
            return address
        parse_address(address)
        return cls(address, None if insecure else secret.read(secret_file))


class EmbeddedTracker:
    """A context with an RPC tracker and RPC servers on the loopback interface of this machine.

    They are real servers in processes of their own, on free ports. They end with the context, and also when
    this process is killed. Who doesn't know their secret gets nothing from them.

    Parameters
    ----------
    servers : int
        How many servers register.
    key : str
        The device key they register under.
    nursery : Nursery, optional
        Where the processes come from; by default one of its own.
    known : bytes, optional
        The secret; by default a new one that only this process and what it starts know.

    Attributes
    ----------
    place : Place
        Where the tracker is.
    """

    def __init__(
        self, servers: int = 1, key: str = LOCAL_KEY, nursery: Nursery | None = None, known: bytes | None = None
    ) -> None:
        self.key = key
        self._servers = servers
        self._nursery = nursery
        self._stack = contextlib.ExitStack()
        self.place = Place("", known or secret.fresh())

    @property
    def address(self) -> str:
        """The tracker's ``host:port``."""
        return self.place.address

    def __enter__(self) -> EmbeddedTracker:
        with contextlib.ExitStack() as stack:
            nursery = self._nursery or stack.enter_context(Nursery())
            tracker = nursery.start(_tracker_main, self.place.secret)
            stack.callback(tracker.kill)
            port = tracker.channel.recv()
            for _ in range(self._servers):
                child = nursery.start(_server_main, (server.LOOPBACK, port), self.key, self.place.secret)
                stack.callback(child.kill)
            self.place = replace(self.place, address=f"{server.LOOPBACK}:{port}")
            session = connect(self.place, timeout=10)
            wait_for_device(session, self.key, timeout=30, count=self._servers)
            session.close()
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()


def parse_address(address: str) -> tuple[str, int]:
    """Split ``host:port``.

    Raises
    ------
    DeviceError
        If it is written differently.
    """
    host, _, port = address.rpartition(":")
    host = host.strip("[]")
    if not _is_host(host) or not re.fullmatch("[0-9]{1,5}", port) or not 0 < int(port) < 65536:
        raise DeviceError(f"tracker {address!r}: write it as host:port, for example 192.168.1.10:9190")
    return host, int(port)


def _is_host(name: str) -> bool:
    try:
        # Parts that are empty or longer than 63 characters are no names for it.
        return name.isprintable() and bool(name.encode("idna"))
    except UnicodeError:
        return False


class Session(rpc.TrackerSession):
    """A connection to a tracker.

    Raises
    ------
    OSError, RefusedError
        If nothing answers, or something that isn't the tracker that it should be.
    """

    def __init__(self, place: Place, timeout: float) -> None:
        self.place = place
        self._timeout = timeout
        super().__init__(parse_address(place.address))

    def _connect(self) -> None:
        self._sock = socket.create_connection(self._addr, timeout=self._timeout)
        server.set_up(self._sock)
        wire.converse(self._sock, wire.to_tracker(self.place.secret), self._timeout)


def connect(place: Place | str, timeout: float = 10.0) -> Session:
    """Connect to the RPC tracker at a place, trying again until ``timeout`` seconds have passed.

    An address alone is that of a tracker with this user's secret, see `Place.of`.

    Raises
    ------
    DeviceError
        If nothing answers there, or something that isn't the tracker that it should be.
    """
    place = Place.of(place)
    deadline = time.monotonic() + timeout
    while True:
        try:
            return Session(place, min(max(0.5, deadline - time.monotonic()), _MOST_SECONDS))
        except wire.RefusedError as err:
            raise DeviceError(f"tracker {place}: {err}") from err
        except OSError as err:
            if time.monotonic() + _POLL > deadline:
                reason = err.strerror or str(err)
                raise DeviceError(
                    f"tracker {place}: no answer within {timeout:g} s ({reason}); "
                    "start one with 'nnfuze devices tracker' or check the address"
                ) from err
        time.sleep(_POLL)


def devices(tracker: Session) -> dict[str, list[str]]:
    """Return the address of every registered server, by device key.

    Raises
    ------
    DeviceError
        If the tracker has gone.
    """
    return _addresses(_summary(tracker))


def _summary(tracker: Session) -> dict[str, Any]:
    try:
        return tracker.summary()
    except (OSError, RuntimeError, ValueError) as err:
        raise DeviceError(f"tracker {_name(tracker)}: connection lost ({err})") from err


def _addresses(summary: dict[str, Any]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for entry in summary["server_info"]:
        host, port = entry["addr"]
        found.setdefault(entry["key"].removeprefix("server:"), []).append(f"{host}:{port}")
    return found


@dataclass(frozen=True)
class Boards:
    """The servers that a tracker knows under one key.

    Attributes
    ----------
    addresses : tuple of str
        ``host:port`` of each.
    free : int
        How many of them wait for a client.
    waiting : int
        How many clients wait for one of them.
    """

    addresses: tuple[str, ...]
    free: int
    waiting: int

    @property
    def in_use(self) -> int:
        """How many have a client."""
        return len(self.addresses) - self.free


def boards(tracker: Session) -> dict[str, Boards]:
    """Return what is registered at a tracker, and how much of it is free, by device key.

    Raises
    ------
    DeviceError
        If the tracker has gone.
    """
    summary = _summary(tracker)
    found = {}
    for key, addresses in sorted(_addresses(summary).items()):
        queue = summary["queue_info"].get(key, {})
        free = min(int(queue.get("free", 0)), len(addresses))
        found[key] = Boards(tuple(addresses), free, int(queue.get("pending", 0)))
    return found


def wait_for_device(tracker: Session, key: str, timeout: float = 60.0, count: int = 1) -> list[str]:
    """Wait until at least ``count`` servers are registered under ``key`` and return their addresses.

    Raises
    ------
    DeviceError
        If there are fewer after ``timeout`` seconds.
    """
    deadline = time.monotonic() + timeout
    pause = 0.02
    while True:
        found = devices(tracker)
        if len(found.get(key, ())) >= count:
            return found.get(key, [])
        if time.monotonic() > deadline:
            keys = ", ".join(sorted(found)) or "none"
            raise DeviceError(
                f"tracker {_name(tracker)}: no device under key {key!r} after {timeout:g} s; registered keys: {keys}"
            )
        time.sleep(pause)
        pause = min(2 * pause, _POLL)


def check_reachable(tracker: Place | None, key: str | None, wait: float) -> None:
    """Find out that a tracker or a device is missing before the time-consuming part, not after it."""
    if tracker is not None and key is not None:
        wait_for_device(connect(tracker, min(wait, 10.0)), key, wait)


def request(tracker: Session, key: str, session_timeout: float = 0) -> tuple[rpc.RPCSession, str]:
    """Wait for a free device under ``key`` and open a session on it.

    Parameters
    ----------
    tracker
        From ``connect``; only one request at a time on one connection.
    key
        The device key.
    session_timeout
        Seconds after which the device ends the session; 0 for never.

    Returns
    -------
    tuple
        The session and the device's ``host:port``.

    Raises
    ------
    OSError, RuntimeError
        If the tracker or the device drops the connection.
    """
    host, port, word = reserve(tracker, key)
    return open_session(tracker.place.secret, host, port, word, session_timeout), f"{host}:{port}"


def reserve(tracker: Session, key: str) -> tuple[str, int, str]:
    """Wait for a free device under ``key``; return host, port and the word that it waits for, see ``open_session``."""
    base.sendjson(tracker._sock, [base.TrackerCode.REQUEST, key, "", 1])
    code, value = base.recvjson(tracker._sock)
    if code != base.TrackerCode.SUCCESS:
        raise RuntimeError(f"the tracker refused the request for {key!r}")
    host, port, word = value
    return host, int(port), word


def end_session(remote: rpc.RPCSession) -> None:
    """Give the device back now, not when Python has collected the last object that came from it."""
    with contextlib.suppress(OSError, RuntimeError, AttributeError):
        remote.get_function("CloseRPCConnection")()


def use_threads(remote: rpc.RPCSession, count: int) -> None:
    """Let the kernels of a session run on ``count`` threads (at most the CPUs that its server may use).

    Raises
    ------
    DeviceError
        If the board runs TVM's own server, and that one takes fewer.
    """
    try:
        remote.get_function(server.USE_THREADS)(count)
    except AttributeError:
        big_cores = 1
        remote.get_function("runtime.config_threadpool")(big_cores, count)
        found = remote.get_function("runtime.NumThreads")()
        if found < count:
            raise DeviceError(
                f"the board's server runs kernels on {found} of {count} threads; "
                f"start it with 'nnfuze devices serve', or with TVM_NUM_THREADS={count}"
            ) from None


def _name(tracker: Session) -> str:
    return tracker.place.address


def _tracker_main(channel: Connection, known: bytes) -> None:
    sock = server.listen(server.LOOPBACK, 0)
    channel.send(sock.getsockname()[1])
    tracker_server.serve(sock, known)


def _server_main(_channel: Connection, tracker: tuple[str, int], key: str, known: bytes) -> None:
    server.start(tracker, key, known)
