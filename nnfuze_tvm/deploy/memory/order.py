"""The order of steps that needs the least memory at once.

What is in use after some steps does not depend on their order, so that sets of steps are the states of a search for the
way with the lowest peak: exact while the states are few. A step that can run and leaves no more in use than before, and
meanwhile no more than was in use already, is taken at once: no order is worse for it. Where there are too many states,
the best ones go on side by side.

The search over sets of what is done is that of Ahn et al., "Ordering Chaos: Memory-Aware Scheduling of Irregularly
Wired Neural Networks for Edge Devices" (2020).
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator
from typing import NamedTuple

from nnfuze_tvm.deploy.memory.work import Work

# Steps that a search tries before it gives up, and the states that go on side by side where the exact one has.
_TRIALS, _BEAM = 60_000, 24


class Order(NamedTuple):
    """An order of steps.

    Attributes
    ----------
    steps : tuple of int
        The steps' numbers.
    peak : int
        The most bytes in use at once.
    exact : bool
        Whether no other order needs less.
    """

    steps: tuple[int, ...]
    peak: int
    exact: bool


class _State(NamedTuple):
    peak: int
    live: int
    done: int  # steps, as bits
    ready: int  # those that can run now, as bits
    path: tuple | None  # the last step, and the path before it

    def order(self) -> tuple[int, ...]:
        steps, path = [], self.path
        while path is not None:
            step, path = path
            steps.append(step)
        return tuple(reversed(steps))


class _Budget:
    """How many steps a search may still try."""

    def __init__(self, left: int) -> None:
        self.left = left


def best_order(work: Work, trials: int = _TRIALS, beam: int = _BEAM) -> Order:
    """Return an order of the least peak; the given one where none is better.

    Parameters
    ----------
    work : Work
        The steps.
    trials : int
        How many steps the exact search may try, and the other one again.
    beam : int
        How many states go on side by side after it gave up; the peak is then at most the given order's.
    """
    given = tuple(range(len(work.steps)))
    peak = work.peak(given)
    if peak <= work.least():
        return Order(given, peak, True)
    found, exact = _search(work, peak, _Budget(trials))
    if not exact:
        found = _beam(work, peak, beam, _Budget(trials))
    return Order(given, peak, exact) if found is None else Order(found.order(), found.peak, exact)


def _search(work: Work, limit: int, budget: _Budget) -> tuple[_State | None, bool]:
    """Return the best way below ``limit`` if there is one, and whether that is certain."""
    everything = (1 << len(work.steps)) - 1
    start = _forced(work, _start(work), budget)
    heap = [(start.peak, 0, start)]
    best = {start.done: start.peak}
    while heap and budget.left > 0:
        peak, _, state = heapq.heappop(heap)
        if state.done == everything:
            return (state if peak < limit else None), True
        if best[state.done] < peak:
            continue
        for following in _following(work, state, budget):
            if following.peak < limit and following.peak < best.get(following.done, limit):
                best[following.done] = following.peak
                heapq.heappush(heap, (following.peak, len(best), following))
    return None, budget.left > 0


def _beam(work: Work, limit: int, width: int, budget: _Budget) -> _State | None:
    """Return the best way found below ``limit``, if any."""
    everything = (1 << len(work.steps)) - 1
    states, best = [_forced(work, _start(work), budget)], None
    while states and budget.left > 0:
        reached: dict[int, _State] = {}
        for state in states:
            if state.done == everything and state.peak < limit:
                limit, best = state.peak, state
            for following in _following(work, state, budget):
                known = reached.get(following.done)
                if following.peak < limit and (known is None or following.peak < known.peak):
                    reached[following.done] = following
        states = sorted(reached.values(), key=lambda state: (state.peak, state.live, state.done))[:width]
    return best


def _start(work: Work) -> _State:
    return _State(0, 0, 0, sum(1 << n for n, needs in enumerate(work.needs) if not needs), None)


def _following(work: Work, state: _State, budget: _Budget) -> list[_State]:
    """Return the states after one more step and what follows for nothing."""
    return [_forced(work, _after(work, state, n), budget) for n in _numbers(state.ready)]


def _forced(work: Work, state: _State, budget: _Budget) -> _State:
    """Return the state after all steps that cost nothing, as far as the budget goes."""
    while budget.left > 0:
        for n in _numbers(state.ready):
            budget.left -= 1
            grows, stays = work.effect(n, state.done | 1 << n)
            if stays <= 0 and state.live + grows <= state.peak:
                state = _after(work, state, n)
                break
        else:
            break
    return state


def _numbers(bits: int) -> Iterator[int]:
    while bits:
        lowest = bits & -bits
        yield lowest.bit_length() - 1
        bits ^= lowest


def _after(work: Work, state: _State, n: int) -> _State:
    done = state.done | 1 << n
    grows, stays = work.effect(n, done)
    ready = state.ready & ~(1 << n) | sum(1 << m for m in _numbers(work.followers[n]) if not work.needs[m] & ~done)
    return _State(max(state.peak, state.live + grows), state.live + stays, done, ready, (n, state.path))
