"""Sessions on boards, opened by those who know the board's secret, and with boards that know it, too.

TVM's client connects by itself, says its key and then trusts whoever answers: what comes back may be code to run. So
the connection is made and proven here, and TVM's client is given it afterwards. It connects to a port of ours, is
passed on until the session stands, and then its end of that detour is replaced by the proven connection.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import socket
import stat
import threading

from tvm import rpc

from nnfuze_tvm.devices.remote import server, wire

_HANDSHAKE_SECONDS = 20.0
_BYTES = 1 << 16


def open_session(secret: bytes | None, host: str, port: int, word: str, seconds: float = 0) -> rpc.RPCSession:
    """Open a session on a board.

    Parameters
    ----------
    secret : bytes, optional
        What both sides must know; None for a board without one.
    host, port, word : str, int, str
        The board, and what it waits for, from its tracker.
    seconds : float
        After which the board shall end the session; 0 for when it wants.

    Raises
    ------
    OSError, RuntimeError
        If the board can't be reached, or drops the connection.
    """
    if secret is None:
        return rpc.connect(host, port, word, seconds)
    with socket.create_connection((host, port), timeout=_HANDSHAKE_SECONDS) as board:
        server.set_up(board)
        try:
            wire.converse(board, wire.prove(secret, wire.SESSION), _HANDSHAKE_SECONDS)
        except wire.RefusedError as err:
            raise ConnectionRefusedError(f"board {host}:{port}: {err}") from None
        return _hand_over(board, word, seconds)


def _hand_over(board: socket.socket, word: str, seconds: float) -> rpc.RPCSession:
    """Open a session of TVM's on a connection that is there already."""
    woken, wake = socket.socketpair()
    with socket.create_server((server.LOOPBACK, 0)) as detour, woken:
        detour.settimeout(_HANDSHAKE_SECONDS)
        ends: list[int] = []
        passing = threading.Thread(target=_pass_on, args=(detour, board, woken, ends), daemon=True)
        with wake:
            passing.start()
            remote = rpc.connect(*detour.getsockname(), word, seconds)
        # Nothing is on its way: the answer by which TVM knows that the session stands was the last.
        passing.join()
        os.dup2(board.fileno(), ends[0], inheritable=False)
    return remote


def _pass_on(detour: socket.socket, board: socket.socket, woken: socket.socket, ends: list[int]) -> None:
    """Pass on what TVM's client and the board say until ``woken`` ends; put the client's file number into ``ends``."""
    with contextlib.suppress(OSError):
        while not ends:
            client, peer = detour.accept()
            # Another user may be quicker; what isn't ours is not passed on.
            ends += [fd for fd in map(int, os.listdir("/dev/fd")) if _is_bound(fd, peer)]
            if not ends:
                client.close()
        other = {client: board, board: client}
        with client, selectors.DefaultSelector() as selector:
            for each in (client, board, woken):
                selector.register(each, selectors.EVENT_READ)
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if woken in ready:
                    return
                for sock in (each for each in other if each in ready):
                    if not (part := sock.recv(_BYTES)):
                        return
                    other[sock].sendall(part)


def _is_bound(fd: int, address: tuple[str, int]) -> bool:
    """Whether one of this process's files is the socket with an address."""
    try:
        if not stat.S_ISSOCK(os.fstat(fd).st_mode):
            return False
        sock = socket.socket(fileno=fd)
    except OSError:
        return False
    try:
        return sock.getsockname() == address
    except OSError:
        return False
    finally:
        sock.detach()
