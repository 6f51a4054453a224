"""The RPC server of a board: one session after another, whatever a session, its client or the tracker does.

It speaks the protocol of TVM's own server and needs nothing but TVM. It differs in what it survives: TVM's
server ends with the first kernel that crashes, waits forever for a client that connects and says nothing, stays
busy with a kernel whose client is gone, and gives up on a tracker that is away for a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import ipaddress
import multiprocessing

# Not when it is needed: a server that became another user may not read it any more.
import multiprocessing.popen_fork
import os
import secrets
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from typing import Any

import tvm_ffi
from tvm.rpc import _ffi_api, base
from tvm.rpc import server as tvm_server
from tvm.support import utils

from nnfuze_tvm.devices import cpu, scratch
from nnfuze_tvm.devices.remote import wire
from nnfuze_tvm.devices.remote.door import Client, Door, say, sparing
from nnfuze_tvm.devices.remote.wire import RefusedError
from nnfuze_tvm.errors import DeviceError

# What a client is told in place of an answer begins with one of these, as with TVM's own server.
TIMEOUT_ERROR = "RPCSessionTimeoutError"
CRASH_ERROR = "RPCSessionCrashError"
LAST_WORDS = (TIMEOUT_ERROR, CRASH_ERROR)

# The function by which a session sets its number of threads.
USE_THREADS = "nnfuze.use_threads"

LOOPBACK = "127.0.0.1"
# A session's hard end.
SESSION_SECONDS = 3600.0

_TRACKER_SECONDS = 10.0
_PING_SECONDS = 2.0
# So many pings after the tracker gave us to a client that doesn't come, we register anew.
_UNUSED_PINGS = 3
_RETRY_SECONDS = 1.0
# A session whose client is gone ends by itself, unless a kernel is still running.
_LINGER_SECONDS = 2.0
_POLL_SECONDS = 60.0
_PR_SET_PDEATHSIG = 1


def start(
    tracker: tuple[str, int],
    key: str,
    secret: bytes | None,
    *,
    host: str = LOOPBACK,
    port: int = 0,
    limit: float = SESSION_SECONDS,
    ready: Callable[[int], None] = lambda _: None,
) -> None:
    """Open a port and serve sessions on it, see `serve`.

    Parameters
    ----------
    host, port : str, int
        Where to listen; port 0 is any that is free.
    ready : callable
        Is told the port when it is open, before anybody is served.

    Raises
    ------
    DeviceError
        If the port can't be had, or nobody could reach it.
    """
    check_host(host, tracker[0])
    with listen(host, port) as sock:
        ready(sock.getsockname()[1])
        serve(sock, tracker, key, secret, limit=limit)


def serve(
    sock: socket.socket,
    tracker: tuple[str, int],
    key: str,
    secret: bytes | None,
    address: str | None = None,
    limit: float = SESSION_SECONDS,
) -> None:
    """Serve sessions until this process is ended.

    A session is a process of its own. It ends with its client, and is killed when it outlives the time that the
    client asked for; a client whose session was killed or crashed is told so.

    Parameters
    ----------
    sock : socket.socket
        Listens for clients.
    tracker : tuple of (str, int)
        Host and port of the tracker; waited for as long as it takes, also when it goes away and comes back.
    key : str
        What kind of device this is.
    secret : bytes, optional
        What tracker and clients must know, and are shown to be known here. None is TVM's own protocol, in which the
        tracker's word to a client is all that a session needs.
    address : str, optional
        The host name or address that clients shall use, by default the one that the tracker sees.
    limit : float
        Seconds after which any session ends.
    """
    # TVM would bind every session to this machine's first cores, also those of other servers beside this one.
    os.environ["TVM_BIND_THREADS"] = "0"
    # Also what a server left that was killed in a session.
    scratch.sweep()
    door = Door(sock, secret, key, limit, sparing(say))
    registration: _Registration | None = None
    complaint = ""
    while True:
        try:
            if registration is None:
                registration = _Registration(tracker, key, secret, sock.getsockname()[1], address)
                say(f"registered as {key} with the tracker {tracker[0]}:{tracker[1]}")
                complaint = ""
            client = registration.next_client(door)
        except (OSError, ValueError, RefusedError) as err:
            if str(err) != complaint:
                complaint = str(err)
                say(f"tracker {tracker[0]}:{tracker[1]}: {complaint}; trying again")
            if registration:
                registration.close()
                registration = None
            time.sleep(_RETRY_SECONDS)
            continue
        with client.sock:
            try:
                _session(door, registration, client)
            except OSError as err:
                # No space on the disk, no memory for a process: perhaps the next one finds some.
                _part(client, f"{CRASH_ERROR}: no session: {err}")
                time.sleep(_RETRY_SECONDS)


class _Registration:
    """A server's place at the tracker: known to it, and offered to one client at a time.

    Raises
    ------
    OSError, ValueError, RefusedError
        From every method, if the tracker does not answer as it should.
    """

    def __init__(
        self, tracker: tuple[str, int], key: str, secret: bytes | None, port: int, address: str | None
    ) -> None:
        self._key = key
        self._port = port
        self._address = address
        self._sock = socket.create_connection(tracker, timeout=_TRACKER_SECONDS)
        set_up(self._sock)
        wire.converse(self._sock, wire.to_tracker(secret), _TRACKER_SECONDS)
        self._ask(base.TrackerCode.UPDATE_INFO, {"key": f"server:{key}", "addr": (address, port)})

    def close(self) -> None:
        """Leave the tracker, or, in a session's process, only what it has of it."""
        self._sock.close()

    def next_client(self, door: Door) -> Client:
        """Wait for the client that the tracker sends."""
        unused = _UNUSED_PINGS
        while True:
            if unused == _UNUSED_PINGS:
                # A client that was promised and didn't come may not come later, when another one is waited for.
                word = f"{self._key}:{secrets.token_hex(16)}"
                self._ask(base.TrackerCode.PUT, self._key, (self._port, word), self._address)
                unused = 0
            if client := door.wait(word, _PING_SECONDS, self._sock):
                return client
            # The tracker says nothing unasked: if that woke us, it is its end and the question fails at once.
            pending = self._ask(base.TrackerCode.GET_PENDING_MATCHKEYS)
            unused = 0 if word in pending else unused + 1

    def _ask(self, code: int, *args: Any) -> Any:
        answer = wire.converse(self._sock, wire.ask([code, *args]), _TRACKER_SECONDS)
        if code != base.TrackerCode.GET_PENDING_MATCHKEYS and answer != base.TrackerCode.SUCCESS:
            raise RefusedError(f"it refused request {code}")
        return answer


