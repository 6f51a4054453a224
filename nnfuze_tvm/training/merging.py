"""Make networks that were trained apart share a trunk: one is put on another's beginning, and both learn from there.

The search is GMorph's (Yang et al., EuroSys 2024) on single cuts: from deep to shallow until what is lost is within a
budget, with the originals' own answers as the only teachers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import permutations
from math import ceil
from typing import Any

import tvm
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.cuts import cuts, graft
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from nnfuze_tvm.passes.simplify.fold_batch_norm import FoldBatchNorm
from nnfuze_tvm.training.course import Course, Schedule
from nnfuze_tvm.training.distill import held_back
from nnfuze_tvm.training.judge import Evaluation, Judge, Score
from nnfuze_tvm.training.lessons import Asked, Change, Samples, mixed, number
from nnfuze_tvm.training.network import Network, quickest
from nnfuze_tvm.training.stitches import Candidate, candidates, stitch
from nnfuze_tvm.training.trials import Point, Trial, hopeless

# How often a trial is judged.
_JUDGED = 10
# What the name of an output begins with that is a feature on the way.
_GUIDE = "#"


class Watch:
    """Is told what a search does, and keeps what it needs to go on after it was ended; this one does neither."""

    def found(self) -> Mapping[str, Any] | None:
        """Return what `keep` was last given, None if there is nothing."""
        return None

    def keep(self, search: Search, *, now: bool) -> None:
        """Keep ``search.state()`` if it is time to, or ``now``."""

    def began(self, candidate: Candidate) -> None:
        """Hear that a candidate is tried."""

    def stepped(self, step: int, steps: int, loss: float, lost: Mapping[str, float]) -> None:
        """Hear that a step was made, its loss, and the points lost when they were last counted."""

    def tried(self, trial: Trial) -> None:
        """Hear how a trial ended."""


@dataclass(frozen=True)
class Shared:
    """What a search found.

    Attributes
    ----------
    module : tvm.IRModule
        The tasks' functions; trunks that they share are bit-equal.
    tried : list of Trial
        What was tried.
    originals : mapping of str to Score
        What the originals get.
    """

    module: tvm.IRModule
    tried: Sequence[Trial]
    originals: Mapping[str, Score]


def share(
    mod: tvm.IRModule,
    samples: Samples,
    budget: float,
    schedule: Schedule,
    watch: Watch | None = None,
    evaluation: Evaluation | None = None,
    changes: Sequence[Change] = (mixed,),
) -> Shared:
    """Let tasks share trunks as deep as the budget allows.

    Parameters
    ----------
    mod : tvm.IRModule
        One function per task, over the same inputs.
    samples : mapping
        What to learn from, without labels: by input name ``[N, *shape]``.
    budget : float
        How many points a task may lose: of accuracy where the evaluation has labels of it, else of agreement with its
        original on samples that are held back.
    schedule : Schedule
        Of each trial.
    watch : Watch, optional
        Hears how it goes, and keeps what is needed to go on.
    evaluation : Evaluation, optional
        What accuracy is taken on.
    changes : sequence of callable
        What is done to samples whenever they are shown.
    """
    search = Search(mod, samples, budget, schedule, watch or Watch(), evaluation or Evaluation(), changes)
    search.run()
    return Shared(search.module(), search.tried, search.judge.originals)


@dataclass
class _Round:
    """Where a search is: whose beginnings are their own, how many candidates were tried, and how far the next one is.

    ``total`` is the sum of the losses since the last point of the curve.
    """

    alone: list[str]
    place: int = 0
    course: Course | dict[str, Any] | None = None
    before: dict[str, Score] = field(default_factory=dict)
    curve: list[Point] = field(default_factory=list)
    total: float = 0.0


class Search:
    """A search under way; see `share`.

    Attributes
    ----------
    tried : list of Trial
        What was tried so far.
    judge : Judge
        Says how well tasks are answered.
    """

    def __init__(
        self,
        mod: tvm.IRModule,
        samples: Samples,
        budget: float,
        schedule: Schedule,
        watch: Watch,
        evaluation: Evaluation,
        changes: Sequence[Change],
    ) -> None:
        self._mod = tvm.transform.Sequential([FoldBatchNorm()])(mod)
        self._originals = _functions(self._mod)
        self._functions = dict(self._originals)
        self._budget, self._schedule, self._watch, self._changes = budget, schedule, watch, changes
        learnt, held = held_back(number(samples), seed=schedule.seed)
        self._learnt = {name: values[learnt] for name, values in samples.items()}
        networks = {task: Network(func) for task, func in self._originals.items()}
        self.judge = Judge(networks, {name: values[held] for name, values in samples.items()}, evaluation)
        self.tried: list[Trial] = []
        self._round = _Round(list(self._functions))
        # By donor and task: those on the donor's trunk as a trial left them that failed deeper.
        self._warm: dict[tuple[str, str], dict[str, relax.Function]] = {}
        if (found := watch.found()) is not None:
            try:
                self._restore(found)
            except Exception:  # whatever is not as `state` made it
                raise InputError("what was kept of the search is no state of it; delete it to begin anew") from None

    def module(self) -> tvm.IRModule:
        """Return the tasks' functions as they are now."""
        return dataflow.with_functions(self._mod, self._functions)

    def run(self) -> None:
        """Search until nothing more can be shared, from where it was ended."""
        while len(self._round.alone) > 1:
            found = self._candidates()
            kept = False
            while not kept and self._round.place < len(found):
                kept = self.attempt(found[self._round.place]).kept
            if not kept:
                break

    def state(self) -> dict[str, Any]:
        """Return what `Watch.found` is to return to go on from here: tensors and plain values."""
        now = self._round
        course = now.course.state() if isinstance(now.course, Course) else now.course
        return {
            "functions": _text(self._functions),
            "warm": {json.dumps(pair): _text(functions) for pair, functions in self._warm.items()},
            "tried": [asdict(trial) for trial in self.tried],
            "round": {**asdict(replace(now, course=None)), "course": course},
        }

    def _restore(self, state: Mapping[str, Any]) -> None:
        found = _parsed(state["functions"])
        self._functions = {task: found[task] for task in self._originals}
        for pair, text in state["warm"].items():
            donor, task = json.loads(pair)
            self._warm[donor, task] = _parsed(text)
        self.tried = [Trial.parse(fields) for fields in state["tried"]]
        now = dict(state["round"])
        now["curve"] = [Point(**point) for point in now["curve"]]
        now["before"] = {task: Score(**score) for task, score in now["before"].items()}
        self._round = _Round(**now)
        if not {*self._round.alone} <= {*self._originals}:
            raise ValueError("other tasks")

    def _followers(self, donor: str) -> list[str]:
        """Return who is on a task's trunk."""
        return [trial.candidate.task for trial in self.tried if trial.kept and trial.candidate.donor == donor]

    def _candidates(self) -> list[Candidate]:
        """Return what can be tried, what saves most first; a trunk that others are on stays where it is.

        Of what saves as much the largest donors come first: they stay, and others may go where the smaller ones went.
        """
        found = [
            candidate
            for donor, task in permutations(self._round.alone, 2)
            if not self._followers(task)
            for candidate in candidates(donor, self._functions[donor], task, self._functions[task], self._learnt)
        ]
        whole = {
            task: sum(ops.macs(b.value) for b in dataflow.bindings(func)) for task, func in self._functions.items()
        }
        return sorted(found, key=lambda one: (-one.cut.macs, -whole[one.donor], -one.donor_cut.macs, -one.fit))

    def attempt(self, candidate: Candidate) -> Trial:
        """Put one network on another's beginning, let them learn, and keep the result if it is within the budget."""
        self._watch.began(candidate)
        students, same = self._students(candidate)
        guides = {task: self._guides(task, candidate) for task in students}
        merged = _merged(self._mod, {task: _guided(func, guides[task]) for task, func in students.items()})
        owners = ir.task_outputs(merged)
        teachers = [
            (Network(_guided(self._originals[task], guides[task])), len(dataflow.output_fields(func)))
            for task, func in students.items()
        ]
        dtype = quickest()
        lessons = Asked(self._learnt, teachers, self._changes, dtype)
        course = Course(Network(merged["main"]), lessons, self._schedule, dtype)
        answered = [None if _is_guide(owner) else owner.task for owner in owners]
        if same:
            scores = self.judge(course.student, answered)
            trial = Trial(candidate, scores, scores, True, 0, [])
        else:
            trial = self._learn(candidate, course, answered)
        self._end(trial, course.student.trained(), owners, students)
        return trial

    def _students(self, candidate: Candidate) -> tuple[dict[str, relax.Function], bool]:
        """Return the functions that learn together, in the module's order: all that are on the trunk then.

        Also whether there is nothing to learn, because the trunks compute the same already.
        """
        donor, task = candidate.donor, candidate.task
        group = [donor, *self._followers(donor)]
        functions = {**self._functions, **self._warm.get((donor, task), {})}
        own = self._functions[task]
        fitted = stitch(candidate, functions[donor], own, self._learnt)
        functions[task] = graft(functions[donor], candidate.donor_cut, own, candidate.cut, fitted, task)
        return {name: functions[name] for name in self._functions if name in (*group, task)}, fitted is None

    def _guides(self, task: str, candidate: Candidate) -> int:
        """Return how many of a task's last features are held against those of its original."""
        kept = [trial.candidate for trial in self.tried if trial.kept and trial.candidate.task == task]
        own = cuts(self._originals[task])
        if task == candidate.donor:
            return sum(cut.macs > candidate.donor_cut.macs for cut in own)
        (on,) = [candidate] if task == candidate.task else kept
        return sum(cut.macs >= on.cut.macs for cut in own)

    def _learn(self, candidate: Candidate, course: Course, owners: Sequence[str | None]) -> Trial:
        """Go through a course, from where it was put aside; one without hope is broken off."""
        now = self._round
        if now.course is None:
            now.before = self.judge(course.student, owners)
        else:
            assert isinstance(now.course, dict)
            course.restore(now.course)
        now.course = course
        every = ceil(course.steps / _JUDGED)
        while course.step < course.steps and not hopeless(now.curve, course.steps, self._budget):
            loss = course.advance()
            now.total += loss
            if course.step % every == 0 or course.step == course.steps:
                lost = self.judge.lost(self.judge(course.student, owners))
                steps = course.step - (now.curve[-1].step if now.curve else 0)
                now.curve.append(Point(course.step, now.total / steps, lost))
                now.total = 0.0
            self._watch.stepped(course.step, course.steps, loss, now.curve[-1].lost if now.curve else {})
            self._watch.keep(self, now=False)
        after = self.judge(course.student, owners)
        kept = course.step == course.steps and max(self.judge.lost(after).values()) <= self._budget
        return Trial(candidate, now.before, after, kept, course.steps, now.curve)

    def _end(
        self,
        trial: Trial,
        trained: relax.Function,
        owners: Sequence[ir.TaskOutput],
        students: Mapping[str, relax.Function],
    ) -> None:
        """Keep what was learnt: it is the result, or what the next trial of the two begins with."""
        donor, task = trial.candidate.donor, trial.candidate.task
        learnt = {name: _of_task(trained, owners, name, func) for name, func in students.items()}
        self.tried.append(trial)
        if trial.kept:
            self._functions |= learnt
            self._warm = {pair: each for pair, each in self._warm.items() if not {*pair} & {*students}}
            self._round = _Round([name for name in self._round.alone if name != task])
        else:
            self._warm[donor, task] = {name: func for name, func in learnt.items() if name != task}
            self._round = _Round(self._round.alone, self._round.place + 1)
        self._watch.keep(self, now=True)
        self._watch.tried(trial)


