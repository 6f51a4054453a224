"""The loop of a tuning job: propose, compile, measure, note; batch by batch, kernel by kernel."""

from __future__ import annotations

import contextlib
import logging
import os
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import wait

from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.tuning.journal import Trial, WorkDir
from nnfuze_tvm.tuning.kernels import Kernel
from nnfuze_tvm.tuning.pool import Failure, Pool
from nnfuze_tvm.tuning.progress import Progress
from nnfuze_tvm.tuning.search import Decisions, Search
from nnfuze_tvm.tuning.workers import Candidate, Measured, now

# How often the tracker or the devices may drop one candidate before the job gives up.
_MAX_LOST = 3
# After this many failures without a single success something other than the candidates is wrong.
_HOPELESS_FAILURES = 16

_log = logging.getLogger("nnfuze_tvm.tuning")


@dataclass
class _State:
    """What the loop knows of one kernel."""

    kernel: Kernel
    search: Search
    done: int = 0
    in_flight: int = 0
    exhausted: bool = False
    codes: set[str] = field(default_factory=set)
    pending: set[Decisions] = field(default_factory=set)


@dataclass
class _Job:
    """One candidate on its way to a device."""

    state: _State
    candidate: Candidate
    started: float
    lost: int = 0


def _cost(state: _State) -> float:
    """Return the seconds that a kernel takes of every inference (one second where nothing is known)."""
    return state.kernel.weight * (state.search.best or 1.0)


class Loop:
    """Give every kernel up to ``limit`` trials.

    Parameters
    ----------
    directory : WorkDir
        Holds the trials of earlier runs and gets the new ones.
    compilers, boards : Pool
        Workers that run ``compile_loop`` and ``measure_loop``.
    limit : int
        Trials per kernel.
    seed : int
        For the search.
    display : Progress
        What the user sees.
    alone : bool
        The devices are this machine: never compile while something is measured.
    check_devices : callable
        Called with the seconds that a candidate has waited for a device; raises when there is none.
    """

    def __init__(
        self,
        directory: WorkDir,
        compilers: Pool,
        boards: Pool,
        *,
        limit: int,
        seed: int,
        display: Progress,
        alone: bool,
        check_devices: Callable[[float], None],
    ) -> None:
        self._directory = directory
        self._compilers = compilers
        self._boards = boards
        self._limit = limit
        self._seed = seed
        self._display = display
        self._alone = alone
        self._check_devices = check_devices
        self._batch = max(4, min(16, limit // 4), 2 * boards.free)
        self._states: list[_State] = []
        self._to_compile: deque[tuple[_State, Decisions]] = deque()
        self._to_measure: deque[_Job] = deque()

    def run(self, kernels: Sequence[Kernel]) -> None:
        """Tune the kernels.

        Raises
        ------
        DeviceError
            If devices vanish, if nothing at all runs on them, or if this machine can't compile.
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
            if not channels:
                break
            ready = wait(channels, timeout=0.5)
            for (state, wanted, started), _, answer in self._compilers.answers(ready):
                self._compiled(state, wanted, started, answer)
            for job, device, answer in self._boards.answers(ready):
                self._measured(job, device, answer)
            self._check_devices(self._boards.waiting())
        self._check_success(at_least=1)

    def _probe(self, kernels: Sequence[Kernel]) -> list[_State]:
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

    def _refill(self) -> None:
        """Queue the next batch, of the kernel that is furthest behind and then of the costliest one."""
        while sum(s.in_flight > 0 for s in self._states) < (1 if self._alone else 2):
            open_ = [s for s in self._states if not s.in_flight and not s.exhausted and s.done < self._limit]
            if not open_:
                return
            state = min(open_, key=lambda s: (s.done // self._batch, -_cost(s)))
            batch = state.search.propose(min(self._batch, self._limit - state.done))
            if not batch:
                state.exhausted = True
                self._display.total(state.kernel, state.done)
                continue
            state.in_flight = len(batch)
            self._to_compile.extend((state, wanted) for wanted in batch)

    def _dispatch(self) -> None:
        """Hand out work; on this machine alone, all compiling of a batch comes before all measuring."""
        if not (self._alone and self._boards.working):
            while self._to_compile and self._compilers.free:
                state, wanted = self._to_compile.popleft()
                known = frozenset(state.search.times) | state.pending
                folder = str(self._directory.path / "scratch")
                self._compilers.submit((state, wanted, now()), (state.kernel.id, wanted, known, folder))
        if not (self._alone and self._compilers.working):
            while self._to_measure and self._boards.free:
                job = self._to_measure.popleft()
                message = (job.candidate.library, job.candidate.args, job.state.search.best)
                self._boards.submit(job, message)

    def _compiled(self, state: _State, wanted: Decisions, started: float, answer: Candidate | Failure) -> None:
        state.search.skip(wanted)
        if isinstance(answer, Failure):
            answer = Candidate(state.kernel.id, wanted, decisions=wanted, error=f"compiling: {answer.reason}")
        if answer.broken:
            raise DeviceError(f"compiling on this machine failed: {answer.error}")
        state.search.met(answer.arity)
        fresh = answer.decisions not in state.search.times and answer.decisions not in state.pending
        job = _Job(state, answer, started)
        if fresh and answer.error:
            self._note(job, None, Measured(error=answer.error))
        elif fresh and answer.code not in state.codes:
            state.codes.add(answer.code)
            state.pending.add(answer.decisions)
            self._to_measure.append(job)
        else:
            state.search.skip(answer.decisions)
            self._forget(job)

    def _measured(self, job: _Job, device: str | None, answer: Measured | Failure) -> None:
        if isinstance(answer, Failure):
            answer = Measured(error=f"measuring: {answer.reason}", lost=device is None)
        if answer.lost:
            job.lost += 1
            if job.lost > _MAX_LOST:
                raise DeviceError(f"the devices can't be reached any more: {answer.error}")
            self._to_measure.append(job)
        else:
            self._note(job, device, answer)

    def _note(self, job: _Job, device: str | None, result: Measured) -> None:
        """Write a finished trial into the journal, then tell the search and the user."""
        state, candidate = job.state, job.candidate
        trial = Trial(
            kernel=state.kernel.id,
            decisions=candidate.decisions,
            seconds=result.seconds,
            error=result.error,
            device=device,
            rule=candidate.rule,
            code=candidate.code,
            started=job.started,
            finished=now(),
            trace=candidate.trace,
        )
        self._directory.append(trial)
        state.search.record(trial.decisions, trial.time)
        state.done += 1
        self._display.trial(state.kernel, state.search.best)
        self._forget(job)
        self._check_success(at_least=_HOPELESS_FAILURES)

    def _forget(self, job: _Job) -> None:
        job.state.in_flight -= 1
        job.state.pending.discard(job.candidate.decisions)
        if job.candidate.library:
            with contextlib.suppress(OSError):
                os.unlink(job.candidate.library)
        if not job.state.in_flight:
            self._directory.write_records()

    def _check_success(self, at_least: int) -> None:
        """Give up when nothing ever ran; such a journal says nothing about the candidates."""
        trials = self._directory.trials
        if len(trials) >= at_least and all(trial.seconds is None for trial in trials):
            self._directory.discard_journal()
            raise DeviceError(
                f"none of {len(trials)} candidates ran; the first one: {trials[0].error} "
                f"(all of them are in {self._directory.path}/journal.failed.jsonl)"
            )
