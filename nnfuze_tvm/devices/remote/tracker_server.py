"""A tracker: boards offer themselves, clients ask for one, and both prove first that they know the secret.

It speaks the protocol of TVM's own tracker behind that proof, and without a secret nothing else, so that TVM's servers
and clients can use it. Nothing that anybody sends ends it: a message that isn't as it should be ends its connection.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
import socket
import struct
from collections.abc import Callable
from typing import Any

from tvm.rpc import base
from tvm.rpc.base import TrackerCode

from nnfuze_tvm.devices.remote import wire
from nnfuze_tvm.devices.remote.door import say, sparing
from nnfuze_tvm.devices.remote.wire import RefusedError, Steps

_HANDSHAKE_SECONDS = 5.0
# Who has not proved anything yet; beyond that, the one that has been silent for longest is dropped.
_MOST_STRANGERS = 64
# A board has one connection, a job one per board and one more.
_MOST_CONNECTIONS = 512
_MOST_BYTES = 1 << 14
_MOST_CHARACTERS = 255
_MOST_REQUESTS = 16


def serve(sock: socket.socket, secret: bytes | None) -> None:
    """Be a tracker on a listening socket until this process is ended.

    Parameters
    ----------
    sock : socket.socket
        Listens for boards and clients.
    secret : bytes, optional
        What they must know; None lets everybody in.
    """
    asyncio.run(_Tracker(secret, sparing(say)).run(sock))


class _Peer:
    """A board or a client that was let in."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.host = str(writer.get_extra_info("peername")[0])
        self.info: dict[str, Any] | None = None
        self.word = ""
        self.requests = 0
        self._writer = writer

    @property
    def gone(self) -> bool:
        return self._writer.transport.is_closing()

    def send(self, value: Any) -> None:
        self._writer.write(wire.message(value))


class _Queue:
    """The boards under one key that wait for a client, and the clients that wait for one of them."""

    def __init__(self) -> None:
        self.offers: dict[_Peer, tuple[str, int, str]] = {}
        self.requests: list[tuple[int, int, _Peer]] = []

    def match(self) -> None:
        while self.offers and self.requests:
            *_, client = heapq.heappop(self.requests)
            client.requests -= 1
            if client.gone:
                continue
            board = next(iter(self.offers))
            client.send([TrackerCode.SUCCESS, self.offers.pop(board)])
            board.word = ""

    def leave(self, peer: _Peer) -> None:
        self.offers.pop(peer, None)
        if any(entry[-1] is peer for entry in self.requests):
            self.requests = [entry for entry in self.requests if entry[-1] is not peer]
            heapq.heapify(self.requests)


