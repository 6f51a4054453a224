"""Orders and places of made-up work: valid, never worse than what was given, and best where that can be counted."""

from __future__ import annotations

from itertools import permutations

from hypothesis import given, settings
from hypothesis import strategies as st

from nnfuze_tvm.deploy.memory.offsets import ALIGNMENT, Span, aligned, most_live, place
from nnfuze_tvm.deploy.memory.order import best_order
from nnfuze_tvm.deploy.memory.work import Step, Work


@st.composite
def works(draw: st.DrawFn, most: int = 6) -> Work:
    """Draw steps that take some of what steps before them made, or what was there."""
    count = draw(st.integers(1, most))
    sizes = [draw(st.integers(0, 9)) for _ in range(count + 1)]
    steps = []
    for n in range(count):
        takes = tuple(sorted(draw(st.sets(st.integers(0, n), min_size=1, max_size=3))))
        over = tuple((n + 1, old) for old in takes if old and draw(st.booleans()))
        for _, old in over:
            sizes[n + 1] = sizes[old]
        steps.append(
            Step(takes, (n + 1,), draw(st.integers(0, 3)), tuple(p for p in over if sizes[p[1]] == sizes[n + 1]))
        )
    kept = frozenset(draw(st.sets(st.integers(1, count), max_size=2)) | {count})
    return Work(sizes, steps, kept)


def valid(work: Work, order: tuple[int, ...]) -> bool:
    done = 0
    for n in order:
        if work.needs[n] & ~done:
            return False
        done |= 1 << n
    return sorted(order) == list(range(len(work.steps)))


def by_hand(work: Work, order: tuple[int, ...]) -> int:
    """Return the peak of an order, from lifetimes alone."""
    when = {n: time for time, n in enumerate(order)}
    born = {buffer: when[n] for n, step in enumerate(work.steps) for buffer in step.makes}
    last = {}
    for buffer in work.made:
        uses = [when[n] for n, step in enumerate(work.steps) if buffer in (*step.takes, *step.makes)]
        last[buffer] = len(order) if buffer in work.kept else max(uses)
    peak = 0
    for n in order:
        step, time = work.steps[n], when[n]
        live = [b for b in work.made if born[b] <= time <= last[b]]
        spared = {new for new, old in step.over if new not in work.kept and old in last and last[old] == time}
        peak = max(peak, sum(work.sizes[b] for b in live if b not in spared) + step.scratch)
    return peak


@given(works())
@settings(max_examples=60, deadline=None)
def test_the_exact_order_is_the_best_of_all(work: Work) -> None:
    found = best_order(work)
    orders = [order for order in permutations(range(len(work.steps))) if valid(work, order)]
    assert found.exact and valid(work, found.steps)
    assert found.peak == by_hand(work, found.steps) == min(by_hand(work, order) for order in orders)
    assert work.least() <= found.peak


@given(works(most=14))
@settings(max_examples=60, deadline=None)
def test_without_a_search_no_order_is_worse_than_the_given_one(work: Work) -> None:
    found = best_order(work, trials=30, beam=2)
    assert valid(work, found.steps)
    assert found.peak == work.peak(found.steps) <= work.peak(range(len(work.steps)))
    assert best_order(work).peak <= found.peak


SPANS = st.builds(
    lambda size, first, length: Span(size, first, first + length), *(st.integers(0, n) for n in (999, 9, 4))
)


@given(st.lists(SPANS, max_size=12))
@settings(max_examples=60, deadline=None)
def test_what_lives_at_the_same_time_does_not_overlap(spans: list[Span]) -> None:
    places = place(spans)
    assert places.total >= most_live(spans)
    for n, (one, start) in enumerate(zip(spans, places.offsets, strict=True)):
        assert start % ALIGNMENT == 0 and start + one.size <= places.total
        for other, its in list(zip(spans, places.offsets, strict=True))[:n]:
            if one.first <= other.last and other.first <= one.last and one.size and other.size:
                assert start + one.size <= its or its + other.size <= start


def test_a_chain_takes_what_its_largest_step_takes() -> None:
    spans = [Span(100, 0, 1), Span(300, 1, 2), Span(200, 2, 3), Span(100, 3, 4)]
    assert place(spans).total == aligned(300) + aligned(200)