def listen(host: str, port: int) -> socket.socket:
    """Return a socket that listens; its connections are set up as `set_up` says.

    Raises
    ------
    DeviceError
        If there is no such address, or the port is taken.
    """
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        sock = socket.create_server((host, port), family=family)
    except (OSError, UnicodeError, OverflowError) as err:
        # Python adds the address once more.
        reason = str(getattr(err, "strerror", None) or err).partition(" (")[0]
        raise DeviceError(f"can't listen on {host}, port {port}: {reason}; give another --port or --host") from None
    # Connections have what the socket has that they came from.
    set_up(sock)
    return sock


def check_host(host: str, tracker: str) -> None:
    """Check that clients reach a server on ``host`` that is registered with the tracker on another host.

    Raises
    ------
    DeviceError
        If they don't.
    """
    if is_loopback(host) and not is_loopback(tracker):
        raise DeviceError(
            f"tracker {tracker}: on another machine, whose clients don't reach {host}; give --host, an address of this "
            "machine, or tunnel both ports through ssh (docs/devices.md)"
        )


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that address."""
    try:
        return ipaddress.ip_address(socket.getaddrinfo(host, None)[0][4][0]).is_loopback
    except (OSError, UnicodeError, ValueError):
        return False


def set_up(sock: socket.socket) -> None:
    """Have the system send at once, and find out within half a minute that the other side's machine is gone.

    TVM sends a message to or from a tracker as its length and its text. By default the text waits until the other
    side's system has acknowledged the length, for which that takes 40 ms.
    """
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            with contextlib.suppress(OSError):
                sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _session(door: Door, registration: _Registration, client: Client) -> None:
    """Run one session to its end, which is the client's, the timeout or a crash."""
    with scratch.folder("session") as folder:
        arguments = (door, registration, client.sock, folder, os.getpid())
        process = multiprocessing.get_context("fork").Process(target=_session_main, args=arguments)
        process.start()
        ended_by = _watch(process, door, client)
        if process.is_alive():
            process.kill()
        process.join()
    code = process.exitcode or 0
    if ended_by == "timeout":
        last_words = f"{TIMEOUT_ERROR}: the session took longer than the {client.seconds:g} s that it may take"
    elif code and ended_by != "client":
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last_words = f"{CRASH_ERROR}: the session ended with {name}"
    else:
        return
    _part(client, last_words)


