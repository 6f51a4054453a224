"""The directory of a job: one owner, one target, and a journal that forgives a cut-off end only."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.tuning.directory import Final, Trial, TuningDirectory, read_journal


def trial(number: int, seconds: list[float] | None) -> Trial:
    error = None if seconds else "why"
    return Trial("k", (number, 1), seconds, error, "h:1", "rule", f"c{number}", 1.0, 2.0, [["x"], []])


def test_what_was_appended_is_read_back(tmp_path: Path) -> None:
    directory = TuningDirectory(tmp_path)
    written = [trial(0, [3.0, 1.0, 2.0]), trial(1, None)]
    for one in written:
        directory.append(one)
    assert read_journal(tmp_path) == written
    assert [one.time for one in written] == [2.0, None]


@pytest.mark.parametrize("keep", range(1, 60, 7))
def test_a_cut_off_line_is_dropped(tmp_path: Path, keep: int) -> None:
    directory = TuningDirectory(tmp_path)
    directory.append(trial(0, [1.0]))
    whole = directory.journal.path.stat().st_size
    directory.append(trial(1, [1.0]))
    directory.close()
    with open(directory.journal.path, "r+") as journal:
        journal.truncate(whole + keep)
    assert len(read_journal(tmp_path)) == 1
    again = TuningDirectory(tmp_path)
    assert again.journal.path.stat().st_size == whole
    again.append(trial(2, [1.0]))
    assert [t.decisions for t in read_journal(tmp_path)] == [(0, 1), (2, 1)]


def test_a_damaged_line_is_named(tmp_path: Path) -> None:
    (tmp_path / "journal.jsonl").write_text("{}\n")
    with pytest.raises(InputError, match="line 1: damaged"):
        read_journal(tmp_path)


def test_one_owner_at_a_time(tmp_path: Path) -> None:
    directory = TuningDirectory(tmp_path)
    with pytest.raises(InputError, match="another tuning job"):
        TuningDirectory(tmp_path)
    directory.close()
    TuningDirectory(tmp_path).close()


def test_times_of_different_targets_are_not_mixed(tmp_path: Path) -> None:
    directory = TuningDirectory(tmp_path)
    directory.claim({"target": "a", "trials": 1}, fixed=("target",))
    directory.claim({"target": "b", "trials": 1}, fixed=("target",))
    directory.append(trial(0, [1.0]))
    directory.claim({"target": "b", "trials": 2}, fixed=("target",))
    with pytest.raises(InputError, match="target 'b', not 'c'"):
        directory.claim({"target": "c", "trials": 2}, fixed=("target",))


@pytest.mark.parametrize(
    ("seconds", "winner"),
    [
        (([1.0, 1.1, 0.9], [0.995, 0.2, 0.999], [1.2] * 3), 0),  # within what repeated measurements differ
        (([1.0, 1.1, 0.9], [0.97] * 3, [0.95] * 3), 2),
        (([1.0] * 3, [1.5] * 3, [2.0] * 3), 0),
    ],
)
def test_the_untuned_schedule_wins_unless_another_one_is_faster(seconds: tuple, winner: int) -> None:
    assert Final("k", ((0, 0), (1, 0), (2, 0)), seconds, 3, "h:1").winner == winner


def test_a_comparison_holds_until_there_are_more_trials(tmp_path: Path) -> None:
    directory = TuningDirectory(tmp_path)
    directory.append(trial(0, [5.0]))
    directory.append(trial(1, [1.0]))
    assert directory.final("k") is None
    final = Final("k", ((0, 1), (1, 1)), ([2.0], [3.0]), 2, "h:1")
    directory.decide(final)
    directory.close()
    again = TuningDirectory(tmp_path)
    assert again.final("k") == final
    again.append(trial(2, [1.0]))
    assert again.final("k") is None
