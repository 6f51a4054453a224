"""Make networks that were trained apart share a trunk: one is put on another's beginning, and both learn from there.

The search is GMorph's (Yang et al., EuroSys 2024) on single cuts: from deep to shallow until what is lost is within a
budget, with the originals' own answers as the only teachers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import permutations

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.cuts import Cut, Stitch, beginning, cuts, fits, graft, resized
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from nnfuze_tvm.training.distill import Samples, Schedule, agreement, answers, distill, held_back
from nnfuze_tvm.training.network import Network

# Stitches are fitted to this many places of features, of this many samples.
_ROWS, _FITTED = 20_000, 256
# Ridge: part of the mean square of a feature.
_RIDGE = 1e-3


@dataclass(frozen=True)
class Candidate:
    """One network's rest behind another's beginning.

    Attributes
    ----------
    donor, task : str
        Whose beginning and whose rest.
    donor_cut, cut : Cut
        Where both are cut.
    stitch : Stitch
        What leads from one to the other, fitted by least squares.
    fit : float
        How much of the variance of the features that are replaced the stitch explains (R²).
    """

    donor: str
    donor_cut: Cut
    task: str
    cut: Cut
    stitch: Stitch
    fit: float


@dataclass(frozen=True)
class Trial:
    """A candidate after training.

    Attributes
    ----------
    candidate : Candidate
        What was tried.
    before, after : mapping of str to float
        By task, how far its answers agree with the original's on samples that are held back, in percent.
    kept : bool
        It is within the budget.
    """

    candidate: Candidate
    before: Mapping[str, float]
    after: Mapping[str, float]
    kept: bool


def share(
    mod: tvm.IRModule,
    samples: Samples,
    budget: float,
    schedule: Schedule,
    told: Callable[[Trial], None] | None = None,
) -> tuple[tvm.IRModule, list[Trial]]:
    """Return the tasks' functions with trunks that are bit-equal, as deep as the budget allows, and what was tried.

    Parameters
    ----------
    mod : tvm.IRModule
        One function per task, over the same inputs.
    samples : mapping
        What to learn from, without labels: by input name ``[N, *shape]``.
    budget : float
        How many points of agreement with its original a task may lose, see `agreement`.
    schedule : Schedule
        Of each trial.
    told : callable, optional
        Is handed each trial when it is done.
    """
    functions = {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, relax.Function)}
    search = _Search(mod, functions, samples, budget, schedule)
    alone = list(functions)
    while len(alone) > 1:
        merged = next((trial for trial in search.trials(alone) if _report(trial, told).kept), None)
        if merged is None:
            break
        alone.remove(merged.candidate.task)
    return search.module(), search.tried


def _report(trial: Trial, told: Callable[[Trial], None] | None) -> Trial:
    if told is not None:
        told(trial)
    return trial


class _Search:
    def __init__(
        self,
        mod: tvm.IRModule,
        functions: dict[str, relax.Function],
        samples: Samples,
        budget: float,
        schedule: Schedule,
    ) -> None:
        self.tried: list[Trial] = []
        self._mod, self._functions, self._budget, self._schedule = mod, functions, budget, schedule
        learnt, held = held_back(len(next(iter(samples.values()))), seed=schedule.seed)
        self._learnt = {name: values[learnt] for name, values in samples.items()}
        self._held = {name: values[held] for name, values in samples.items()}
        originals = {task: Network(func) for task, func in functions.items()}
        self._wanted = {task: answers(network, self._learnt) for task, network in originals.items()}
        self._right = {task: answers(network, self._held) for task, network in originals.items()}

    def module(self) -> tvm.IRModule:
        return dataflow.with_functions(self._mod, self._functions)

    def trials(self, tasks: list[str]) -> Iterator[Trial]:
        """Try what saves most first."""
        found = [candidate for pair in permutations(tasks, 2) for candidate in self._candidates(*pair)]
        for candidate in sorted(found, key=lambda one: (-one.cut.macs, -one.fit)):
            yield self._try(candidate)

    def _candidates(self, donor: str, task: str) -> list[Candidate]:
        """Return for each cut of a task the cut of a donor whose features explain its own best."""
        given = {name: values[:_FITTED] for name, values in self._learnt.items()}
        result = []
        donors = [(cut, beginning(self._functions[donor], cut)) for cut in cuts(self._functions[donor])]
        for cut in cuts(self._functions[task]):
            wanted = answers(Network(beginning(self._functions[task], cut)), given)[0]
            found = [
                Candidate(donor, own, task, cut, *_fitted(answers(Network(resized(func, cut)), given)[0], wanted, cut))
                for own, func in donors
                if fits(own, cut)
            ]
            if found:
                result.append(max(found, key=lambda one: one.fit))
        return result

    def _try(self, candidate: Candidate) -> Trial:
        functions = dict(self._functions)
        functions[candidate.task] = graft(
            functions[candidate.donor],
            candidate.donor_cut,
            functions[candidate.task],
            candidate.cut,
            candidate.stitch,
            candidate.task,
        )
        merged = tvm.transform.Sequential([MergeTasks(), ShareTrunk()])(dataflow.with_functions(self._mod, functions))
        student = Network(merged["main"])
        owners = [output.task for output in ir.task_outputs(merged)]
        before = self._agreements(student, owners)
        distill(student, self._learnt, _flat(self._wanted, owners), self._schedule)
        after = self._agreements(student, owners)
        kept = min(after.values()) >= 100 - self._budget
        trial = Trial(candidate, before, after, kept)
        self.tried.append(trial)
        if kept:
            trained = student.trained()
            self._functions |= {task: _of_task(trained, owners, task, functions[task]) for task in functions}
        return trial

    def _agreements(self, student: Network, owners: list[str]) -> dict[str, float]:
        found = answers(student, self._held)
        right = _flat(self._right, owners)
        return {
            task: min(agreement(*pair) for owner, *pair in zip(owners, found, right, strict=True) if owner == task)
            for task in dict.fromkeys(owners)
        }


def _flat(by_task: Mapping[str, list[np.ndarray]], owners: list[str]) -> list[np.ndarray]:
    """Return outputs in the order of the merged function's."""
    left = {task: iter(outputs) for task, outputs in by_task.items()}
    return [next(left[owner]) for owner in owners]


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


def _of_task(main: relax.Function, owners: list[str], task: str, like: relax.Function) -> relax.Function:
    """Return what a merged function computes of one task, with the task's own parameters."""
    emitter = dataflow.Emitter()
    for param in like.params:
        emitter.unique(param.name)
    own = {param.name: param for param in like.params}
    if any(param.name not in own for param in main.params):
        raise InputError(f"task {task}: networks that share a trunk must have the same inputs")
    values: dict[dataflow.Value, dataflow.Value] = {param: own[param.name] for param in main.params}
    emitter.copy(dataflow.bindings(main), values)
    fields = [f for f, owner in zip(dataflow.output_fields(main), owners, strict=True) if owner == task]
    return emitter.finish(like.params, [dataflow.substitute(field, values) for field in fields], like.attrs)