def _part(client: Client, last_words: str) -> None:
    """Tell a client why its session is over and let it leave first: what it sent to nobody would unsay that."""
    say(f"{client.peer}: {last_words}")
    with contextlib.suppress(Exception):
        # One that reads nothing any more must not hold us up.
        client.sock.setblocking(False)
        _ffi_api.ReturnException(client.sock.fileno(), last_words)
        client.sock.shutdown(socket.SHUT_WR)
        client.sock.settimeout(_LINGER_SECONDS / 4)
        deadline = time.monotonic() + _LINGER_SECONDS
        while client.sock.recv(4096) and time.monotonic() < deadline:
            pass


def _watch(process: BaseProcess, door: Door, client: Client) -> str:
    """Wait until a session ends or must be ended; return by what: ``itself``, ``client`` or ``timeout``."""
    poll = select.poll()
    poll.register(process.sentinel, select.POLLIN)
    poll.register(client.sock, getattr(select, "POLLRDHUP", 0))
    poll.register(door.sock, select.POLLIN)
    deadline = time.monotonic() + client.seconds
    ended_by = "timeout"
    while (left := deadline - time.monotonic()) > 0:
        ready = [fd for fd, _ in poll.poll(min(left, _POLL_SECONDS) * 1000 + 1)]
        if process.sentinel in ready:
            return "client" if ended_by == "client" else "itself"
        if door.sock.fileno() in ready:
            door.turn_away()
        if client.sock.fileno() in ready:
            poll.unregister(client.sock)
            deadline = min(deadline, time.monotonic() + _LINGER_SECONDS)
            ended_by = "client"
    return ended_by


def _session_main(door: Door, registration: _Registration, client: socket.socket, folder: str, parent: int) -> None:
    # Else a server that is killed could not be started again on its port before its session has ended, too.
    door.sock.close()
    registration.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        return
    client.setblocking(True)
    # TVM's functions for sending and loading files keep it for as long as this process lives.
    files = utils.TempDirectory(os.path.join(folder, "files"))
    os.chdir(files.path)
    tvm_server._server_env("", files)
    tvm_ffi.register_global_func(USE_THREADS, _use_threads, override=True)
    tvm_ffi.register_global_func(cpu.DESCRIBE, cpu.describe, override=True)
    _ffi_api.ServerLoop(client.fileno())
    sys.stdout.flush()
    sys.stderr.flush()
    # The parent removes the folder; nothing else is left to be done, and much could go wrong in a process
    # that kernels have written to.
    os._exit(0)


def _use_threads(count: int) -> None:
    """Let this session's kernels run on ``count`` threads, at most the CPUs that this process may use.

    Told of no CPUs, TVM takes half of an x86 machine's for hyper-threads and runs parallel loops on those alone.
    """
    cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)
    share_all_cores = -3
    configure = tvm_ffi.get_global_func("runtime.config_threadpool")
    configure(share_all_cores, min(count, len(cpus)), [str(cpu) for cpu in cpus][:count])
