"""The table of operators, and the page that shows it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.graph import ops

PAGE = Path(__file__).parents[2] / "docs" / "operators.md"


def test_the_page_shows_what_is_printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("COLUMNS", "116")
    assert cli.run(["ops"]) == 0
    printed = [f"    {line}".rstrip() for line in capsys.readouterr().out.splitlines()]
    shown = [line for line in PAGE.read_text(encoding="utf-8").splitlines() if line.startswith("    ")]
    assert shown[1:] == [line for line in printed if line]


def test_json_has_every_operator_with_kernels(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["ops", "--json"]) == 0
    records = {record["name"]: record for record in json.loads(capsys.readouterr().out)}
    assert records.keys() == {name for name, operator in ops.OPERATORS.items() if operator.kernels}
    assert records["nn.conv1d_transpose"]["precisions"] == ["float32", "int8", "float16"]
    assert records["nn.softmax"]["prunes"] == "follow" and records["flip"]["prunes"] == "whole"


def test_a_reader_that_goes_early_is_no_fault():
    command = f"{sys.executable} -m nnfuze_tvm ops | head -1"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True)
    assert done.stdout.startswith("operator") and "rules" in done.stdout, "tables are not cut for files"
    assert not done.stderr
