"""Work on a fleet's devices, for a job that knows no kernels: what is lost with a device is done again."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait

import pytest

from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.jobs.board_queue import RUNNING, BoardQueue, Outcome
from nnfuze_tvm.jobs.fleet import Fleet
from nnfuze_tvm.jobs.pool import Pool
from tests.servers import embedded


@dataclass
class Score:
    """What a worker answers."""

    value: float | None = None
    error: str | None = None
    lost: bool = False


def score(channel: Connection) -> None:
    """Score numbers; the device of a number goes away as often as it says, before or while it runs."""
    losses: dict[float, int] = {}
    while True:
        number, times, running = channel.recv()
        channel.send(f"board:{losses.get(number, 0)}")
        if losses.get(number, 0) < times:
            losses[number] = losses.get(number, 0) + 1
            if running:
                channel.send(RUNNING)
            channel.send(Score(error="unplugged", lost=True))
        else:
            channel.send(RUNNING)
            channel.send(Score(number * 2) if number >= 0 else Score(error="negative"))


@pytest.fixture(scope="module")
def queue() -> Iterator[tuple[BoardQueue[str], list[str]]]:
    said: list[str] = []
    with embedded(key="any") as tracker, Nursery(preload=(__name__,)) as nursery:
        fleet = Fleet(tracker.place, "any", 10.0)
        yield BoardQueue(Pool(nursery, 1, 20.0, score, from_note=True), fleet, 10.0, said.append), said


def outcomes(queue: BoardQueue[str], work: dict[str, tuple[float, int, bool]]) -> dict[str, Outcome[str]]:
    for tag, message in work.items():
        queue.put(tag, lambda message=message: message)  # type: ignore[misc]
    found = {}
    while queue.waiting or queue.working:
        queue.dispatch()
        found.update({one.tag: one for one in queue.outcomes(wait(queue.channels, timeout=0.5))})
        queue.watch()
    return found


def test_what_is_lost_is_done_again(queue: tuple[BoardQueue[str], list[str]]) -> None:
    work = {
        "plain": (1.0, 0, False),
        "bad": (-1.0, 0, False),
        "lost once while it ran": (2.0, 1, True),
        "lost before it ran": (3.0, 3, False),
        "deadly": (4.0, 9, True),
    }
    found = outcomes(queue[0], work)
    assert found["plain"] == Outcome("plain", Score(2.0), None, "board:0", ())
    assert (found["bad"].answer, found["bad"].error) == (Score(error="negative"), "negative")
    assert found["lost once while it ran"].answer == Score(4.0)
    assert found["lost once while it ran"].lost == ("board:0",)
    assert found["lost before it ran"].answer == Score(6.0) and len(found["lost before it ran"].lost) == 3
    assert found["deadly"].answer is None and found["deadly"].device is None
    assert found["deadly"].error == "2 devices were lost while it ran: board:0, board:1 (unplugged)"
    assert "device board:0 was lost (unplugged); its run is made up for" in queue[1]


def test_a_message_is_made_when_it_is_handed_out(queue: tuple[BoardQueue[str], list[str]]) -> None:
    best = [7.0]
    queue[0].put("late", lambda: (best[0], 0, False))
    best[0] = 8.0
    assert outcomes(queue[0], {})["late"].answer == Score(16.0)
