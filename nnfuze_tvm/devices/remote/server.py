"""The RPC server of a board: one session after another, whatever a session, its client or the tracker does.

It speaks the protocol of TVM's own server and needs nothing but TVM. It differs in what it survives: TVM's
server ends with the first kernel that crashes, waits forever for a client that connects and says nothing, stays
busy with a kernel whose client is gone, and gives up on a tracker that is away for a minute.
"""

from __future__ import annotations

import contextlib
import ctypes
import multiprocessing
import os
import select
import signal
import socket
import struct
import sys
import time
from multiprocessing.process import BaseProcess
from typing import Any

import tvm_ffi
from tvm.rpc import _ffi_api, base
from tvm.rpc import server as tvm_server
from tvm.support import utils

from nnfuze_tvm.devices import cpu, scratch

# What a client is told in place of an answer begins with one of these, as with TVM's own server.
TIMEOUT_ERROR = "RPCSessionTimeoutError"
CRASH_ERROR = "RPCSessionCrashError"
LAST_WORDS = (TIMEOUT_ERROR, CRASH_ERROR)

# The function by which a session sets its number of threads.
USE_THREADS = "nnfuze.use_threads"

_HANDSHAKE_SECONDS = 5.0
_TRACKER_SECONDS = 10.0
_PING_SECONDS = 2.0
# So many pings after the tracker gave us to a client that doesn't come, we register anew.
_UNUSED_PINGS = 3
_RETRY_SECONDS = 1.0
# A session whose client is gone ends by itself, unless a kernel is still running.
_LINGER_SECONDS = 2.0
_PR_SET_PDEATHSIG = 1


def start(tracker: tuple[str, int], key: str) -> None:
    """Open a port and serve sessions on it; on loopback only if that is where the tracker is. See `serve`."""
    try:
        near = socket.gethostbyname(tracker[0]).startswith("127.")
    except OSError:
        near = False
    with socket.create_server(("127.0.0.1" if near else "", 0)) as sock:
        serve(sock, tracker, key)


