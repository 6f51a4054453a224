"""Directories of tuning jobs that were damaged: one line that says so, and what to do."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from nnfuze_tvm import cli
from tests.tiny_networks import save_pair

RECORDS, WORKLOADS = "database_tuning_record.json", "database_workload.json"


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_pair(tmp_path_factory.mktemp("models"))[0]


@pytest.fixture(scope="module")
def finished(model: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    work = tmp_path_factory.mktemp("jobs") / "work"
    assert cli.run(["tune", model, "--work-dir", str(work), "--trials", "2", "--json"]) == 0
    return work


@pytest.fixture
def work(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "work"))


def refused(capfd: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """Run a command that must end with one line, and return that."""
    capfd.readouterr()
    assert cli.run([str(argument) for argument in arguments]) == 2
    errors = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("nnfuze: ")]
    assert len(errors) == 1 and errors[0].startswith("error: "), errors
    return errors[0]


def cut(text: str) -> str:
    return text[: len(text) // 2]


DAMAGES: dict[str, Callable[[str], str]] = {
    "cut off": cut,
    "no JSON": lambda text: "{\n" + text,
    "another type": lambda text: "null\n",
    "too short": lambda text: "[1]\n",
    "another length": lambda text: "[0, [1, 2]]\n",
    "NUL bytes": lambda text: "\0" * len(text),
}
RECORD_DAMAGES: dict[str, Callable[[str], str]] = {
    **DAMAGES,
    "a kernel that is not there": lambda text: re.sub(r"^\[\d+,", "[99,", text, flags=re.M),
    "a negative kernel": lambda text: re.sub(r"^\[\d+,", "[-1,", text, flags=re.M),
    "an unknown instruction": lambda text: text.replace("GetSBlock", "GetNothing"),
    "a block that is not there": lambda text: text.replace('"root"', '"toor"'),
    "an unknown target": lambda text: text.replace('"llvm"', '"toaster"'),
    "words for times": lambda text: re.sub(r"\[[\d.e, -]+\], \{", '["fast"], {', text),
}


@pytest.mark.parametrize("damage", RECORD_DAMAGES)
def test_tuning_records(work: Path, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    before = (work / RECORDS).read_text()
    after = RECORD_DAMAGES[damage](before)
    assert after != before
    (work / RECORDS).write_text(after)
    line = refused(capfd, "compile", model, "--work-dir", work, "--no-compare", "-o", tmp_path / "out")
    assert str(work) in line and "damaged" in line
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("damage", DAMAGES)
def test_kernels(work: Path, model: str, tmp_path: Path, capfd: pytest.CaptureFixture[str], damage: str) -> None:
    (work / WORKLOADS).write_text(DAMAGES[damage]((work / WORKLOADS).read_text()))
    for verb in (["analyze"], ["tune", "--trials", "2"]):
        line = refused(capfd, *verb, model, "--work-dir", work)
        assert WORKLOADS in line and "damaged" in line


@pytest.mark.parametrize("name", [WORKLOADS, RECORDS])
def test_a_file_that_is_gone(work: Path, model: str, capfd: pytest.CaptureFixture[str], name: str) -> None:
    (work / name).unlink()
    expected = "damaged" if name == WORKLOADS else "no tuning records in it"
    assert expected in refused(capfd, "analyze", model, "--work-dir", work)
    assert not (work / name).exists()


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"models": 3}', '{"models": ["a.onnx"], "trails": 3}'])
def test_what_a_job_was_begun_with(work: Path, capfd: pytest.CaptureFixture[str], text: str) -> None:
    (work / "options.json").write_text(text)
    refused(capfd, "tune", "--work-dir", work)


@pytest.mark.parametrize("text", ["null\n", '{"kernel": 1}\n', "[]\n"])
@pytest.mark.parametrize("name", ["journal.jsonl", "finals.jsonl"])
def test_journals(work: Path, model: str, capfd: pytest.CaptureFixture[str], name: str, text: str) -> None:
    before = (work / name).read_text()
    (work / name).write_text(text + before)
    line = refused(capfd, "tune", model, "--trials", "2", "--work-dir", work)
    assert f"{name}, line 1: damaged" in line
    first = json.loads(before.splitlines()[0])
    (work / name).write_text(json.dumps({**first, "seconds": "soon"}) + "\n")
    assert "damaged" in refused(capfd, "tune", model, "--trials", "2", "--work-dir", work)


def test_facts_of_the_job_are_written_anew(work: Path, model: str) -> None:
    (work / "job.json").write_text("null")
    assert cli.run(["tune", model, "--trials", "2", "--work-dir", str(work), "--json"]) == 0
    assert json.loads((work / "job.json").read_text())["trials"] == 2
