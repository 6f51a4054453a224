"""The loop of a tuning job: propose, compile, measure, note; batch by batch, kernel by kernel."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path

from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.jobs.board_queue import BoardQueue, Outcome
from nnfuze_tvm.jobs.fleet import Fleet
from nnfuze_tvm.jobs.pool import Failure, Pool
from nnfuze_tvm.jobs.tuning.directory import Final, Trial, TuningDirectory
from nnfuze_tvm.jobs.tuning.kernels import TunableKernel
from nnfuze_tvm.jobs.tuning.progress import Progress
from nnfuze_tvm.jobs.tuning.search import Decisions, Search
from nnfuze_tvm.jobs.tuning.workers import Candidate, now

# After this many failures without a single success something other than the candidates is wrong.
_HOPELESS_FAILURES = 16
# How many candidates a kernel's final compares, the untuned one included.
_FINALISTS = 4
# Where compiling and measuring take turns, compile at least so many candidates in one turn: at the end of a turn some
# CPUs wait for the others.
_TURN = 16

_log = logging.getLogger(__name__)


@dataclass
class _State:
    """What the loop knows of one kernel."""

    kernel: TunableKernel
    search: Search
    done: int = 0
    in_flight: int = 0
    codes: set[str] = field(default_factory=set)
    pending: set[Decisions] = field(default_factory=set)
    # Candidates whose libraries are still there: those that the final may need.
    kept: dict[Decisions, Candidate] = field(default_factory=dict)
    # None until the trials are done; then the decisions that are compared, untuned first.
    finalists: list[Decisions] | None = None

    def ranked(self) -> list[Decisions]:
        """Return the decisions that ran: the untuned ones, then the fastest ones."""
        times = self.search.times
        ran = sorted((d for d, t in times.items() if t is not None), key=lambda d: (any(d), times[d]))
        return ran[:_FINALISTS]


@dataclass
class _Job:
    """One candidate on its way to a device, or a kernel's finalists."""

    state: _State
    candidates: list[Candidate]
    started: float
    final: bool = False

    def __str__(self) -> str:
        return self.state.kernel.name


def _cost(state: _State) -> float:
    """Return the seconds that a kernel takes of every inference (one second where nothing is known)."""
    return state.kernel.weight * (state.search.best or 1.0)