def _functions(mod: tvm.IRModule) -> dict[str, relax.Function]:
    return {gvar.name_hint: func for gvar, func in mod.functions_items() if isinstance(func, relax.Function)}


def _text(functions: Mapping[str, relax.Function]) -> str:
    return str(tvm.ir.save_json(tvm.IRModule(dict(functions))))


def _parsed(text: str) -> dict[str, relax.Function]:
    return _functions(tvm.ir.load_json(text))


def _merged(mod: tvm.IRModule, functions: Mapping[str, relax.Function]) -> tvm.IRModule:
    """Return some of a module's tasks, with features behind their outputs, merged."""
    owners = []
    for task, func in functions.items():
        names = [output.name for output in ir.task_outputs(mod) if output.task == task]
        more = len(dataflow.output_fields(func)) - len(names)
        owners += [ir.TaskOutput(task, name) for name in [*names, *(f"{_GUIDE}{n}" for n in range(more))]]
    chosen = tvm.IRModule(dict(functions)).with_attrs(mod.attrs or {})
    return tvm.transform.Sequential([MergeTasks(), ShareTrunk()])(ir.with_task_outputs(chosen, owners))


def _is_guide(owner: ir.TaskOutput) -> bool:
    return owner.name.startswith(_GUIDE)


def _guided(func: relax.Function, count: int) -> relax.Function:
    """Return a function whose outputs are followed by the features at its last cuts."""
    places = [cut.place for cut in cuts(func)][-count:] if count else []
    bindings = dataflow.bindings(func)
    return dataflow.returning(func, [*dataflow.output_fields(func), *(bindings[place].var for place in places)])


def _of_task(main: relax.Function, owners: Sequence[ir.TaskOutput], task: str, like: relax.Function) -> relax.Function:
    """Return what a merged function computes of one task, with the task's own parameters."""
    emitter = dataflow.Emitter()
    for param in like.params:
        emitter.unique(param.name)
    own = {param.name: param for param in like.params}
    if any(param.name not in own for param in main.params):
        raise InputError(f"task {task}: networks that share a trunk must have the same inputs")
    values: dict[dataflow.Value, dataflow.Value] = {param: own[param.name] for param in main.params}
    emitter.copy(dataflow.bindings(main), values)
    fields = [
        field
        for field, owner in zip(dataflow.output_fields(main), owners, strict=True)
        if owner.task == task and not _is_guide(owner)
    ]
    return emitter.finish(like.params, [dataflow.substitute(field, values) for field in fields], like.attrs)
