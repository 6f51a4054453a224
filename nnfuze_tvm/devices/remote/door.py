"""Who comes to a board: many at once, of whom the one that the tracker sent is let in.

Nothing that visitors send, or don't send, keeps that one waiting: they are heard side by side, each has a few seconds,
and where they are too many, the one that has been there for longest goes.
"""

from __future__ import annotations

import hmac
import math
import selectors
import socket
import struct
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from tvm.rpc import base

from nnfuze_tvm.devices.remote import wire
from nnfuze_tvm.devices.remote.wire import RefusedError, Steps

_HANDSHAKE_SECONDS = 5.0
_MOST_VISITORS = 32
_MOST_BYTES = 4096


def say(text: str) -> None:
    """Print a line with the time."""
    print(f"{time.strftime('%F %T')} {text}", file=sys.stderr, flush=True)


def sparing(say: Callable[[str], None], seconds: float = 1.0) -> Callable[[str], None]:
    """Return a function that says at most one thing in so many seconds: strangers shall fill no disk."""
    last = -math.inf
    unsaid = 0

    def say_sometimes(text: str) -> None:
        nonlocal last, unsaid
        if time.monotonic() - last < seconds:
            unsaid += 1
            return
        say(f"{text} ({unsaid} more were turned away)" if unsaid else text)
        last, unsaid = time.monotonic(), 0

    return say_sometimes


@dataclass
class Client:
    """Whom the tracker sent: the connection, the address, and the seconds that the session may take."""

    sock: socket.socket
    peer: str
    seconds: float


@dataclass
class _Visitor:
    sock: socket.socket
    peer: str
    steps: Steps[float]
    deadline: float
    needed: int = 0
    received: bytearray = field(default_factory=bytearray)


class Door:
    """A board's listening socket and everybody who came to it.

    Parameters
    ----------
    sock : socket.socket
        Listens.
    secret : bytes, optional
        What clients must know; None if that is only the word that the tracker gave them.
    key : str
        What kind of board this is.
    limit : float
        Seconds that a session may take at most.
    say : callable
        Is told who was turned away.
    """

    def __init__(
        self, sock: socket.socket, secret: bytes | None, key: str, limit: float, say: Callable[[str], None]
    ) -> None:
        self.sock = sock
        self._secret = secret
        self._key = key
        self._limit = limit
        self._say = say
        self._word = ""
        self._visitors: dict[socket.socket, _Visitor] = {}
        sock.setblocking(False)

    def wait(self, word: str, seconds: float, tracker: socket.socket) -> Client | None:
        """Wait for the client that knows the tracker's word; None after some seconds, or if the tracker speaks."""
        self._word = word
        end = time.monotonic() + seconds
        while (now := time.monotonic()) < end:
            for late in [v for v in self._visitors.values() if v.deadline <= now]:
                self._turn_away(late, f"said nothing for {_HANDSHAKE_SECONDS:g} s")
            with selectors.DefaultSelector() as selector:
                for each in (self.sock, tracker, *self._visitors):
                    selector.register(each, selectors.EVENT_READ)
                deadlines = [visitor.deadline for visitor in self._visitors.values()]
                ready = [key.fileobj for key, _ in selector.select(max(min([end, *deadlines]) - now, 0))]
            for visitor in [self._visitors[each] for each in ready if each in self._visitors]:
                if client := self._hear(visitor):
                    self.close_visitors()
                    return client
            if self.sock in ready:
                self._let_come()
            if tracker in ready:
                return None
        return None

    def close_visitors(self) -> None:
        """Turn everybody away, also who just came."""
        for visitor in self._visitors.values():
            visitor.sock.close()
        self._visitors.clear()

    def turn_away(self) -> None:
        """Turn away who comes while a session runs: nobody is expected."""
        for visitor, _ in self._arrivals():
            visitor.close()

    def _arrivals(self) -> list[tuple[socket.socket, str]]:
        found: list[tuple[socket.socket, str]] = []
        try:
            while len(found) < _MOST_VISITORS:
                visitor, peer = self.sock.accept()
                found.append((visitor, str(peer[0])))
        except OSError:
            # Nobody any more, or one that went before it was his turn.
            pass
        return found

    def _let_come(self) -> None:
        for sock, peer in self._arrivals():
            if len(self._visitors) >= _MOST_VISITORS:
                self._turn_away(next(iter(self._visitors.values())), "there are too many visitors")
            sock.setblocking(False)
            visitor = _Visitor(sock, peer, self._greet(), time.monotonic() + _HANDSHAKE_SECONDS)
            self._visitors[sock] = visitor
            self._advance(visitor, next(visitor.steps))

    def _turn_away(self, visitor: _Visitor, why: str) -> None:
        self._visitors.pop(visitor.sock, None)
        visitor.sock.close()
        self._say(f"{visitor.peer}: {why}")

    def _hear(self, visitor: _Visitor) -> Client | None:
        """Take what a visitor sent; return the client if that was it."""
        try:
            part = visitor.sock.recv(visitor.needed - len(visitor.received))
            if not part:
                raise RefusedError("it went away")
            visitor.received += part
            if len(visitor.received) == visitor.needed:
                received = bytes(visitor.received)
                visitor.received.clear()
                self._advance(visitor, visitor.steps.send(received))
        except StopIteration as end:
            del self._visitors[visitor.sock]
            return Client(visitor.sock, visitor.peer, end.value)
        except BlockingIOError:
            pass
        except (RefusedError, OSError, ValueError) as err:
            self._turn_away(visitor, str(err))
        return None

    def _advance(self, visitor: _Visitor, wanted: bytes | int) -> None:
        while isinstance(wanted, bytes):
            # A few bytes, the first ones on this connection: the system takes them all.
            if visitor.sock.send(wanted) != len(wanted):
                raise RefusedError("it takes no answer")
            wanted = visitor.steps.send(b"")
        visitor.needed = wanted

    def _greet(self) -> Steps[float]:
        """Our handshake, where there is a secret, and TVM's; returns the seconds that the session may take."""
        if self._secret is not None:
            yield from wire.demand(self._secret, wire.SESSION)
        magic, length = struct.unpack("<ii", (yield 8))
        if magic != base.RPC_MAGIC or not 0 < length <= _MOST_BYTES:
            raise RefusedError("no TVM RPC client")
        name, *options = (yield length).decode().split() or [""]
        if not hmac.compare_digest(name.encode(), f"client:{self._word}".encode()):
            yield struct.pack("<i", base.RPC_CODE_MISMATCH)
            raise RefusedError("not the client that the tracker sent")
        seconds = self._seconds(options)
        ours = f"server:{self._key}".encode()
        yield struct.pack("<ii", base.RPC_CODE_SUCCESS, len(ours)) + ours
        return seconds

    def _seconds(self, options: Sequence[str]) -> float:
        """The time that the client asked for, at most ours."""
        asked = [float(option.removeprefix("-timeout=")) for option in options if option.startswith("-timeout=")]
        if any(math.isnan(seconds) or seconds <= 0 for seconds in asked):
            raise RefusedError("it asked for a session of no time")
        return min([self._limit, *asked])
