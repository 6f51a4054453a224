"""Stitches by least squares, and which cuts of two networks fit each other."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from tvm import relax

from nnfuze_tvm.graph.cuts import Cut, Stitch, beginning, cuts, fits, resized
from nnfuze_tvm.training.distill import answers
from nnfuze_tvm.training.lessons import Samples
from nnfuze_tvm.training.network import Network

# Stitches are fitted to this many places of features, of this many samples.
_ROWS, _FITTED = 20_000, 256
# Ridge: part of the mean square of a feature.
_RIDGE = 1e-3
# Features that leave at most so many times as much unexplained are as good once they have learnt.
_NEARLY = 1.25
# So many cuts of a network are looked at, those that differ most in what is in front of them.
_MOST_CUTS = 12


@dataclass(frozen=True)
class Candidate:
    """One network's rest behind another's beginning.

    Attributes
    ----------
    donor, task : str
        Whose beginning and whose rest.
    donor_cut, cut : Cut
        Where both are cut.
    fit : float
        How much of the variance of the features that are replaced a stitch explains before anything is learnt (R²).
    """

    donor: str
    donor_cut: Cut
    task: str
    cut: Cut
    fit: float


def candidates(
    donor: str, donor_func: relax.Function, task: str, func: relax.Function, samples: Samples
) -> list[Candidate]:
    """Return for each cut of a task the donor's cut to go on behind.

    That is the deepest one whose features explain the task's own nearly as well as any, and are no smaller: the donor
    computes all of them in any case, and what learns for both is the more, the deeper the cut.
    """
    found = every(donor, donor_func, task, func, samples)
    result = []
    for cut in dict.fromkeys(one.cut for one in found):
        own = [one for one in found if one.cut == cut]
        best = max(own, key=lambda one: one.fit)
        near = [one for one in own if 1 - one.fit <= _NEARLY * (1 - best.fit) and _covers(one.donor_cut, cut)]
        result.append(max(near, key=lambda one: one.donor_cut.macs, default=best))
    return result


def every(donor: str, donor_func: relax.Function, task: str, func: relax.Function, samples: Samples) -> list[Candidate]:
    """Return for each cut of a task all cuts of a donor that a stitch can lead from."""
    given = {name: values[:_FITTED] for name, values in samples.items()}
    donors = [(cut, beginning(donor_func, cut)) for cut in _spread(cuts(donor_func))]
    # What a donor computes is the same for all cuts of one size.
    known: dict[tuple[int, tuple[int, ...]], np.ndarray] = {}

    def begun(own: Cut, first: relax.Function, cut: Cut) -> np.ndarray:
        key = own.place, cut.shape[2:]
        if key not in known:
            known[key] = answers(Network(resized(first, cut)), given)[0]
        return known[key]

    result = []
    for cut in _spread(cuts(func)):
        wanted = answers(Network(beginning(func, cut)), given)[0]
        result += [
            Candidate(donor, own, task, cut, _fitted(begun(own, first, cut), wanted, cut)[1])
            for own, first in donors
            if fits(own, cut)
        ]
    return result


def _covers(donor: Cut, cut: Cut) -> bool:
    return all(given >= size for given, size in zip(donor.shape[2:], cut.shape[2:], strict=True))


def stitch(candidate: Candidate, donor: relax.Function, func: relax.Function, samples: Samples) -> Stitch | None:
    """Return the stitch of a candidate for what its networks compute now, None if that is the same."""
    given = {name: values[:_FITTED] for name, values in samples.items()}
    begun = Network(resized(beginning(donor, candidate.donor_cut), candidate.cut))
    found, wanted = answers(begun, given)[0], answers(Network(beginning(func, candidate.cut)), given)[0]
    return None if np.array_equal(found, wanted) else _fitted(found, wanted, candidate.cut)[0]


def _spread(found: list[Cut]) -> list[Cut]:
    """Leave out the cuts in front of which there is least more than in front of their neighbours."""
    left = list(found)
    while len(left) > _MOST_CUTS:
        gaps = [after.macs - before.macs for before, after in pairwise(left)]
        del left[gaps.index(min(gaps))]
    return left


def _fitted(given: np.ndarray, wanted: np.ndarray, cut: Cut) -> tuple[Stitch, float]:
    """Return the stitch by ridge regression over channels, and how much it explains."""
    rows, targets = (np.moveaxis(values[:, 0], 1, -1).reshape(-1, values.shape[2]) for values in (given, wanted))
    if len(rows) > _ROWS:
        taken = np.random.default_rng(0).choice(len(rows), _ROWS, replace=False)
        rows, targets = rows[taken], targets[taken]
    x, y = rows.astype("float64"), targets.astype("float64")
    middle, aim = x.mean(0), y.mean(0)
    square = (x - middle).T @ (x - middle)
    square += np.eye(len(square)) * _RIDGE * max(np.trace(square) / len(square), 1e-12)
    weight = np.linalg.solve(square, (x - middle).T @ (y - aim)).T
    bias = aim - weight @ middle
    guess = x @ weight.T + bias
    guess = np.maximum(guess, 0) if cut.nonnegative else guess
    left = float(np.square(guess - y).sum() / max(np.square(y - aim).sum(), 1e-30))
    return Stitch(weight.astype("float32"), bias.astype("float32")), 1 - left