class Loop:
    """Give every kernel up to ``limit`` trials, then compare the best of them.

    Parameters
    ----------
    directory : TuningDirectory
        Holds the trials of earlier runs and gets the new ones.
    compilers : Pool
        Workers that run ``compile_loop``.
    boards : BoardQueue
        Its workers run ``measure_loop``.
    fleet : Fleet
        Knows the devices.
    scratch : Path
        Where libraries go.
    limit : int
        Trials per kernel.
    seed : int
        For the search.
    display : Progress
        What the user sees.
    """

    def __init__(
        self,
        directory: TuningDirectory,
        compilers: Pool,
        boards: BoardQueue[_Job],
        fleet: Fleet,
        *,
        scratch: Path,
        limit: int,
        seed: int,
        display: Progress,
    ) -> None:
        self._directory = directory
        self._compilers = compilers
        self._boards = boards
        self._fleet = fleet
        self._scratch = scratch
        self._limit = limit
        self._seed = seed
        self._display = display
        self._measuring = False
        self._states: list[_State] = []
        self._to_compile: deque[tuple[_State, Decisions]] = deque()

    def run(self, kernels: Sequence[TunableKernel]) -> None:
        """Tune the kernels.

        Raises
        ------
        DeviceError
            If devices vanish and don't come back, if nothing at all runs on them, or if this machine can't compile.
        """
        self._states = self._probe(kernels)
        self._display.start(
            [s.kernel for s in self._states],
            [max(s.done, min(self._limit, s.search.size)) for s in self._states],
            [s.done for s in self._states],
        )
        while True:
            self._refill()
            self._dispatch()
            channels = [*self._compilers.channels, *self._boards.channels]
            if not channels and not self._boards.waiting:
                break
            ready = wait(channels, timeout=0.5)
            for (state, wanted, started), _, answer in self._compilers.answers(ready):
                self._compiled(state, wanted, started, answer)
            for outcome in self._boards.outcomes(ready):
                self._finish(outcome)
            self._boards.watch()
        self._check_success(at_least=1)

    def _probe(self, kernels: Sequence[TunableKernel]) -> list[_State]:
        """Learn the knobs of every kernel, drop those without any, and load what earlier runs measured."""
        todo = deque(kernels)
        states: dict[str, _State] = {}
        errors: list[str] = []
        while True:
            while todo and self._compilers.free:
                kernel = todo.popleft()
                self._compilers.submit(kernel, (kernel.id, (), frozenset(), None))
            if not self._compilers.working:
                break
            for kernel, _, answer in self._compilers.answers(wait(self._compilers.channels, timeout=0.5)):
                error = answer.reason if isinstance(answer, Failure) else answer.error
                if error:
                    errors.append(error)
                    _log.warning("kernel %s is left out: its schedule rule failed: %s", kernel.name, error)
                elif max(answer.arity, default=1) > 1:
                    states[kernel.id] = _State(kernel, Search(answer.arity, self._seed))
        if errors and len(errors) == len(kernels):
            raise DeviceError(f"no schedule rule worked on any of {len(kernels)} kernels; the first: {errors[0]}")
        for trial in self._directory.trials:
            if state := states.get(trial.kernel):
                state.search.record(trial.decisions, trial.time)
                state.codes.add(trial.code)
                state.done += 1
        return [states[kernel.id] for kernel in kernels if kernel.id in states]

    @property
    def _batch(self) -> int:
        return max(4, min(16, self._limit // 4), 2 * len(self._fleet.devices))

    @property
    def _alone(self) -> bool:
        """Whether the devices are this machine: then compiling disturbs them."""
        return self._fleet.local

    def _refill(self) -> None:
        """Queue the next batch, of the kernel that is furthest behind and then of the costliest one.

        There are two kernels at a time, so that one is measured while the next batch of the other is compiled, and
        more where these are too few for the devices, or for a turn where compiling and measuring take turns.
        """
        while True:
            busy = [s.in_flight for s in self._states if s.in_flight]
            if self._alone:
                if sum(busy) >= _TURN:
                    return
            elif len(busy) >= 2 and sum(busy) >= 2 * len(self._fleet.devices):
                return
            open_ = [s for s in self._states if not s.in_flight and s.finalists is None]
            if not open_:
                return
            state = min(open_, key=lambda s: (s.done < self._limit, s.done // self._batch, -_cost(s)))
            left = self._limit - state.done
            batch = state.search.propose(min(self._batch, left)) if left > 0 else []
            if batch:
                state.in_flight = len(batch)
                self._to_compile.extend((state, wanted) for wanted in batch)
            else:
                self._display.total(state.kernel, state.done)
                self._begin_final(state)

    def _dispatch(self) -> None:
        """Hand out work; on this machine alone, what is queued is all compiled and then all measured."""
        if self._measuring and not (self._boards.waiting or self._boards.working):
            self._measuring = False
        elif not (self._measuring or self._to_compile or self._compilers.working):
            self._measuring = True
        if not (self._alone and (self._measuring or self._boards.working)):
            while self._to_compile and self._compilers.free:
                state, wanted = self._to_compile.popleft()
                known = frozenset() if state.finalists else frozenset(state.search.times) | state.pending
                message = (state.kernel.id, wanted, known, str(self._scratch))
                self._compilers.submit((state, wanted, now()), message)
        if not self._alone or (self._measuring and not self._compilers.working):
            self._boards.dispatch()

    def _measure(self, job: _Job) -> None:
        """Queue a job for the devices; the best time so far is that of the moment when it is handed out."""
        libraries = [(c.library, c.args) for c in job.candidates]
        self._boards.put(job, lambda: (libraries, None if job.final else job.state.search.best), len(libraries))

    def _compiled(self, state: _State, wanted: Decisions, started: float, answer: Candidate | Failure) -> None:
        if isinstance(answer, Failure):
            answer = Candidate(state.kernel.id, wanted, decisions=wanted, error=f"compiling: {answer.reason}")
        if answer.broken:
            raise DeviceError(f"compiling on this machine failed: {answer.error}")
        if state.finalists is not None:
            state.kept[wanted] = answer
            self._enter_final(state)
            return
        state.search.skip(wanted)
        state.search.met(answer.arity)
        fresh = answer.decisions not in state.search.times and answer.decisions not in state.pending
        job = _Job(state, [answer], started)
        if fresh and answer.error:
            self._note(Outcome(job, None, answer.error, None, ()))
        elif fresh and answer.code not in state.codes:
            state.codes.add(answer.code)
            state.pending.add(answer.decisions)
            self._measure(job)
        else:
            state.search.skip(answer.decisions)
            self._forget(job)

    def _finish(self, outcome: Outcome[_Job]) -> None:
        """Take what a device said."""
        job = outcome.tag
        if not job.final:
            self._note(outcome)
            return
        if outcome.answer is None or outcome.answer.seconds is None:
            # The trials decide, then.
            _log.warning("the best candidates of %s could not be compared: %s", job, outcome.error)
        else:
            decisions = tuple(candidate.decisions for candidate in job.candidates)
            times = tuple(outcome.answer.seconds)
            self._directory.decide(Final(job.state.kernel.id, decisions, times, job.state.done, outcome.device or ""))
        self._end_final(job.state)

    def _note(self, outcome: Outcome[_Job]) -> None:
        """Write a finished trial into the journal, then tell the search and the user."""
        state, (candidate,) = outcome.tag.state, outcome.tag.candidates
        measured = outcome.answer.seconds if outcome.answer else None
        trial = Trial(
            kernel=state.kernel.id,
            decisions=candidate.decisions,
            seconds=measured[0] if measured else None,
            error=outcome.error,
            device=outcome.device,
            rule=candidate.rule,
            code=candidate.code,
            started=outcome.tag.started,
            finished=now(),
            trace=candidate.trace,
            lost=outcome.lost,
        )
        self._directory.append(trial)
        state.search.record(trial.decisions, trial.time)
        state.pending.discard(trial.decisions)
        state.done += 1
        self._display.trial(state.kernel, state.search.best)
        self._forget(outcome.tag)
        self._check_success(at_least=_HOPELESS_FAILURES)

    def _forget(self, job: _Job) -> None:
        state, (candidate,) = job.state, job.candidates
        state.in_flight -= 1
        ranked = state.ranked()
        if candidate.decisions in ranked and candidate.decisions not in state.kept:
            state.kept[candidate.decisions] = candidate
        else:
            _delete(candidate)
        for decisions in [d for d in state.kept if d not in ranked]:
            _delete(state.kept.pop(decisions))
        if not state.in_flight:
            self._directory.write_records()

    def _begin_final(self, state: _State) -> None:
        """Compare the untuned candidate and the fastest others, compiling those that earlier runs measured."""
        state.finalists = state.ranked()
        if len(state.finalists) < 2 or self._directory.final(state.kernel.id):
            self._end_final(state)
            return
        self._to_compile.extend((state, wanted) for wanted in state.finalists if wanted not in state.kept)
        self._enter_final(state)

    def _enter_final(self, state: _State) -> None:
        if all(decisions in state.kept for decisions in state.finalists or ()):
            candidates = [state.kept[decisions] for decisions in state.finalists or ()]
            usable = [candidate for candidate in candidates if candidate.library]
            if len(usable) > 1:
                self._measure(_Job(state, usable, now(), final=True))
            else:
                self._end_final(state)

    def _end_final(self, state: _State) -> None:
        for candidate in state.kept.values():
            _delete(candidate)
        state.kept.clear()
        self._directory.write_records()

    def _check_success(self, at_least: int) -> None:
        """Give up when nothing ever ran; such a journal says nothing about the candidates."""
        trials = self._directory.trials
        if len(trials) >= at_least and all(trial.seconds is None for trial in trials):
            aside = self._directory.discard_journal()
            raise DeviceError(
                f"none of {len(trials)} candidates ran; the first one: {trials[0].error} (all of them are in {aside})"
            )


def _delete(candidate: Candidate) -> None:
    if candidate.library:
        with contextlib.suppress(OSError):
            os.unlink(candidate.library)
