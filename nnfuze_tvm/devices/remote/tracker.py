"""TVM RPC trackers: finding devices, asking for one, and a tracker with servers on this machine."""

from __future__ import annotations

import contextlib
import re
import socket
import struct
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from tvm import rpc
from tvm.rpc import base

from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.devices.remote import server
from nnfuze_tvm.errors import DeviceError

LOCAL_KEY = "local"

_POLL = 0.25


class EmbeddedTracker:
    """A context with an RPC tracker and RPC servers on the loopback interface of this machine.

    They are real servers in processes of their own, on free ports. They end with the context, and also when
    this process is killed.

    Parameters
    ----------
    servers : int
        How many servers register.
    key : str
        The device key they register under.
    nursery : Nursery, optional
        Where the processes come from; by default one of its own.

    Attributes
    ----------
    address : str
        The tracker's ``host:port``.
    """

    def __init__(self, servers: int = 1, key: str = LOCAL_KEY, nursery: Nursery | None = None) -> None:
        self.key = key
        self._servers = servers
        self._nursery = nursery
        self._stack = contextlib.ExitStack()
        self.address = ""

    def __enter__(self) -> EmbeddedTracker:
        with contextlib.ExitStack() as stack:
            nursery = self._nursery or stack.enter_context(Nursery())
            tracker = nursery.start(_tracker_main)
            stack.callback(tracker.kill)
            port = tracker.channel.recv()
            for _ in range(self._servers):
                server = nursery.start(_server_main, ("127.0.0.1", port), self.key)
                stack.callback(server.kill)
            self.address = f"127.0.0.1:{port}"
            session = connect(self.address, timeout=10)
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


def connect(address: str, timeout: float = 10.0) -> rpc.TrackerSession:
    """Connect to the RPC tracker at ``host:port``, trying again until ``timeout`` seconds have passed.

    Raises
    ------
    DeviceError
        If nothing answers there, or something that is no tracker.
    """
    host, port = parse_address(address)
    deadline = time.monotonic() + timeout
    while True:
        try:
            _handshake(host, port, max(0.5, deadline - time.monotonic()))
            session = rpc.TrackerSession((host, port))
            server.set_up(session._sock)
            return session
        except _NoTracker as err:
            raise DeviceError(f"tracker {address}: what answers there is no TVM RPC tracker") from err
        except (OSError, RuntimeError) as err:
            if time.monotonic() + _POLL > deadline:
                reason = err.strerror if isinstance(err, OSError) and err.strerror else str(err)
                raise DeviceError(
                    f"tracker {address}: no answer within {timeout:g} s ({reason}); "
                    "start one with 'nnfuze devices tracker' or check the address"
                ) from err
        time.sleep(_POLL)


def devices(tracker: rpc.TrackerSession) -> dict[str, list[str]]:
    """Return the address of every registered server, by device key.

    Raises
    ------
    DeviceError
        If the tracker has gone.
    """
    return _addresses(_summary(tracker))


def _summary(tracker: rpc.TrackerSession) -> dict[str, Any]:
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


def boards(tracker: rpc.TrackerSession) -> dict[str, Boards]:
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


def track(port: int) -> None:
    """Be a tracker for boards and clients on all interfaces, until this process is ended.

    Raises
    ------
    DeviceError
        If the port is taken.
    """
    from tvm.rpc import tracker

    try:
        sock = socket.create_server(("", port))
        # Connections have what the socket has that they came from.
        server.set_up(sock)
    except OSError as err:
        raise DeviceError(f"port {port}: {err.strerror}; give another --port") from None
    tracker._tracker_server(sock, base.random_key("tracker"))


def wait_for_device(tracker: rpc.TrackerSession, key: str, timeout: float = 60.0, count: int = 1) -> list[str]:
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


def check_reachable(tracker: str | None, key: str | None, wait: float) -> None:
    """Find out that a tracker or a device is missing before the time-consuming part, not after it."""
    if tracker is not None and key is not None:
        wait_for_device(connect(tracker, min(wait, 10.0)), key, wait)


def request(tracker: rpc.TrackerSession, key: str, session_timeout: float = 0) -> tuple[rpc.RPCSession, str]:
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
    host, port, matchkey = reserve(tracker, key)
    return rpc.connect(host, port, matchkey, session_timeout), f"{host}:{port}"


def reserve(tracker: rpc.TrackerSession, key: str) -> tuple[str, int, str]:
    """Wait for a free device under ``key``; return host, port and the word that it waits for, see ``request``."""
    base.sendjson(tracker._sock, [base.TrackerCode.REQUEST, key, "", 1])
    code, value = base.recvjson(tracker._sock)
    if code != base.TrackerCode.SUCCESS:
        raise RuntimeError(f"the tracker refused the request for {key!r}")
    host, port, matchkey = value
    return host, int(port), matchkey


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


def reason(error: BaseException) -> str:
    """Return the line of an RPC error that says what happened; the rest says by which ways it came."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__


class _NoTracker(Exception):
    """Something else listens on the port."""


def _handshake(host: str, port: int, timeout: float) -> None:
    """Check that a tracker answers: TVM's own client would block on anything else."""
    with socket.create_connection((host, port), timeout=timeout) as sock:
        sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        reply = base.recvall(sock, 4)
        if struct.unpack("<i", reply)[0] != base.RPC_TRACKER_MAGIC:
            raise _NoTracker


def _name(tracker: Any) -> str:
    return "{}:{}".format(*tracker._addr)


def _listen() -> tuple[socket.socket, int]:
    sock = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    sock.bind(("127.0.0.1", 0))
    server.set_up(sock)
    sock.listen(64)
    return sock, sock.getsockname()[1]


def _tracker_main(channel: Connection) -> None:
    from tvm.rpc import tracker

    sock, port = _listen()
    channel.send(port)
    tracker._tracker_server(sock, base.random_key("tracker"))


def _server_main(_channel: Connection, tracker: tuple[str, int], key: str) -> None:
    server.serve(_listen()[0], tracker, key)
