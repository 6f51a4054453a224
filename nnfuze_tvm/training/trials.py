"""What a search for shared trunks tries, as records."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import log
from typing import Any

from nnfuze_tvm.graph.cuts import Cut
from nnfuze_tvm.training.judge import Score
from nnfuze_tvm.training.stitches import Candidate

# So many points a learning curve has before it tells anything.
_PATIENCE = 3
# What the lower learning rates of the rest do beside what the curve so far lets expect.
_STILL = 0.2


@dataclass(frozen=True)
class Point:
    """Of a learning curve: after how many steps, the mean loss since the point before, and the points lost by task."""

    step: int
    loss: float
    lost: Mapping[str, float]


@dataclass(frozen=True)
class Trial:
    """A candidate after training.

    Attributes
    ----------
    candidate : Candidate
        What was tried.
    before, after : mapping of str to Score
        By task, how well it answers with the stitch alone, and after training.
    kept : bool
        It is within the budget.
    steps : int
        How many there were to be; the curve ends before where a trial was given up.
    curve : list of Point
        How it learnt.
    """

    candidate: Candidate
    before: Mapping[str, Score]
    after: Mapping[str, Score]
    kept: bool
    steps: int
    curve: Sequence[Point]

    @classmethod
    def parse(cls, fields: Mapping[str, Any]) -> Trial:
        """Return the trial that ``dataclasses.asdict`` made these fields of, perhaps by way of JSON."""
        given = dict(fields["candidate"])
        for name in ("cut", "donor_cut"):
            given[name] = Cut(**{**given[name], "shape": tuple(given[name]["shape"])})
        scores = {name: {task: Score(**each) for task, each in fields[name].items()} for name in ("before", "after")}
        curve = [Point(**point) for point in fields["curve"]]
        return cls(Candidate(**given), **scores, kept=fields["kept"], steps=fields["steps"], curve=curve)


def hopeless(curve: Sequence[Point], steps: int, budget: float) -> bool:
    """Tell whether a trial won't be within a budget: points fall with a power of the steps, and more at the end."""
    if len(curve) < _PATIENCE:
        return False
    last, earlier = curve[-1], curve[(len(curve) - 1) // 2]
    worst, before = (max(0.0, *point.lost.values()) for point in (last, earlier))
    if worst <= budget:
        return False
    power = min(0.0, log(worst / max(before, worst / 1e3)) / log(last.step / earlier.step))
    return _STILL * worst * (steps / last.step) ** power > budget
