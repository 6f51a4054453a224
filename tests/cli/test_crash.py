"""What nobody expected ends in one line, too, and its traceback in a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from nnfuze_tvm import cli


def test_a_fault_of_our_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError("first\nof two lines")

    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    monkeypatch.setattr("nnfuze_tvm.jobs.bundles.inspect", broken)
    assert cli.run(["inspect", "nothing"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    (file,) = (tmp_path / "nnfuze").iterdir()
    assert line == (f"error: ZeroDivisionError: of two lines; this is a fault of nnfuze: please report it, with {file}")
    text = file.read_text()
    assert text.startswith("nnfuze inspect nothing\n") and "Traceback" in text and "in broken" in text


def test_where_nothing_can_be_written(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setenv("XDG_STATE_HOME", "/proc/none")
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/proc/none")
    monkeypatch.setattr("nnfuze_tvm.jobs.bundles.inspect", broken)
    assert cli.run(["inspect", "nothing"]) == 2
    assert capsys.readouterr().err == "error: ZeroDivisionError; this is a fault of nnfuze: please report it\n"
