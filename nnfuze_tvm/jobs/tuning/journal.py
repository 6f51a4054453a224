"""The directory of a tuning job: everything that was measured, written so that it survives being killed.

- ``job.json``: what the job is about: target, device key, kernels, versions.
- ``journal.jsonl``: one line per trial, failures included; the truth.
- ``finals.jsonl``: one line per kernel whose trials are done: the untuned schedule and the best few, measured again
  in turns.
- ``database_workload.json``: the kernels, in MetaSchedule's format.
- ``database_tuning_record.json``: the best trial of each kernel, in MetaSchedule's format, from these two.
- ``logs/``: what compile workers, servers and TVM print.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import IO, Any, TypeVar

import tvm

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.tuning.kernels import Kernel, kernel_id
from nnfuze_tvm.jobs.tuning.search import Decisions

_Line = TypeVar("_Line")

# The same candidates, measured in turns, differ by less than this share.
_NOISE = 0.01


@dataclass(frozen=True)
class Trial:
    """One line of the journal.

    Attributes
    ----------
    kernel : str
        The kernel's id.
    decisions : tuple of int
        The index of the chosen candidate of every knob.
    seconds : list of float, optional
        The time of one run, once per repeat; None for a failure.
    error : str, optional
        Why there is no time.
    device : str, optional
        ``host:port`` of the device; None when the candidate did not get that far.
    rule : str
        The schedule rule.
    code : str
        Digest of the machine code.
    started, finished : float
        Seconds since the epoch.
    trace : Any
        The schedule's trace, as MetaSchedule writes it.
    lost : tuple of str
        The devices that went away with the candidate before the one that gave the result.
    """

    kernel: str
    decisions: Decisions
    seconds: list[float] | None
    error: str | None
    device: str | None
    rule: str
    code: str
    started: float
    finished: float
    trace: Any
    lost: tuple[str, ...] = ()

    @property
    def time(self) -> float | None:
        """The median of the repeats in seconds."""
        return median(self.seconds) if self.seconds else None


@dataclass(frozen=True)
class Final:
    """The untuned schedule of a kernel and its best candidates, measured in turns on one device.

    Single trials are taken at different times, on devices that may differ or be disturbed; these compare.

    Attributes
    ----------
    kernel : str
        The kernel's id.
    decisions : tuple of tuple of int
        The candidates; the untuned one first, if it runs.
    seconds : tuple of list of float
        The times of each.
    trials : int
        How many trials of the kernel were known.
    device : str
        ``host:port`` of the device.
    """

    kernel: str
    decisions: tuple[Decisions, ...]
    seconds: tuple[list[float], ...]
    trials: int
    device: str

    @property
    def winner(self) -> int:
        """The position of the fastest one; the first, unless another one is faster by more than noise."""
        times = [median(seconds) for seconds in self.seconds]
        fastest = min(range(len(times)), key=times.__getitem__)
        return fastest if times[fastest] < times[0] * (1 - _NOISE) else 0


class WorkDir:
    """A job's directory, held by one process at a time.

    Raises
    ------
    InputError
        If another process holds it, if it can't be written, or if its journal is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as err:
            raise InputError(f"work directory {self.path}: {err.strerror}") from err
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._lock.close()
            raise InputError(f"work directory {self.path}: another tuning job is using it") from err
        self.journal = self.path / "journal.jsonl"
        self.trials = read_journal(self.path, repair=True)
        self.finals = {final.kernel: final for final in _read(self.path / "finals.jsonl", _final, True)}
        self._out = open(self.journal, "a", encoding="utf-8")
        self._order: list[str] = []
        self._target: Any = None

    def close(self) -> None:
        """Let other processes have the directory."""
        self._out.close()
        self._lock.close()

    def append(self, trial: Trial) -> None:
        """Write one trial; it is on the disk when this returns."""
        _append(self._out, trial)
        self.trials.append(trial)

    def decide(self, final: Final) -> None:
        """Write the comparison that ends a kernel; it is on the disk when this returns."""
        with open(self.path / "finals.jsonl", "a", encoding="utf-8") as out:
            _append(out, final)
        self.finals[final.kernel] = final

    def final(self, kernel: str) -> Final | None:
        """Return a kernel's comparison, if it was made and no trial has come after it."""
        final = self.finals.get(kernel)
        return final if final and final.trials == sum(t.kernel == kernel for t in self.trials) else None

    def discard_journal(self) -> None:
        """Set the journal aside as ``journal.failed.jsonl``."""
        os.replace(self.journal, self.journal.with_name("journal.failed.jsonl"))
        (self.path / "finals.jsonl").unlink(missing_ok=True)

    def claim(self, facts: dict[str, Any], fixed: Sequence[str]) -> None:
        """Write ``job.json``; the facts named in ``fixed`` may not differ from those of an earlier run.

        Raises
        ------
        InputError
            If they do: times taken for another target or device can't be compared.
        """
        path = self.path / "job.json"
        try:
            before = json.loads(path.read_text())
        except (OSError, ValueError):
            before = {}
        for name in fixed:
            if self.trials and before.get(name, facts[name]) != facts[name]:
                raise InputError(
                    f"work directory {self.path} belongs to a job with {name} {before[name]!r}, "
                    f"not {facts[name]!r}; use another directory"
                )
        _replace(path, json.dumps(facts, indent=1) + "\n")

    def workloads(self) -> list[str]:
        """Return the kernels that earlier runs knew, one line of MetaSchedule's database each."""
        try:
            return (self.path / "database_workload.json").read_text().splitlines()
        except OSError:
            return []

    def write_workloads(self, kernels: Sequence[Kernel], target: tvm.target.Target) -> None:
        """Add kernels to those of earlier runs; the records are written for ``target``."""
        lines = dict.fromkeys([*self.workloads(), *(kernel.workload for kernel in kernels)])
        _replace(self.path / "database_workload.json", "".join(line + "\n" for line in lines))
        self._order = [kernel_id(line) for line in lines]
        self._target = json.loads(str(target))

    def write_records(self) -> None:
        """Write the best trial of each kernel as MetaSchedule's tuning records."""
        best: dict[str, Trial] = {}
        for trial in self.trials:
            fastest = best.get(trial.kernel)
            if trial.time is not None and (fastest is None or fastest.time is None or trial.time < fastest.time):
                best[trial.kernel] = trial
        records = {id_: (trial.trace, trial.seconds) for id_, trial in best.items()}
        for id_ in best:
            if final := self.final(id_):
                decisions = final.decisions[final.winner]
                won = next(t for t in self.trials if t.kernel == id_ and t.decisions == decisions)
                records[id_] = won.trace, final.seconds[final.winner]
        lines = [
            json.dumps([index, [*records[id_], self._target, None]])
            for index, id_ in enumerate(self._order)
            if id_ in records
        ]
        _replace(self.path / "database_tuning_record.json", "".join(line + "\n" for line in lines))


