"""A job's directory, journal and the work of its devices, for a job that knows no kernels."""

from __future__ import annotations

import json
import logging
import os
from dataclasses import dataclass
from pathlib import Path

import pytest

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.jobs.directory import JobDirectory
from nnfuze_tvm.jobs.fleet import Usage, usage
from nnfuze_tvm.jobs.journal import Journal


@dataclass(frozen=True)
class Attempt:
    """One way of pruning, and what became of it."""

    keep: float
    accuracy: float | None
    error: str | None
    device: str | None
    lost: tuple[str, ...] = ()


def attempt(fields: dict) -> Attempt:
    return Attempt(**{**fields, "lost": tuple(fields["lost"])})


def test_another_search_keeps_its_results(tmp_path: Path) -> None:
    attempts = [Attempt(0.5, 0.9, None, "h:1"), Attempt(0.2, None, "too small", "h:2", ("h:1",))]
    directory = JobDirectory(tmp_path, "policy search")
    journal = Journal(directory.path / "attempts.jsonl", attempt)
    for one in attempts:
        journal.append(one)
    with pytest.raises(InputError, match="another policy search is using it"):
        JobDirectory(tmp_path, "policy search")
    directory.close()
    with open(journal.path, "a") as out:
        out.write('{"keep": 0.')
    assert Journal(journal.path, attempt).lines == attempts
    assert usage(attempts) == [Usage("h:1", 1, 0, 1), Usage("h:2", 1, 1, 0)]
    with open(journal.path, "a") as out:
        out.write('{"keeps": 0.5}\n')
    with pytest.raises(InputError, match=r"attempts\.jsonl, line 3: damaged"):
        Journal(journal.path, attempt)


def test_what_only_a_running_job_needs(tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path, "job")
    (tmp_path / "scratch").mkdir()
    (tmp_path / "scratch" / "left.so").write_text("by a job that was killed")
    with directory.scratch() as scratch, directory.logging("search"):
        assert list(scratch.iterdir()) == []
        logging.getLogger("nnfuze_tvm.jobs.anything").warning("device lost")
    assert not scratch.exists()
    assert "device lost" in (tmp_path / "logs" / "search.log").read_text()


def test_a_job_of_another_kind_is_left_alone(tmp_path: Path) -> None:
    first = JobDirectory(tmp_path, "merge")
    first.claim({"seed": 1}, ("seed",))
    first.close()
    other = JobDirectory(tmp_path, "tuning job")
    with pytest.raises(InputError, match="belongs to a 'merge', not to a tuning job"):
        other.claim({"target": "host"}, ())
    assert json.loads((tmp_path / "job.json").read_text()) == {"kind": "merge", "seed": 1}


def test_pipes_and_links_in_a_job_are_not_written_to(tmp_path: Path) -> None:
    directory = JobDirectory(tmp_path / "job", "job")
    (tmp_path / "file").write_text("mine")
    os.symlink(tmp_path / "file", directory.path / ".job.json.new")
    directory.claim({}, ())
    assert (tmp_path / "file").read_text() == "mine"
    os.mkfifo(directory.path / ".job.json.new")
    directory.claim({}, ())
    for name in ("search.log", "processes.log"):
        os.mkfifo(directory.path / "logs" / name)
    with pytest.raises(InputError, match="a pipe, not a file"), directory.logging("search"):
        pass
    with pytest.raises(InputError, match="a pipe, not a file"):
        _ = directory.process_log
    (tmp_path / "folder").mkdir()
    os.symlink(tmp_path / "folder", directory.path / "scratch")
    with pytest.raises(InputError, match="scratch: File exists; delete it"), directory.scratch():
        pass
