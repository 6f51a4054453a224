"""The search proposes every vector once, the untuned one first, and finds the good corner of a space."""

from __future__ import annotations

import pytest

from nnfuze_tvm.jobs.tuning.search import Search


def cost(decisions: tuple[int, ...]) -> float:
    """Return a time with its minimum at (5, 2, 1)."""
    a, b, c = decisions
    return 1e-3 * (1 + (a - 5) ** 2 + 2 * abs(b - 2) + (c != 1))


def test_a_small_space_is_used_up_without_repetition() -> None:
    search = Search((3, 2), seed=0)
    seen: list[tuple[int, ...]] = []
    while batch := search.propose(4):
        for decisions in batch:
            search.record(decisions, 1.0 if sum(decisions) else None)
        seen += batch
    assert len(seen) == len(set(seen)) == 6


def test_the_untuned_vector_comes_first() -> None:
    assert Search((9, 9, 9, 9), seed=3).propose(8)[0] == (0, 0, 0, 0)
    assert Search((99, 99, 99, 99), seed=3).propose(8)[0] == (0, 0, 0, 0)


def test_the_model_finds_the_minimum() -> None:
    found = []
    for seed in range(3):
        search = Search((12, 8, 4), seed)
        for _ in range(8):
            for decisions in search.propose(8):
                search.record(decisions, cost(decisions))
        found.append(search.best)
    assert sorted(found)[1] <= 1.5e-3  # 64 of 384; the median of three searches


def test_large_spaces_are_sampled() -> None:
    search = Search((50,) * 6, seed=1)
    for _ in range(3):
        batch = search.propose(16)
        assert len(set(batch)) == 16
        for decisions in batch:
            search.record(decisions, 1e-3 * (1 + sum(decisions)))


@pytest.mark.parametrize("seed", [0, 1])
def test_the_same_measurements_give_the_same_proposals(seed: int) -> None:
    searches = [Search((12, 8, 4), seed) for _ in range(2)]
    for _ in range(3):
        first, second = (search.propose(6) for search in searches)
        assert first == second
        for search in searches:
            for decisions in first:
                search.record(decisions, cost(decisions))


def test_branches_with_other_knobs_widen_the_space() -> None:
    search = Search((2,), seed=0)
    search.met((2, 3))
    assert search.size == 6
    assert {len(d) for d in search.propose(10)} == {2}
