"""Workers that answer, crash, hang or wear out."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from typing import Any

import pytest

from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.jobs import pool as pools
from nnfuze_tvm.jobs.pool import Failure, Pool

HANG = 60


def worker(channel: Connection, factor: int) -> None:
    """Multiply; or crash, hang, or say something first."""
    while True:
        message = channel.recv()
        if message == "crash":
            os._exit(3)
        if message == "hang":
            time.sleep(HANG)
        if message == "note":
            time.sleep(1.5)
            channel.send("a note")
            message = 1
        channel.send((message * factor, os.getpid()))


@pytest.fixture(scope="module")
def nursery() -> Iterator[Nursery]:
    with Nursery(preload=(__name__,)) as nursery:
        yield nursery


def collect(pool: Pool) -> dict[Any, Any]:
    answers = {}
    while pool.working:
        for tag, notes, answer in pool.answers(wait(pool.channels, timeout=0.05)):
            answers[tag] = (notes, answer) if notes else answer
    return answers


def test_answers_come_back_with_their_tags(nursery: Nursery) -> None:
    pool = Pool(nursery, 2, 10, worker, 7)
    pool.submit("a", 1)
    pool.submit("b", 2)
    assert pool.free == 0
    answers = collect(pool)
    assert {tag: value for tag, (value, _) in answers.items()} == {"a": 7, "b": 14}
    assert pool.free == 2


def test_crashed_and_hanging_workers_are_replaced(nursery: Nursery) -> None:
    pool = Pool(nursery, 2, 0.5, worker, 7)
    # Those that do answer may take long on a busy machine.
    pool.submit("a", "crash", parts=200)
    pool.submit("b", "hang")
    start = time.monotonic()
    answers = collect(pool)
    assert time.monotonic() - start < HANG / 2
    assert answers == {"a": Failure("the worker process crashed"), "b": Failure("no answer within 0.5 s")}
    pool.submit("c", 3, parts=200)
    assert collect(pool)["c"][0] == 21


def test_the_clock_may_start_with_the_note(nursery: Nursery) -> None:
    pool = Pool(nursery, 1, 1.0, worker, 7, from_note=True)
    pool.submit("a", "note")
    assert pool.engaged == 0
    notes, (value, _) = collect(pool)["a"]
    assert (notes, value) == (["a note"], 7)


def test_a_pool_grows_and_shrinks(nursery: Nursery) -> None:
    pool = Pool(nursery, 1, 10, worker, 2)
    pool.submit("a", 1)
    assert pool.free == 0
    pool.size = 3
    assert pool.free == 2
    pool.submit("b", 2)
    pool.size = 0
    assert pool.free == 0
    assert {tag: value for tag, (value, _) in collect(pool).items()} == {"a": 2, "b": 4}
    assert pool.free == 0


def test_workers_wear_out(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pools, "_MAX_USES", 2)
    pool = Pool(nursery, 1, 10, worker, 1)
    pids = []
    for number in range(4):
        pool.submit(number, number)
        pids.append(collect(pool)[number][1])
    assert pids[0] == pids[1] != pids[2] == pids[3]
