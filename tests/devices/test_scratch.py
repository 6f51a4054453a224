"""Temporary folders: gone with their process, or when the next one begins."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from nnfuze_tvm.devices import scratch

PROGRAM = """
import sys
from nnfuze_tvm.devices import scratch
with scratch.folder(sys.argv[1], sys.argv[2] or None) as path:
    (path / "inner").mkdir()
    (path / "inner" / "file").write_text("x")
    print(path, flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    return tmp_path / "tmp"


@pytest.mark.parametrize(("kind", "in_parent"), [("", False), ("session", False), ("", True)])
def test_what_a_killed_process_left_is_removed_by_the_next(temporary: Path, kind: str, in_parent: bool) -> None:
    parent = str(temporary) if in_parent else ""
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", PROGRAM, kind, parent]
    with subprocess.Popen(command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().strip())
        with scratch.folder():
            assert (left / "inner" / "file").exists(), "its owner is running"
        owner.kill()
    assert left.exists()
    if kind:
        # As a server does that begins.
        scratch.sweep()
        assert not left.exists()
    with scratch.folder() as own:
        assert [path.name for path in temporary.iterdir()] == [own.name]
    assert not list(temporary.iterdir())


SWEEPER = """
import os, sys
from nnfuze_tvm.devices import scratch
print("ready", flush=True)
while os.getppid() == int(sys.argv[1]):
    scratch.sweep()
"""


def test_a_folder_that_is_new_is_nobody_elses(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An emulated process is told another time at which it began than other processes are."""
    monkeypatch.setattr(scratch, "_started", lambda _: "1")
    environment = {**os.environ, "TMPDIR": str(temporary), "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", SWEEPER, str(os.getpid())]
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as sweeper:
        assert sweeper.stdout is not None and sweeper.stdout.readline() == "ready\n"
        try:
            for _ in range(2000):
                with scratch.folder("session") as own:
                    (own / "file").write_text("x")
        finally:
            sweeper.kill()


def test_numbers_of_processes_are_used_again(temporary: Path) -> None:
    left = temporary / f"nnfuze-{os.getpid()}-1-abc"
    left.mkdir()
    with scratch.folder() as own:
        assert own.exists() and not left.exists()


def test_what_somebody_holds_stays(temporary: Path) -> None:
    """As the processes of another container do, whose numbers mean nothing here."""
    left = temporary / f"nnfuze-board-{os.getpid()}-1-abc"
    left.mkdir()
    holder = os.open(left, os.O_RDONLY)
    fcntl.flock(holder, fcntl.LOCK_EX)
    scratch.sweep(temporary)
    assert left.exists()
    os.close(holder)
    scratch.sweep(temporary)
    assert not left.exists()


def test_nothing_else_is_touched(temporary: Path) -> None:
    own = f"nnfuze-{os.getpid()}-1-abc"
    kept = [f"{own}.txt", f"my-{own}", "nnfuze-abc", "nnfuze-tuning", f"nnfuze-{os.getpid()}-abc"]
    for name in kept:
        (temporary / name).mkdir()
    (temporary / "elsewhere").mkdir()
    (temporary / own).symlink_to(temporary / "elsewhere")
    (temporary / f"{own}d").write_text("a file")
    scratch.sweep(temporary)
    assert {path.name for path in temporary.iterdir()} == {*kept, "elsewhere", own, f"{own}d"}
    scratch.sweep(temporary / "nowhere")


def test_all_temporary_files_are_in_one_folder(temporary: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TMPDIR", "before")
    with scratch.everything():
        assert Path(tempfile.mkdtemp()).parent.parent == temporary
        assert Path(os.environ["TMPDIR"]).parent == temporary
    assert os.environ["TMPDIR"] == "before" and not list(temporary.iterdir())
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / "nowhere"))
    with scratch.everything():
        assert os.environ["TMPDIR"] == "before"
