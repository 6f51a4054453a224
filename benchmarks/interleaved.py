"""Several calls timed in turns in one process, so that a drifting machine is fair to all."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Timing:
    """Wall times of one call in seconds: median, least, quartiles, and the number of samples behind them."""

    median: float
    least: float
    quartiles: tuple[float, float]
    samples: int


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    *,
    rounds: int = 30,
    min_seconds: float = 2.0,
    max_seconds_each: float = 20.0,
    pause: float = 0.0,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """Return the times of several calls, measured round by round in rotating order after a warm-up.

    In its turn a call runs twice and the second run counts: the first finds the caches full of another's data.

    Parameters
    ----------
    calls : mapping of str to callable
        What to measure, by name.
    rounds : int
        The least number of samples of each; short calls get up to 1000.
    min_seconds : float
        Rounds go on for at least this long.
    max_seconds_each : float
        A call that has taken this long in all sits out further rounds once it has five samples (or ``rounds``).
    pause : float
        Seconds to wait before each turn, for the spinning threads of the previous one to go to sleep.
    clock : callable
        What samples are measured with; ``time.process_time`` says the same on one thread, and on a busy machine, too.

    Raises
    ------
    ValueError
        If ``rounds`` is not positive.
    """
    if rounds < 1:
        raise ValueError(f"rounds: {rounds} given; use 1 or more")
    spent = {name: _warm_up(call) for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    names = list(calls)
    collecting = gc.isenabled()
    gc.disable()
    try:
        started = time.perf_counter()
        for turn in range(1000):
            if turn >= rounds and time.perf_counter() - started > min_seconds:
                break
            first = turn % max(1, len(names))
            for name in names[first:] + names[:first]:
                if spent[name] > max_seconds_each and len(times[name]) >= min(5, rounds):
                    continue
                if pause:
                    time.sleep(pause)
                seconds = _twice(calls[name], clock)
                times[name].append(seconds)
                spent[name] += 2 * seconds
    finally:
        if collecting:
            gc.enable()
    return {name: _timing(values) for name, values in times.items()}


def _warm_up(call: Callable[[], object]) -> float:
    """Run a call up to ten times, or for 0.3 s; return the seconds that took."""
    started = time.perf_counter()
    for _ in range(10):
        call()
        if time.perf_counter() - started > 0.3:
            break
    return time.perf_counter() - started


def _twice(call: Callable[[], object], clock: Callable[[], float]) -> float:
    call()
    started = clock()
    call()
    return clock() - started


def _timing(values: list[float]) -> Timing:
    low, median, high = (float(v) for v in np.percentile(values, [25, 50, 75]))
    return Timing(median, min(values), (low, high), len(values))