def read_journal(work_dir: str | os.PathLike[str], *, repair: bool = False) -> list[Trial]:
    """Return the trials of a job; a last line that was cut off is left out, and with ``repair`` cut away.

    Raises
    ------
    InputError
        If any other line can't be read.
    """
    return _read(Path(work_dir) / "journal.jsonl", _trial, repair)


def _trial(fields: dict[str, Any]) -> Trial:
    changed = {"decisions": tuple(fields["decisions"]), "lost": tuple(fields.get("lost", ()))}
    return Trial(**{**fields, **changed})


def _final(fields: dict[str, Any]) -> Final:
    changed = {"decisions": tuple(map(tuple, fields["decisions"])), "seconds": tuple(fields["seconds"])}
    return Final(**{**fields, **changed})


def _read(path: Path, make: Callable[[dict[str, Any]], _Line], repair: bool) -> list[_Line]:
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        return []
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(make(json.loads(line)))
        except (ValueError, TypeError, KeyError) as err:
            raise InputError(f"{path}, line {number}: damaged; delete the line to go on without it") from err
    return lines


def _append(out: IO[str], line: Trial | Final) -> None:
    out.write(json.dumps(asdict(line), separators=(",", ":")) + "\n")
    out.flush()
    os.fsync(out.fileno())


def _replace(path: Path, text: str) -> None:
    """Write a file so that it is always either the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    with open(temporary, "w", encoding="utf-8") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
