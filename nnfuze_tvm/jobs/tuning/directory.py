"""The directory of a tuning job: what every job's has, and everything that was measured.

- ``journal.jsonl``: one line per trial, failures included; the truth.
- ``finals.jsonl``: one line per kernel whose trials are done: the untuned schedule and the best few, measured again
  in turns.
- ``database_workload.json``: the kernels, in MetaSchedule's format.
- ``database_tuning_record.json``: the best trial of each kernel, in MetaSchedule's format, from these two.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import tvm
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.directory import JobDirectory, replace
from nnfuze_tvm.jobs.journal import Journal, read_lines
from nnfuze_tvm.jobs.tuning.kernels import TunableKernel, kernel_id
from nnfuze_tvm.jobs.tuning.search import Decisions
from nnfuze_tvm.reading.files import parse_json, read_file

_JOURNAL = "journal.jsonl"
_WORKLOADS = "database_workload.json"
_RECORDS = "database_tuning_record.json"

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


class TuningDirectory(JobDirectory):
    """A tuning job's directory, held by one process at a time.

    Attributes
    ----------
    journal : Journal
        The trials.
    workloads : list of str
        The kernels that earlier runs knew, one line of MetaSchedule's database each.

    Raises
    ------
    InputError
        If another process holds it, if it can't be written, or if one of its files is damaged.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        super().__init__(path, "tuning job")
        self.journal = Journal(self.path / _JOURNAL, _trial)
        self._finals = Journal(self.path / "finals.jsonl", _final)
        self.workloads = _read_workloads(self.path / _WORKLOADS)
        self._target: Any = None

    @property
    def trials(self) -> list[Trial]:
        """All trials, those of earlier runs included."""
        return self.journal.lines

    def append(self, trial: Trial) -> None:
        """Write one trial; it is on the disk when this returns."""
        self.journal.append(trial)

    def decide(self, final: Final) -> None:
        """Write the comparison that ends a kernel; it is on the disk when this returns."""
        self._finals.append(final)

    def final(self, kernel: str) -> Final | None:
        """Return a kernel's comparison, if it was made and no trial has come after it."""
        final = next((final for final in reversed(self._finals.lines) if final.kernel == kernel), None)
        return final if final and final.trials == sum(t.kernel == kernel for t in self.trials) else None

    def discard_journal(self) -> Path:
        """Set the journal aside, and return where."""
        aside = self.path / "journal.failed.jsonl"
        os.replace(self.journal.path, aside)
        self._finals.path.unlink(missing_ok=True)
        return aside

    def claim(self, facts: Mapping[str, Any], fixed: Sequence[str]) -> None:
        """Write ``job.json``; once there are trials, the facts named in ``fixed`` must stay what they were.

        Raises
        ------
        InputError
            If they don't: times taken for another target or device can't be compared.
        """
        super().claim(facts, fixed if self.trials else ())

    def write_workloads(self, kernels: Sequence[TunableKernel], target: tvm.target.Target) -> None:
        """Add kernels to those of earlier runs; the records are written for ``target``."""
        self.workloads = list(dict.fromkeys([*self.workloads, *(kernel.workload for kernel in kernels)]))
        replace(self.path / _WORKLOADS, "".join(line + "\n" for line in self.workloads))
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
                for won in (t for t in self.trials if t.kernel == id_ and t.decisions == decisions):
                    records[id_] = won.trace, final.seconds[final.winner]
        lines = [
            json.dumps([index, [*records[id_], self._target, None]])
            for index, id_ in enumerate(map(kernel_id, self.workloads))
            if id_ in records
        ]
        replace(self.path / _RECORDS, "".join(line + "\n" for line in lines))


def read_journal(work_dir: str | os.PathLike[str]) -> list[Trial]:
    """Return the trials of a job; a last line that was cut off is left out.

    Raises
    ------
    InputError
        If any other line can't be read.
    """
    return read_lines(Path(work_dir) / _JOURNAL, _trial)


def has_records(work_dir: str | os.PathLike[str]) -> bool:
    """Return whether a tuning job has left records in a directory."""
    return (Path(work_dir) / _RECORDS).is_file()


def load_database(work_dir: str | os.PathLike[str]) -> ms.database.JSONDatabase:
    """Return the best records of an earlier job.

    Raises
    ------
    InputError
        If there was none in ``work_dir``, or if its database is damaged.
    """
    # The records may name tensor intrinsics.
    import nnfuze_tvm.schedules  # noqa: F401

    path = Path(work_dir)
    if not has_records(path):
        raise InputError(f"work directory {path}: no tuning job was run there")
    workloads = _read_workloads(path / _WORKLOADS)
    try:
        # TVM reads them with threads of its own, in which many a damage ends the process.
        for line in read_file(path / _RECORDS).decode().splitlines():
            _check_record(parse_json(line), workloads)
        return ms.database.JSONDatabase(work_dir=str(path), allow_missing=False)
    except Exception as err:  # TVM raises many kinds here
        raise InputError(f"work directory {path}: the database is damaged; run the tuning job again") from err


def _read_workloads(path: Path) -> list[str]:
    try:
        lines = read_file(path).decode().splitlines()
    except FileNotFoundError:
        return []
    except (OSError, ValueError) as err:
        raise InputError(f"{path}: can't be read; delete it to go on without it") from err
    for number, line in enumerate(lines, 1):
        try:
            ms.database.Workload.from_json(parse_json(line))
        except Exception as err:  # TVM raises many kinds here
            raise InputError(f"{path}, line {number}: damaged; delete the file to go on without it") from err
    return lines


def _check_record(line: Any, workloads: Sequence[str]) -> None:
    """Raise some exception if a line is no tuning record of one of the kernels."""
    index, record = line
    (_, _), seconds, target, _ = record
    if type(index) is not int or not 0 <= index < len(workloads):
        raise ValueError(f"no kernel {index}")
    if not seconds or not all(isinstance(second, float) and second > 0 for second in seconds):
        raise ValueError(f"no times: {seconds}")
    tvm.target.Target(target)
    ms.database.TuningRecord.from_json(record, ms.database.Workload.from_json(json.loads(workloads[index])))


def _trial(fields: dict[str, Any]) -> Trial:
    changed = {
        "decisions": _decisions(fields["decisions"]),
        "seconds": None if fields["seconds"] is None else _seconds(fields["seconds"]),
        "lost": tuple(fields.get("lost", ())),
    }
    return Trial(**{**fields, **changed})


def _final(fields: dict[str, Any]) -> Final:
    changed = {
        "decisions": tuple(map(_decisions, fields["decisions"])),
        "seconds": tuple(map(_seconds, fields["seconds"])),
    }
    if not len(changed["decisions"]) == len(changed["seconds"]) > 0:
        raise ValueError("not as many times as candidates")
    return Final(**{**fields, **changed})


def _decisions(values: Any) -> Decisions:
    return tuple(int(value) for value in values)


def _seconds(values: Any) -> list[float]:
    if not values:
        raise ValueError("no times")
    return [float(value) for value in values]
