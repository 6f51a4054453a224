"""Which decision vectors of one kernel's space are measured next."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from typing import Any

import numpy as np

Decisions = tuple[int, ...]

# Spaces up to this size are ranked as a whole; of larger ones, this many vectors are drawn for every batch.
_POOL = 4096
# The share of every batch that ignores the cost model.
_EXPLORE = 0.25
# Below this number of successful measurements the model is not asked.
_MIN_ROWS = 4


class Search:
    """The search over one kernel's space: a batch of vectors out, measured times in.

    A vector holds, knob by knob in the order of sampling, the index of the chosen candidate. Index 0 is what
    the schedule rule takes untuned, so the vector of zeros is measured first: tuning doesn't lose to that.

    Parameters
    ----------
    arity : sequence of int
        The number of candidates of each knob, as met by the vector of zeros. Other vectors may meet others.
    seed : int
        Makes the proposals repeatable for the same measurements.
    """

    def __init__(self, arity: Sequence[int], seed: int) -> None:
        self.arity = tuple(arity)
        self.seed = seed
        self.times: dict[Decisions, float | None] = {}
        self.skipped: set[Decisions] = set()

    @property
    def best(self) -> float | None:
        """The shortest time so far in seconds, None before the first success."""
        return min((t for t in self.times.values() if t is not None), default=None)

    @property
    def size(self) -> int:
        """The number of vectors in the space, as far as it is known."""
        return math.prod(self.arity)

    def record(self, decisions: Decisions, seconds: float | None) -> None:
        """Note a measured time, or None for a vector that failed."""
        self.times[decisions] = seconds

    def skip(self, decisions: Decisions) -> None:
        """Never propose this vector again: it yields a candidate that is known already."""
        self.skipped.add(decisions)

    def met(self, arity: Sequence[int]) -> None:
        """Note the candidates that another vector has met: spaces may differ from branch to branch."""
        pairs = itertools.zip_longest(self.arity, arity, fillvalue=1)
        self.arity = tuple(max(pair) for pair in pairs)

    def propose(self, count: int) -> list[Decisions]:
        """Return up to ``count`` vectors that are new; none when the space is used up."""
        rng = random.Random(f"{self.seed}/{len(self.times)}/{len(self.skipped)}")
        pool = self._pool(rng)
        if len(pool) <= count:
            return pool
        chosen: dict[Decisions, None] = {}
        zeros = (0,) * len(self.arity)
        if zeros in pool:
            chosen[zeros] = None
        known = [(d, t) for d, t in self.times.items() if t is not None]
        if len(known) >= _MIN_ROWS:
            explore = sum(rng.random() < _EXPLORE for _ in range(count))
            predicted = self._predict(pool)
            for index in np.argsort(predicted, kind="stable"):
                if len(chosen) >= count - explore:
                    break
                chosen[pool[index]] = None
        rest = [d for d in pool if d not in chosen]
        # Candidates are ordered by the rule's hardware model, so small indices are the better guess.
        weights = [math.prod(1.0 / (1 + index) for index in d) for d in rest]
        while rest and len(chosen) < count:
            index = rng.choices(range(len(rest)), weights)[0]
            chosen[rest.pop(index)] = None
            weights.pop(index)
        return list(chosen)

    def _pool(self, rng: random.Random) -> list[Decisions]:
        if self.size <= _POOL:
            everything = itertools.product(*(range(n) for n in self.arity))
            return [d for d in everything if self._new(d)]
        pool = {(0,) * len(self.arity): None}
        ranked = sorted((t, d) for d, t in self.times.items() if t is not None)
        parents = [d + (0,) * (len(self.arity) - len(d)) for _, d in ranked[:8]]
        for _ in range(_POOL):
            vector = [rng.randrange(n) for n in self.arity]
            if parents and rng.random() < 0.5:
                parent = rng.choice(parents)
                vector = [p if rng.random() < 0.7 else v for p, v in zip(parent, vector, strict=False)]
            pool[tuple(vector)] = None
        return [d for d in pool if self._new(d)]

    def _new(self, decisions: Decisions) -> bool:
        return decisions not in self.times and decisions not in self.skipped

    def _predict(self, pool: Sequence[Decisions]) -> np.ndarray:
        """Predict a cost for every vector (only the order means anything)."""
        import xgboost

        slowest = max(t for t in self.times.values() if t is not None)
        costs = [math.log(t if t is not None else 2 * slowest) for t in self.times.values()]
        params: dict[str, Any] = {
            "max_depth": 4,
            "eta": 0.3,
            "min_child_weight": 0,
            "nthread": 1,
            "seed": self.seed,
            "verbosity": 0,
        }
        model = xgboost.train(
            params, xgboost.DMatrix(self._features(list(self.times)), label=costs), num_boost_round=40
        )
        return np.asarray(model.predict(xgboost.DMatrix(self._features(pool))))

    def _features(self, vectors: Sequence[Decisions]) -> np.ndarray:
        rows = np.full((len(vectors), len(self.arity)), np.nan, np.float32)
        for row, vector in zip(rows, vectors, strict=True):
            row[: len(vector)] = vector
        return rows
