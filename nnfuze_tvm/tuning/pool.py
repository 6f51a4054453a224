"""A few worker processes that answer messages, watched by one thread."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from nnfuze_tvm.devices.processes import Child, Nursery

# Compiling leaks some memory with every module; a fresh worker costs only a fork.
_MAX_USES = 200


@dataclass(frozen=True)
class Failure:
    """In place of an answer: why the worker gave none."""

    reason: str


@dataclass
class _Busy:
    child: Child
    tag: Any
    since: float
    deadline: float | None
    note: str | None = None


class Pool:
    """Workers that run ``function(channel, *args)``, which answers one message after another.

    A worker may send one string before its answer, a note. A worker that dies or takes too long is replaced.

    Parameters
    ----------
    nursery : Nursery
        Where the workers come from.
    size : int
        The number of workers; they are started when first needed.
    timeout : float
        Seconds for one answer.
    from_note : bool
        Count them from the note on, and not at all before.
    """

    def __init__(
        self,
        nursery: Nursery,
        size: int,
        timeout: float,
        function: Callable[..., None],
        *args: Any,
        from_note: bool = False,
    ) -> None:
        self._nursery = nursery
        self._size = size
        self._timeout = timeout
        self._function = function
        self._args = args
        self._from_note = from_note
        self._idle: list[Child] = []
        self._uses: Counter[int] = Counter()
        self._busy: dict[Connection, _Busy] = {}

    @property
    def free(self) -> int:
        """How many messages can be submitted now."""
        return self._size - len(self._busy)

    @property
    def working(self) -> int:
        """How many answers are to come."""
        return len(self._busy)

    @property
    def channels(self) -> list[Connection]:
        """What to wait on for answers."""
        return list(self._busy)

    def submit(self, tag: Any, message: Any) -> None:
        """Give a free worker a message; its answer comes back with ``tag``."""
        child = self._idle.pop() if self._idle else self._nursery.start(self._function, *self._args)
        now = time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
            child.channel.send(message)
        self._busy[child.channel] = _Busy(child, tag, now, None if self._from_note else now + self._timeout)

    def answers(self, ready: Iterable[Any]) -> Iterator[tuple[Any, str | None, Any]]:
        """Yield tag, note and answer (or ``Failure``) of every worker that has finished."""
        now = time.monotonic()
        for channel in ready:
            busy = self._busy.get(channel)
            if busy is None:
                continue
            try:
                answer = channel.recv()
            except (EOFError, OSError):
                yield self._drop(busy, "the worker process crashed")
                continue
            if isinstance(answer, str):
                busy.note = answer
                busy.deadline = now + self._timeout
                continue
            del self._busy[channel]
            self._uses[busy.child.pid] += 1
            if self._uses[busy.child.pid] < _MAX_USES:
                self._idle.append(busy.child)
            else:
                self._end(busy.child)
            yield busy.tag, busy.note, answer
        for busy in [b for b in self._busy.values() if b.deadline is not None and now > b.deadline]:
            yield self._drop(busy, f"no answer within {self._timeout:g} s")

    def waiting(self) -> float:
        """Return for how many seconds the longest waiting worker has had no note."""
        now = time.monotonic()
        return max((now - b.since for b in self._busy.values() if b.note is None), default=0.0)

    def _end(self, child: Child) -> None:
        del self._uses[child.pid]
        child.kill()

    def _drop(self, busy: _Busy, reason: str) -> tuple[Any, str | None, Failure]:
        del self._busy[busy.child.channel]
        self._end(busy.child)
        return busy.tag, busy.note, Failure(reason)
