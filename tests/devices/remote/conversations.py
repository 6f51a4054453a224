"""What may be sent to a tracker and a board, right and wrong, and ways of sending it."""

from __future__ import annotations

import contextlib
import json
import random
import socket
import struct
from collections.abc import Iterator

from tvm.rpc import base
from tvm.rpc.base import TrackerCode

from nnfuze_tvm.devices.remote import wire

TRACKER_MAGIC = struct.pack("<i", base.RPC_TRACKER_MAGIC)


def frame(text: bytes, length: int | None = None) -> bytes:
    return struct.pack("<i", len(text) if length is None else length) + text


def client(name: bytes, length: int | None = None) -> bytes:
    return struct.pack("<ii", base.RPC_MAGIC, len(name) if length is None else length) + name


# What a tracker may be sent after the handshake.
BAD_QUESTIONS = {
    "a negative length": frame(b"[1]", -1),
    "no length": frame(b"", 0),
    "a huge length": frame(b"[1]", 2**31 - 1),
    "half a message": frame(b"[6", 100),
    "no text": frame(b"\xff\xfe\xfd"),
    "no JSON": frame(b"hello"),
    "a deep nest": frame(b"[" * 10_000),
    "deep and whole": frame(b"[" * 5_000 + b"]" * 5_000),
    "a long number": frame(b"[" + b"9" * 10_000 + b"]"),
    "an object": frame(b'{"a": 1}'),
    "nothing": frame(b"[]"),
    "a code that is none": frame(b'["PUT"]'),
    "an unknown code": frame(b"[99]"),
    "a code that is no integer": frame(b"[NaN]"),
    "a code that is true": frame(b"[true]"),
    "too few arguments": frame(b"[3]"),
    "a key that can't be one": wire.message([TrackerCode.PUT, {"a": []}, [1, "w"], None]),
    "a port that is none": wire.message([TrackerCode.PUT, "board", [-1, "w"], None]),
    "a port that is text": wire.message([TrackerCode.PUT, "board", ["1", "w"], None]),
    "an offer that is none": wire.message([TrackerCode.PUT, "board", None, None]),
    "a name with an escape": wire.message([TrackerCode.PUT, "\x1b[2J", [1, "w"], None]),
    "a name without end": wire.message([TrackerCode.PUT, "x" * 9_000, [1, "w"], None]),
    "no priority": wire.message([TrackerCode.REQUEST, "board", "", "high"]),
    "an infinite priority": frame(b'[4, "board", "", 1e999]'),
    "an address that is none": wire.message([TrackerCode.UPDATE_INFO, {"key": "server:x", "addr": 7}]),
    "information that is none": wire.message([TrackerCode.UPDATE_INFO, ["key"]]),
    "a key that is a number": wire.message([TrackerCode.UPDATE_INFO, {"key": 5, "addr": [None, 1]}]),
    "a wish to end it": wire.message([TrackerCode.STOP, "tracker:0.5"]),
    "a thousand requests": wire.message([TrackerCode.REQUEST, "nothing", "", 1]) * 1000,
}

# What a tracker or a board may be sent at the very beginning.
BAD_BEGINNINGS = {
    "nothing at all": b"",
    "a byte": b"n",
    "a web browser's": b"GET / HTTP/1.1\r\nHost: x\r\n\r\n",
    "one for TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
    "zeros": bytes(1000),
    "TVM's to a tracker": TRACKER_MAGIC + wire.message([TrackerCode.SUMMARY]),
    "TVM's to a board": client(b"client:board"),
    "a negative length": client(b"client:board", -5),
    "a length of none": client(b"", 0),
    "a huge length": client(b"client:board", 2**31 - 1),
    "half a key": client(b"client:", 100),
    "a key that is no text": client(b"\xff" * 20),
    "a key of blanks": client(b"    "),
    "our magic word": b"nnf1",
    "half a nonce": b"nnf1" + bytes(16),
    "a wrong proof": b"nnf1" + bytes(64),
    "a proof and much more": b"nnf1" + bytes(100_000),
}

# Seconds that a client may ask for and a board doesn't give.
BAD_SECONDS = ("nan", "-1", "0", "-inf", "abc", "", "1e-400")

_QUESTIONS = [
    [TrackerCode.PING],
    [TrackerCode.SUMMARY],
    [TrackerCode.GET_PENDING_MATCHKEYS],
    [TrackerCode.UPDATE_INFO, {"key": "server:fuzz", "addr": [None, 9999]}],
    [TrackerCode.PUT, "fuzz", [9999, "fuzz:0.5"], None],
    [TrackerCode.REQUEST, "fuzz", "me", 1],
]


def mutants(seed: int, count: int) -> Iterator[bytes]:
    """Yield conversations that were right before something happened to them, the same ones for a seed."""
    rng = random.Random(seed)
    for _ in range(count):
        which = rng.randrange(4)
        if which == 0:
            words = TRACKER_MAGIC + b"".join(wire.message(q) for q in rng.sample(_QUESTIONS, 3))
        elif which == 1:
            words = client(f"client:board:{rng.random()} -timeout={rng.random()}".encode())
        elif which == 2:
            words = b"nnf1" + rng.randbytes(64) + TRACKER_MAGIC
        else:
            value = rng.choice(_QUESTIONS)
            strange = rng.choice([None, -1, 2**80, 1e308, "", "\0", [[]], {}, True])
            words = TRACKER_MAGIC + frame(json.dumps([*value[: rng.randrange(3)], strange, *value]).encode())
        changed = bytearray(words)
        for _ in range(rng.choice([0, 1, 1, 2, 8])):
            at = rng.randrange(len(changed))
            end = at + rng.randrange(1, 9)
            changed[at:end] = rng.choice([b"", rng.randbytes(end - at), changed[at:end] * 2, b"\xff" * 4, b"\0" * 4])
            if not changed:
                break
        yield bytes(changed)


def send(address: tuple[str, int], words: bytes, greeting: wire.Steps[None] | None = None) -> bytes:
    """Say something after a proper greeting, if there is one, and return what comes back at once."""
    with contextlib.suppress(OSError), socket.create_connection(address, timeout=5) as sock:
        if greeting:
            wire.converse(sock, greeting, 5)
        sock.settimeout(0.02)
        sock.sendall(words)
        return sock.recv(4096)
    return b""
