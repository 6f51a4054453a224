"""Messages before and between those of TVM's RPC: who proves to know a secret, and what a tracker is asked.

A conversation is a generator, so that it is the same for who waits, who serves many at once, and who does not block:
it yields bytes to send or the number of bytes that it needs, and is sent the latter.

Before TVM's own handshake, both sides prove that they know the secret. Each draws a nonce; the proofs are HMACs of both
nonces, of what the connection is for, and of whose proof it is, so none fits another connection. The client proves
first: a stranger gets nothing that depends on the secret.
"""

from __future__ import annotations

import hmac
import json
import secrets
import socket
import struct
import time
from collections.abc import Generator
from typing import Any, TypeVar

from tvm.rpc import base

T = TypeVar("T")
Steps = Generator[bytes | int, bytes, T]

# What a connection is for.
TRACKER = b"tracker"
SESSION = b"session"

_MAGIC = b"nnf1"
_SIZE = 32
# A tracker's longest answer is the list of its boards.
_MOST_BYTES = 1 << 20


class RefusedError(Exception):
    """The other side is not who it should be, or doesn't say it as it should."""


class NoAnswerError(OSError):
    """The other side went away before it had said what it should."""


def prove(secret: bytes, purpose: bytes) -> Steps[None]:
    """Speak first: show to know the secret, and see that the other side does.

    Raises
    ------
    RefusedError
        From the conversation, if it doesn't.
    """
    ours = secrets.token_bytes(_SIZE)
    yield _MAGIC + ours
    try:
        known = (yield len(_MAGIC)) == _MAGIC
    except NoAnswerError:
        raise NoAnswerError("it closed the connection; TVM's own ask for no secret and need --insecure") from None
    if not known:
        raise RefusedError("what answers there asks for no secret, so it is something else")
    theirs = yield _SIZE
    yield _proof(secret, b"client", purpose, ours, theirs)
    try:
        answer = yield _SIZE
    except NoAnswerError:
        raise RefusedError("it has another secret") from None
    if not hmac.compare_digest(answer, _proof(secret, b"server", purpose, ours, theirs)):
        raise RefusedError("it doesn't know the secret")


def demand(secret: bytes, purpose: bytes) -> Steps[None]:
    """Listen first: see that the other side knows the secret, then show to know it.

    Raises
    ------
    RefusedError
        From the conversation, if it doesn't.
    """
    magic = yield len(_MAGIC)
    if magic != _MAGIC:
        raise RefusedError("it doesn't offer to prove that it knows the secret")
    theirs = yield _SIZE
    ours = secrets.token_bytes(_SIZE)
    yield _MAGIC + ours
    answer = yield _SIZE
    if not hmac.compare_digest(answer, _proof(secret, b"client", purpose, theirs, ours)):
        raise RefusedError("it doesn't know the secret")
    yield _proof(secret, b"server", purpose, theirs, ours)


def _proof(secret: bytes, whose: bytes, purpose: bytes, clients: bytes, servers: bytes) -> bytes:
    return hmac.digest(secret, b"nnfuze rpc, " + whose + b", " + purpose + clients + servers, "sha256")


def converse(sock: socket.socket, steps: Steps[T], seconds: float) -> T:
    """Go through a conversation on a socket, which has no timeout afterwards; return what comes out.

    Raises
    ------
    OSError
        If it takes longer than that, or the other side goes away.
    """
    deadline = time.monotonic() + seconds
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                sock.settimeout(max(deadline - time.monotonic(), 1e-3))
                sock.sendall(wanted)
                wanted = steps.send(b"")
                continue
            try:
                received = _receive(sock, wanted, deadline)
            except NoAnswerError as err:
                wanted = steps.throw(err)
            else:
                wanted = steps.send(received)
    except StopIteration as end:
        sock.settimeout(None)
        return end.value


def _receive(sock: socket.socket, count: int, deadline: float) -> bytes:
    received = bytearray()
    while len(received) < count:
        left = deadline - time.monotonic()
        if left <= 0:
            raise TimeoutError("timed out")
        sock.settimeout(left)
        try:
            part = sock.recv(count - len(received))
        except ConnectionResetError:
            part = b""
        if not part:
            raise NoAnswerError("it closed the connection")
        received += part
    return bytes(received)


def message(value: Any) -> bytes:
    """Return a message to or from a tracker: TVM's form, the length and the text."""
    text = json.dumps(value).encode()
    return struct.pack("<i", len(text)) + text


def receive(most: int = _MOST_BYTES) -> Steps[Any]:
    """Receive a message of at most so many bytes and return the value in it.

    Raises
    ------
    ValueError
        From the conversation, if it isn't one.
    """
    (length,) = struct.unpack("<i", (yield 4))
    if not 0 < length <= most:
        raise ValueError(f"a message of {length} bytes")
    text = yield length
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("a message that is nested too deep") from None


def ask(value: Any) -> Steps[Any]:
    """Send a message and return the answer."""
    yield message(value)
    return (yield from receive())


def to_tracker(secret: bytes | None) -> Steps[None]:
    """Be let in by a tracker: our handshake, where there is a secret, and TVM's, in which each says the same number.

    Raises
    ------
    RefusedError
        From the conversation, if it isn't the tracker that it should be.
    """
    if secret is not None:
        yield from prove(secret, TRACKER)
    number = struct.pack("<i", base.RPC_TRACKER_MAGIC)
    yield number
    try:
        answer = yield 4
    except NoAnswerError:
        raise NoAnswerError("it closed the connection; perhaps it asks for a secret") from None
    if answer != number:
        raise RefusedError("what answers there is no TVM RPC tracker")
