"""How far values are apart, and how far the same computation in another order would bring them apart."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import tvm

from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.jobs.data import Arrays

Answers = Sequence[Sequence[np.ndarray]]
"""Per sample the outputs."""

# Outputs that vary by less than this part of their size are judged by their size: the rest may be all rounding.
_FLAT = 1e-3
# How often rounding is tried, and how much more than the worst of these tries may happen.
_TRIES = 3
_MARGIN = 8
# Sums of this part of the largest number of their type may overflow in another order.
_NEAR = 0.1


def difference(answers: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Return the largest difference of one output over all samples, relative to the range of the references.

    It is infinite where shapes or types differ, or where one is NaN or infinite and the other isn't just so.
    """
    return _relative(answers, references, lambda distances: float(distances.max(initial=0.0)))


def deviation(answers: Sequence[np.ndarray], references: Sequence[np.ndarray]) -> float:
    """Return the root mean square of what `difference` takes the largest of."""
    return _relative(answers, references, lambda distances: float(np.sqrt(np.mean(distances**2))))


def _relative(answers: Sequence[np.ndarray], references: Sequence[np.ndarray], summary: Any) -> float:
    for answer, reference in zip(answers, references, strict=True):
        if answer.shape != reference.shape or answer.dtype != reference.dtype:
            return float("inf")
    wide = np.complex128 if np.iscomplexobj(references[0]) else np.float64
    got, want = (np.concatenate([np.ravel(array) for array in arrays]).astype(wide) for arrays in (answers, references))
    finite = np.isfinite(want)
    if not np.array_equal(got[~finite], want[~finite], equal_nan=True) or not np.isfinite(got[finite]).all():
        return float("inf")
    got, want = got[finite], want[finite]
    if not want.size:
        return 0.0
    with np.errstate(over="ignore"):
        size = float(np.abs(want).max())
        span = float(np.abs(want.max() - want.min()))
        scale = span if span > _FLAT * size else size
        return summary(np.abs(got - want)) / (scale or 1.0)


def largest(answers: Answers, references: Answers) -> list[float]:
    """Return the `difference` of each output."""
    return [difference(got, want) for got, want in zip(_by_output(answers), _by_output(references), strict=True)]


def typical(answers: Answers, references: Answers) -> list[float]:
    """Return the `deviation` of each output."""
    return [deviation(got, want) for got, want in zip(_by_output(answers), _by_output(references), strict=True)]


def _by_output(answers: Answers) -> list[tuple[np.ndarray, ...]]:
    return list(zip(*answers, strict=True))


def tolerated(
    mod: tvm.IRModule,
    samples: Sequence[Arrays],
    unit: float | None = None,
    enough: Sequence[float] = (),
    references: Answers = (),
) -> list[float]:
    """Return per output of ``main`` how far rounding may bring it, relative to its range.

    The graph is computed again with values disturbed as another order of the same sums would. What is discontinuous
    jumps then as it may elsewhere, and what amplifies small differences amplifies these.

    Parameters
    ----------
    mod : tvm.IRModule
        A graph.
    samples : sequence of dict
        Its inputs.
    unit : float, optional
        By how much, relatively, all float values are disturbed. By default by some units in the last place, and only
        what is not computed exactly on every machine.
    enough : sequence of float, optional
        Per output what suffices: when all is explained, nothing more is tried.
    references : list, optional
        What the graph gives, where that is known.

    Returns
    -------
    list of float
        Infinite where values come near the largest that their type has: sums overflow in one order and not in another.
    """
    run = evaluate.hooked_executor(mod)
    references = references or [run(sample, None) for sample in samples]
    worst = [0.0] * len(references[0])
    for seed in range(_TRIES):
        disturb = Rounding(seed, unit)
        found = largest([run(sample, disturb) for sample in samples], references)
        worst = [max(pair) for pair in zip(worst, found, strict=True)]
        if disturb.overflows:
            return [float("inf")] * len(worst)
        if enough and all(_MARGIN * value >= wanted for value, wanted in zip(worst, enough, strict=True)):
            break
    return [_MARGIN * value for value in worst]


class Rounding:
    """Disturbs the values of a graph as rounding does; a hook for the evaluator.

    Parameters
    ----------
    seed : int
        Which disturbance.
    unit : float, optional
        See `tolerated`.
    """

    def __init__(self, seed: int, unit: float | None = None) -> None:
        self.overflows = False
        self._rng = np.random.default_rng(seed)
        self._unit = unit

    def __call__(self, value: Value, result: Any) -> Any:
        """Return the value that a binding has in another order of computing."""
        if isinstance(result, list):
            return [self._disturbed(value, each) for each in result]
        return self._disturbed(value, result)

    def _disturbed(self, value: Value, result: np.ndarray) -> np.ndarray:
        if not isinstance(result, np.ndarray | np.generic) or result.dtype.kind != "f" or not result.size:
            return result
        operator, name = ops.of(value), op_name(value)
        effect, exact = ("", False) if operator is None else (operator.effect, operator.exact)
        if not name or effect in ("moves", "joins") or (self._unit is None and exact):
            return result
        limits = np.finfo(result.dtype)
        unit = max(4 * float(limits.eps), self._unit or 0.0)
        sizes = np.abs(result)
        sums = effect in ("layer", "averages") or name in ("call_tir", "sum")
        if sums:
            # A sum rounds as its terms do, also where they cancel out.
            finite = sizes[np.isfinite(sizes)].astype(np.float64)
            sizes = sizes + (np.sqrt(np.mean(finite**2)) if finite.size else 0.0)
            self.overflows |= bool(np.isinf(sizes).any() or finite.max(initial=0.0) > _NEAR * limits.max)
        elif operator is not None and operator.of_one:
            # However small it is on the samples: a wake word is silent mostly.
            sizes = np.maximum(sizes, 1)
        elif not exact:
            # What is this small is zero for some.
            tiny = (sizes < limits.tiny) & (sizes > 0)
            result = np.where(tiny, limits.tiny * self._rng.integers(0, 2, result.shape), result).astype(result.dtype)
        with np.errstate(all="ignore"):
            moved = result + unit * sizes * self._rng.uniform(-1, 1, result.shape)
        return np.where(np.isfinite(result), moved, result).astype(result.dtype)