class _Tracker:
    def __init__(self, secret: bytes | None, say: Callable[[str], None]) -> None:
        self._secret = secret
        self._say = say
        self._strangers: dict[asyncio.StreamWriter, None] = {}
        self._peers: set[_Peer] = set()
        self._queues: dict[str, _Queue] = {}
        self._count = itertools.count()

    async def run(self, sock: socket.socket) -> None:
        async with await asyncio.start_server(self._visit, sock=sock) as server:
            await server.serve_forever()

    async def _visit(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """A connection, from its first byte to its last."""
        if len(self._strangers) >= _MOST_STRANGERS:
            oldest = next(iter(self._strangers))
            del self._strangers[oldest]
            oldest.transport.abort()
        self._strangers[writer] = None
        peer = None
        try:
            await asyncio.wait_for(_converse(reader, writer, self._greet()), _HANDSHAKE_SECONDS)
            if len(self._peers) >= _MOST_CONNECTIONS:
                raise RefusedError("there are too many connections")
            self._strangers.pop(writer, None)
            peer = _Peer(writer)
            self._peers.add(peer)
            while True:
                self._answer(peer, await _converse(reader, writer, wire.receive(_MOST_BYTES)))
                # Whoever doesn't take the answers isn't asked for more questions.
                await writer.drain()
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        except asyncio.TimeoutError:
            self._say(f"{_name(writer)}: said nothing for {_HANDSHAKE_SECONDS:g} s")
        except (RefusedError, OSError, ValueError) as err:
            self._say(f"{_name(writer)}: {err}")
        finally:
            self._strangers.pop(writer, None)
            if peer:
                self._leave(peer)
            writer.transport.abort()

    def _greet(self) -> Steps[None]:
        if self._secret is not None:
            yield from wire.demand(self._secret, wire.TRACKER)
        number = struct.pack("<i", base.RPC_TRACKER_MAGIC)
        if (yield 4) != number:
            raise RefusedError("it is no client of a TVM RPC tracker")
        yield number

    def _leave(self, peer: _Peer) -> None:
        self._peers.discard(peer)
        for key, queue in list(self._queues.items()):
            queue.leave(peer)
            if not queue.offers and not queue.requests:
                del self._queues[key]

    def _answer(self, peer: _Peer, question: Any) -> None:
        """Answer a message; ValueError if it isn't one."""
        if not isinstance(question, list) or not question or type(question[0]) is not int:
            raise ValueError("it sent no question for a tracker")
        code, *rest = question
        answers: dict[int, tuple[int, Callable[..., Any]]] = {
            TrackerCode.PING: (0, lambda _: TrackerCode.SUCCESS),
            TrackerCode.PUT: (2, self._put),
            TrackerCode.REQUEST: (3, self._request),
            TrackerCode.UPDATE_INFO: (1, self._update),
            TrackerCode.GET_PENDING_MATCHKEYS: (0, lambda board: [board.word] if board.word else []),
            TrackerCode.SUMMARY: (0, lambda _: [TrackerCode.SUCCESS, self._summary()]),
        }
        least, answer = answers.get(code, (0, None))
        if answer is None or not least <= len(rest) <= least + 1:
            raise ValueError(f"it asked what no tracker knows, {str(code)[:20]}")
        value = answer(peer, *rest)
        if value is not None:
            peer.send(value)

    def _put(self, board: _Peer, key: Any, offer: Any, address: Any = None) -> int:
        if not isinstance(offer, list) or len(offer) != 2:
            raise ValueError("it offered no port and word")
        value = (_host(address, board), _port(offer[0]), _text(offer[1]))
        for queue in self._queues.values():
            # A board waits for one client: what it offered before, it has forgotten.
            queue.offers.pop(board, None)
        queue = self._queues.setdefault(_text(key), _Queue())
        queue.offers[board] = value
        board.word = value[-1]
        queue.match()
        return TrackerCode.SUCCESS

    def _request(self, client: _Peer, key: Any, _user: Any, priority: Any) -> None:
        if type(priority) is not int or client.requests >= _MOST_REQUESTS:
            raise ValueError("it asked for too many boards at once, or with no priority")
        queue = self._queues.setdefault(_text(key), _Queue())
        client.requests += 1
        heapq.heappush(queue.requests, (-priority, next(self._count), client))
        queue.match()

    def _update(self, board: _Peer, info: Any) -> int:
        address = info.get("addr") if isinstance(info, dict) else None
        if not isinstance(address, list) or len(address) != 2:
            raise ValueError("it said no address")
        board.info = {"key": _text(info.get("key")), "addr": [_host(address[0], board), _port(address[1])]}
        return TrackerCode.SUCCESS

    def _summary(self) -> dict[str, Any]:
        infos = [peer.info for peer in self._peers if peer.info and peer.info["key"].startswith("server:")]
        queues = {
            key: {"free": len(queue.offers), "pending": len(queue.requests)} for key, queue in self._queues.items()
        }
        return {"queue_info": queues, "server_info": infos}


async def _converse(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, steps: Steps[Any]) -> Any:
    try:
        wanted = next(steps)
        while True:
            if isinstance(wanted, bytes):
                writer.write(wanted)
                wanted = steps.send(b"")
            else:
                wanted = steps.send(await reader.readexactly(wanted))
    except StopIteration as end:
        return end.value


def _text(value: Any) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= _MOST_CHARACTERS or not value.isprintable():
        raise ValueError("it sent something else than a name")
    return value


def _port(value: Any) -> int:
    if type(value) is not int or not 0 < value < 65536:
        raise ValueError("it sent something else than a port")
    return value


def _host(value: Any, peer: _Peer) -> str:
    return peer.host if value is None else _text(value)


def _name(writer: asyncio.StreamWriter) -> str:
    return str((writer.get_extra_info("peername") or ["a visitor"])[0])
