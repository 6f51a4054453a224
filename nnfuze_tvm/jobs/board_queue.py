"""Work for the devices of a fleet: handed to whichever is free, and done again where one was lost with it.

A server of ours says when it ended a session because of a crash or a timeout, which is the work's failure; without such
last words the device is at fault, as far as can be told. Work that was running when two devices (or one device twice)
were lost counts as failed, since it would cost one device after the other.
"""

from __future__ import annotations

import logging
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any, Generic, Protocol, TypeVar

from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.jobs.fleet import Fleet
from nnfuze_tvm.jobs.pool import Failure, Pool

Tag = TypeVar("Tag")

# The note that a session is open and the work about to run.
RUNNING = "running"

# So many devices may be lost with one piece of work running before it is to blame.
_MAX_LOST = 2

_log = logging.getLogger(__name__)


class Answer(Protocol):
    """What a worker answers: with an error if there is no result; ``lost`` if the device went away."""

    error: str | None
    lost: bool


@dataclass
class _Work(Generic[Tag]):
    tag: Tag
    message: Callable[[], Any]
    parts: int
    lost: list[str] = field(default_factory=list)
    lost_running: int = 0


@dataclass(frozen=True)
class Outcome(Generic[Tag]):
    """What became of a piece of work.

    Attributes
    ----------
    tag
        What it was put in with.
    answer
        The worker's answer; None if the work was given up.
    error : str, optional
        Why there is no result.
    device : str, optional
        ``host:port`` of the device that answered.
    lost : tuple of str
        The devices that went away with it before.
    """

    tag: Tag
    answer: Any
    error: str | None
    device: str | None
    lost: tuple[str, ...]


class BoardQueue(Generic[Tag]):
    """The work that waits for, and runs on, the devices of a fleet.

    Parameters
    ----------
    workers : Pool
        Each answers a message with an `Answer`, after two notes: the address of the device that it got, and `RUNNING`.
    fleet : Fleet
        Knows the devices; there are as many workers at a time.
    patience : float
        Seconds without any device after which it gives up.
    say : callable
        Is told about devices.
    """

    def __init__(self, workers: Pool, fleet: Fleet, patience: float, say: Callable[[str], None]) -> None:
        self._workers = workers
        self._fleet = fleet
        self._patience = patience
        self._say = say
        self._queue: deque[_Work[Tag]] = deque()
        self._progress = self._waiting_since = time.monotonic()
        self._fruitless = 0

    @property
    def waiting(self) -> int:
        """How many pieces of work no worker has taken yet."""
        return len(self._queue)

    @property
    def working(self) -> int:
        """How many a worker has."""
        return self._workers.working

    @property
    def channels(self) -> list[Connection]:
        """What to wait on for outcomes."""
        return self._workers.channels

    def put(self, tag: Tag, message: Callable[[], Any], parts: int = 1) -> None:
        """Add work; ``message()`` is what a worker gets, made when it is handed out. It may take ``parts`` timeouts."""
        self._queue.append(_Work(tag, message, parts))

    def dispatch(self) -> None:
        """Hand out what waits, as far as there are workers."""
        while self._queue and self._workers.free:
            work = self._queue.popleft()
            self._workers.submit(work, work.message(), work.parts)

    def outcomes(self, ready: Iterable[Any]) -> Iterator[Outcome[Tag]]:
        """Yield what is done; what was lost with a device goes back into the queue.

        Raises
        ------
        DeviceError
            If no device takes anything any more.
        """
        for work, notes, answer in self._workers.answers(ready):
            device = notes[0] if notes else None
            if not isinstance(answer, Failure) and not answer.lost:
                self._progress = time.monotonic()
                self._fruitless = 0
                yield Outcome(work.tag, answer, answer.error, device, tuple(work.lost))
                continue
            reason = answer.reason if isinstance(answer, Failure) else answer.error
            if self._give_up(work, device, RUNNING in notes, reason):
                why = f"{_MAX_LOST} devices were lost while it ran: {', '.join(work.lost)} ({reason})"
                yield Outcome(work.tag, None, why, None, tuple(work.lost))
            else:
                self._say(f"device {device} was lost ({reason}); its run is made up for")
                self._queue.append(work)

    def _give_up(self, work: _Work[Tag], device: str | None, running: bool, reason: str) -> bool:
        """Note that a device was lost; return whether the work is to blame."""
        _log.warning("device %s was lost with a candidate of %s: %s", device, work.tag, reason)
        if device:
            work.lost.append(device)
        if running:
            work.lost_running += 1
        else:
            self._fruitless += 1
            if self._fruitless > 3 * self._workers.size and time.monotonic() - self._progress > self._patience:
                raise DeviceError(f"no device takes a candidate any more; the last one, {device}: {reason}")
        return work.lost_running == _MAX_LOST

    def watch(self) -> None:
        """Follow the devices that come and go.

        Raises
        ------
        DeviceError
            If there has been none for too long.
        """
        if self._fleet.update():
            count = len(self._fleet.devices)
            self._say(f"{count} device{'' if count == 1 else 's'} registered under {self._fleet.key!r}")
            self._workers.size = count
        if self._workers.engaged or not self._workers.working:
            self._waiting_since = time.monotonic()
        elif time.monotonic() - self._waiting_since > self._patience:
            self._waiting_since = time.monotonic()
            self._say(f"waiting for a free device; registered: {', '.join(self._fleet.devices)}")
        if not self._workers.engaged:
            self._fleet.check(self._patience)
