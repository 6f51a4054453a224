import time

import pytest

from benchmarks.interleaved import interleaved


def test_the_order_rotates_and_each_turn_runs_a_call_twice():
    order: list[str] = []
    calls = {name: lambda name=name: order.append(name) for name in "abc"}
    timings = interleaved(calls, rounds=4, min_seconds=0.0)
    assert [t.samples for t in timings.values()] == [4, 4, 4]
    assert "".join(order[30:]) == "aabbcc" + "bbccaa" + "ccaabb" + "aabbcc"


def test_rounds_go_on_until_enough_time_has_passed():
    few, many = (
        interleaved({"call": lambda: time.sleep(1e-3)}, rounds=2, min_seconds=seconds)["call"].samples
        for seconds in (0.0, 0.2)
    )
    assert few == 2
    assert 2 < many <= 101


def test_a_call_that_takes_too_long_sits_out():
    calls = {"slow": lambda: time.sleep(0.02), "fast": lambda: None}
    timings = interleaved(calls, rounds=30, min_seconds=0.0, max_seconds_each=0.15)
    assert timings["slow"].samples == 5
    assert timings["fast"].samples == 30


def test_the_figures_are_those_of_the_samples():
    pauses = iter([0.0] * 10 + [0.0, 0.01, 0.0, 0.03, 0.0, 0.02])
    timing = interleaved({"call": lambda: time.sleep(next(pauses))}, rounds=3, min_seconds=0.0)["call"]
    assert timing.samples == 3
    assert 0.01 <= timing.least <= timing.quartiles[0] <= timing.median <= timing.quartiles[1]
    assert timing.median >= 0.02
    assert timing.quartiles[1] >= 0.025


def test_no_rounds_are_refused():
    with pytest.raises(ValueError, match="rounds: 0"):
        interleaved({"call": lambda: None}, rounds=0)
