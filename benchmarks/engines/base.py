"""What all engines are made of: a workload ready to run, and what is said where there is none."""

from __future__ import annotations

import io
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any

import numpy as np

from benchmarks.interleaved import interleaved
from benchmarks.workloads import Feeds

# Settings whose latencies differ by less than this factor are equally good to a peer.
_ABOUT_EQUAL = 1.02

INSTALL = "pip install 'nnfuze-tvm[peers]'"


class Unavailable(Exception):
    """Why an engine can't run a workload, in one line."""


@dataclass
class Engine:
    """A workload, ready to run.

    Attributes
    ----------
    bind : callable
        Returns a function without arguments that runs all networks on the given inputs: what is timed. It takes
        its inputs as numpy arrays, the caller's, and has its outputs as such.
    arrays : callable
        Returns what such a call returned as a list of arrays, network by network.
    details : dict
        What is worth keeping about how it was made.
    """

    bind: Callable[[Feeds], Callable[[], Any]]
    arrays: Callable[[Any], list[np.ndarray]]
    details: dict[str, Any] = field(default_factory=dict)

    def answers(self, samples: Sequence[Feeds]) -> list[np.ndarray]:
        """Return every output for all samples, ``[N, ...]``."""
        rows = [[np.array(a) for a in self.arrays(self.bind(feeds)())] for feeds in samples]
        return [np.stack(values) for values in zip(*rows, strict=True)]


def fastest(variants: Mapping[str, Engine], samples: Sequence[Feeds], exact: Sequence[np.ndarray]) -> Engine:
    """Return the fastest variant; of those that are about equally fast, the most exact one."""
    calls = {name: engine.bind(samples[0]) for name, engine in variants.items()}
    times = {name: t.median for name, t in interleaved(calls, rounds=10, min_seconds=0.5).items()}
    fast = [name for name, seconds in times.items() if seconds < _ABOUT_EQUAL * min(times.values())]
    errors = {name: relative_error(variants[name].answers(samples), exact) for name in fast}
    chosen = min(fast, key=errors.__getitem__)
    variants[chosen].details = {"chosen": chosen, "seconds": times}
    return variants[chosen]


def relative_error(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the largest difference between outputs ``[N, ...]``, relative to the range of the exact output.

    Where that is one and the same value, the difference itself counts. What is not finite must be so in both.
    """
    worst = 0.0
    for answer, wanted in zip(answers, exact, strict=True):
        if answer.size != wanted.size:
            return math.inf
        found, right = answer.reshape(wanted.shape).astype(np.float64), wanted.astype(np.float64)
        finite = np.isfinite(right)
        if not np.array_equal(found[~finite], right[~finite], equal_nan=True) or not np.isfinite(found[finite]).all():
            return math.inf
        if finite.any():
            difference = np.abs(found[finite] - right[finite]).max()
            worst = max(worst, float(difference) / (float(np.ptp(right[finite])) or 1.0))
    return worst


def correlation(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the smallest correlation of an output ``[N, ...]`` with the exact one, over what is finite there.

    An output of one and the same value has none; it counts as 1 if it is exact, else as 0.
    """
    least = 1.0
    for answer, wanted in zip(answers, exact, strict=True):
        found, right = (np.ravel(values).astype(np.float64) for values in (answer, wanted))
        finite = np.isfinite(right)
        found, right = found[finite], right[finite]
        if np.array_equal(found, right):
            continue
        if not np.isfinite(found).all() or not found.std() or not right.std():
            return 0.0
        least = min(least, float(np.corrcoef(found, right)[0, 1]))
    return least


@contextmanager
def quiet() -> Iterator[None]:
    """Keep quantizers from printing what they do."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def require(package: str, how: str = INSTALL) -> None:
    """Say how to install a package that is missing."""
    if find_spec(package) is None:
        raise Unavailable(f"not installed: {how}")
