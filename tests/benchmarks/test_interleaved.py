from collections.abc import Iterator
from itertools import repeat

import pytest

from benchmarks.interleaved import Timing, interleaved


def test_the_order_rotates_and_each_turn_runs_a_call_twice():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleaved(calls, rounds=4, min_seconds=0.0)
    assert [t.samples for t in timings.values()] == [4, 4, 4]
    assert "".join(order[30:]) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


class Clock:
    """Time that passes only where a call says so, however busy the machine is."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr("benchmarks.interleaved.time", self)

    def perf_counter(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds

    def measured(self, calls: dict[str, float | Iterator[float]], **options: float) -> dict[str, Timing]:
        """Return the times of calls that take some seconds, always the same or one after the other."""
        endless = {name: repeat(each) if isinstance(each, float) else each for name, each in calls.items()}
        timed = {name: lambda each=each: self.sleep(next(each)) for name, each in endless.items()}
        return interleaved(timed, clock=self.perf_counter, **options)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def test_rounds_go_on_until_enough_time_has_passed(clock):
    assert clock.measured({"call": 0.001}, rounds=2, min_seconds=0.0)["call"].samples == 2
    assert clock.measured({"call": 0.001}, rounds=2, min_seconds=0.2)["call"].samples == pytest.approx(100, abs=1)


def test_a_call_that_takes_too_long_sits_out(clock):
    timings = clock.measured({"slow": 0.02, "fast": 0.0}, rounds=30, min_seconds=0.0, max_seconds_each=0.15)
    assert timings["slow"].samples == 5
    assert timings["fast"].samples == 30


def test_the_figures_are_those_of_the_samples(clock):
    # Ten of the warm-up, then pairs of which the second counts.
    pauses = iter([0.0] * 10 + [0.5, 0.01, 0.5, 0.03, 0.5, 0.02])
    timing = clock.measured({"call": pauses}, rounds=3, min_seconds=0.0)["call"]
    assert timing.samples == 3
    assert (timing.least, timing.median) == pytest.approx((0.01, 0.02))
    assert timing.quartiles == pytest.approx((0.015, 0.025))


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: 0"):
        interleaved({"call": lambda: None}, rounds=0)