def serve(sock: socket.socket, tracker: tuple[str, int], key: str, address: str | None = None) -> None:
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
    address : str, optional
        The host name or address that clients shall use, by default the one that the tracker sees.
    """
    # TVM would bind every session to this machine's first cores, also those of other servers beside this one.
    os.environ["TVM_BIND_THREADS"] = "0"
    # Also what a server left that was killed in a session.
    scratch.sweep()
    registration: _Registration | None = None
    complaint = ""
    while True:
        try:
            if registration is None:
                registration = _Registration(tracker, key, sock.getsockname()[1], address)
                _say(f"registered as {key} with the tracker {tracker[0]}:{tracker[1]}")
                complaint = ""
            client, peer, timeout = registration.next_client(sock)
        except (OSError, ValueError, RuntimeError) as err:
            if str(err) != complaint:
                complaint = str(err)
                _say(f"tracker {tracker[0]}:{tracker[1]}: {complaint}; trying again")
            if registration:
                registration.close()
                registration = None
            time.sleep(_RETRY_SECONDS)
            continue
        with client:
            _session(sock, client, peer, timeout)


class _Registration:
    """A server's place at the tracker: known to it, and offered to one client at a time.

    Raises
    ------
    OSError, RuntimeError
        From every method, if the tracker does not answer as it should.
    """

    def __init__(self, tracker: tuple[str, int], key: str, port: int, address: str | None) -> None:
        self._key = key
        self._port = port
        self._address = address
        self._sock = socket.create_connection(tracker, timeout=_TRACKER_SECONDS)
        set_up(self._sock)
        self._sock.sendall(struct.pack("<i", base.RPC_TRACKER_MAGIC))
        if struct.unpack("<i", base.recvall(self._sock, 4))[0] != base.RPC_TRACKER_MAGIC:
            raise RuntimeError("what answers there is no TVM RPC tracker")
        self._ask(base.TrackerCode.UPDATE_INFO, {"key": f"server:{key}", "addr": (address, port)})

    def close(self) -> None:
        """Leave the tracker."""
        self._sock.close()

    def next_client(self, sock: socket.socket) -> tuple[socket.socket, str, float | None]:
        """Wait for the client that the tracker sends; return its connection, address and session timeout."""
        unused = _UNUSED_PINGS
        while True:
            if unused == _UNUSED_PINGS:
                # A client that was promised and didn't come may not come later, when another one is waited for.
                matchkey = base.random_key(self._key)
                self._ask(base.TrackerCode.PUT, self._key, (self._port, matchkey), self._address)
                unused = 0
            ready, _, _ = select.select([sock, self._sock], [], [], _PING_SECONDS)
            if sock in ready:
                if client := self._accept(sock, matchkey):
                    return client
            else:
                # The tracker says nothing unasked: if it woke us, that is its end and the question fails at once.
                pending = self._ask(base.TrackerCode.GET_PENDING_MATCHKEYS)
                unused = 0 if matchkey in pending else unused + 1

    def _ask(self, code: int, *args: Any) -> Any:
        base.sendjson(self._sock, [code, *args])
        answer = base.recvjson(self._sock)
        if code != base.TrackerCode.GET_PENDING_MATCHKEYS and answer != base.TrackerCode.SUCCESS:
            raise RuntimeError(f"it refused request {code}")
        return answer

    def _accept(self, sock: socket.socket, matchkey: str) -> tuple[socket.socket, str, float | None] | None:
        client, peer = sock.accept()
        try:
            client.settimeout(_HANDSHAKE_SECONDS)
            magic, length = struct.unpack("<ii", base.recvall(client, 8))
            if magic != base.RPC_MAGIC or not 0 < length < 4096:
                raise ValueError("no TVM RPC client")
            name, *options = base.recvall(client, length).decode().split()
            if name != f"client:{matchkey}":
                client.sendall(struct.pack("<i", base.RPC_CODE_MISMATCH))
                raise ValueError("not the client that the tracker sent")
            ours = f"server:{self._key}".encode()
            client.sendall(struct.pack("<ii", base.RPC_CODE_SUCCESS, len(ours)) + ours)
            timeouts = [float(o.removeprefix("-timeout=")) for o in options if o.startswith("-timeout=")]
            # The session's process reads and writes as if there were no timeout.
            client.settimeout(None)
            set_up(client)
        except (OSError, ValueError) as err:
            client.close()
            _say(f"{peer[0]}: {err}")
            return None
        return client, str(peer[0]), min(timeouts, default=None)


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


def _session(sock: socket.socket, client: socket.socket, peer: str, timeout: float | None) -> None:
    """Run one session to its end, which is the client's, the timeout or a crash."""
    with scratch.folder("session") as folder:
        process = multiprocessing.get_context("fork").Process(target=_session_main, args=(sock, client, folder))
        process.start()
        ended_by = _watch(process, client, timeout)
        if process.is_alive():
            process.kill()
        process.join()
    code = process.exitcode or 0
    if ended_by == "timeout":
        last_words = f"{TIMEOUT_ERROR}: the session took longer than the {timeout:g} s that it may take"
    elif code and ended_by != "client":
        name = signal.Signals(-code).name if code < 0 else f"exit code {code}"
        last_words = f"{CRASH_ERROR}: the session ended with {name}"
    else:
        return
    _say(f"{peer}: {last_words}")
    # A client that reads nothing any more must not hold us up.
    client.setblocking(False)
    with contextlib.suppress(Exception):
        _ffi_api.ReturnException(client.fileno(), last_words)


def _watch(process: BaseProcess, client: socket.socket, timeout: float | None) -> str:
    """Wait until a session ends or must be ended; return by what: ``itself``, ``client`` or ``timeout``."""
    poll = select.poll()
    poll.register(process.sentinel, select.POLLIN)
    poll.register(client, getattr(select, "POLLRDHUP", 0))
    deadline = None if timeout is None else time.monotonic() + timeout
    ended_by = "timeout"
    while True:
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            return ended_by
        ready = [fd for fd, _ in poll.poll(None if left is None else left * 1000 + 1)]
        if process.sentinel in ready:
            return "client" if ended_by == "client" else "itself"
        if ready:
            poll.unregister(client)
            linger = time.monotonic() + _LINGER_SECONDS
            deadline = linger if deadline is None else min(deadline, linger)
            ended_by = "client"


def _session_main(sock: socket.socket, client: socket.socket, folder: str) -> None:
    # Else a server that is killed could not be started again on its port before its session has ended, too.
    sock.close()
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
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


def _say(text: str) -> None:
    print(f"{time.strftime('%F %T')} {text}", file=sys.stderr, flush=True)
