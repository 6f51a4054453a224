"""A few worker processes that answer messages, watched by one thread."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
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
    timeout: float
    deadline: float | None
    notes: list[str] = field(default_factory=list)


class Pool:
    """Workers that run ``function(channel, *args)``, which answers one message after another.

    A worker may send strings before its answer, notes. A worker that dies or takes too long is replaced.

    Parameters
    ----------
    nursery : Nursery
        Where the workers come from.
    size : int
        How many messages may be answered at a time; workers are started when first needed.
    timeout : float
        Seconds for one answer.
    from_note : bool
        Count them from the first note on, and not at all before.

    Attributes
    ----------
    size : int
        May be changed; more messages than that are finished, then no more are taken.
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
        self.size = size
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
        return max(0, self.size - len(self._busy))

    @property
    def working(self) -> int:
        """How many answers are to come."""
        return len(self._busy)

    @property
    def channels(self) -> list[Connection]:
        """What to wait on for answers."""
        return list(self._busy)

    def submit(self, tag: Any, message: Any, parts: int = 1) -> None:
        """Give a free worker a message, which may take ``parts`` timeouts; its answer comes back with ``tag``."""
        child = self._idle.pop() if self._idle else self._nursery.start(self._function, *self._args)
        now = time.monotonic()
        with contextlib.suppress(OSError):  # a dead worker shows when its answer is read
            child.channel.send(message)
        timeout = parts * self._timeout
        self._busy[child.channel] = _Busy(child, tag, timeout, None if self._from_note else now + timeout)

    def answers(self, ready: Iterable[Any]) -> Iterator[tuple[Any, list[str], Any]]:
        """Yield tag, notes and answer (or ``Failure``) of every worker that has finished."""
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
                if not busy.notes and self._from_note:
                    busy.deadline = now + busy.timeout
                busy.notes.append(answer)
                continue
            del self._busy[channel]
            self._uses[busy.child.pid] += 1
            if self._uses[busy.child.pid] < _MAX_USES:
                self._idle.append(busy.child)
            else:
                self._end(busy.child)
            yield busy.tag, busy.notes, answer
        for busy in [b for b in self._busy.values() if b.deadline is not None and now > b.deadline]:
            yield self._drop(busy, f"no answer within {busy.timeout:g} s")

    @property
    def engaged(self) -> int:
        """How many workers have sent a note and no answer yet."""
        return sum(bool(b.notes) for b in self._busy.values())

    def _end(self, child: Child) -> None:
        del self._uses[child.pid]
        child.kill()

    def _drop(self, busy: _Busy, reason: str) -> tuple[Any, list[str], Failure]:
        del self._busy[busy.child.channel]
        self._end(busy.child)
        return busy.tag, busy.notes, Failure(reason)
