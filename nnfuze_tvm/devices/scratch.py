"""Temporary folders that don't outlive their process for long: what a killed one left, the next one removes.

A folder's name says whose it is, and its owner holds a lock on it.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path

_NAME = re.compile(r"\.?nnfuze-(?:\w+-)?(\d+)-(\d+)-\w+")


@contextlib.contextmanager
def folder(kind: str = "", parent: str | os.PathLike[str] | None = None) -> Iterator[Path]:
    """Give a folder that vanishes at the end, after those are removed that processes left which are no more.

    Parameters
    ----------
    kind : str
        What it is for: one word, part of its name.
    parent : path, optional
        Where it is: there its name begins with a dot. By default where temporary files are.
    """
    where = Path(parent if parent is not None else tempfile.gettempdir())
    sweep(where)
    owner = f"{os.getpid()}-{_started(os.getpid())}"
    name = "-".join(filter(None, (".nnfuze" if parent is not None else "nnfuze", kind, owner)))
    path, lock = _made(where, f"{name}-")
    try:
        yield path
    finally:
        os.close(lock)
        shutil.rmtree(path, ignore_errors=True)


def _made(where: Path, prefix: str) -> tuple[Path, int]:
    """Make a folder; return it and the file number that holds its lock.

    Before it is locked, another process's sweep may take it for left behind: an emulated process is told another time
    at which it began than others are.
    """
    while True:
        path = Path(tempfile.mkdtemp(prefix=prefix, dir=where))
        try:
            lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        with contextlib.suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        if path.exists():
            return path, lock
        os.close(lock)


@contextlib.contextmanager
def everything() -> Iterator[None]:
    """Have all temporary files of this process, and of those that it starts, in one such folder, if it can be made."""
    before = os.environ.get("TMPDIR"), tempfile.tempdir
    with contextlib.ExitStack() as stack:
        try:
            path = stack.enter_context(folder())
        except OSError:
            yield
            return
        os.environ["TMPDIR"] = tempfile.tempdir = str(path)
        try:
            yield
        finally:
            tempfile.tempdir = before[1]
            if before[0] is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = before[0]


def sweep(where: Path | None = None) -> None:
    """Remove the folders that this user's processes left which are no more, by default where temporary files are."""
    with contextlib.suppress(OSError), os.scandir(where or tempfile.gettempdir()) as entries:
        for entry in entries:
            named = _NAME.fullmatch(entry.name)
            if named and _started(int(named[1])) != named[2] and _is_own(entry):
                _remove_if_free(entry.path)


def _started(process: int) -> str:
    """Return when a process began: of two that had one number, it tells which. "0" where the system doesn't say."""
    try:
        with open(f"/proc/{process}/stat", encoding="ascii", errors="replace") as file:
            # Behind the name, in which there may be anything.
            return file.read().rpartition(")")[2].split()[19]
    except FileNotFoundError:
        return "" if os.path.isdir("/proc/self") or not _exists(process) else "0"
    except (OSError, IndexError):
        return "0"


def _exists(process: int) -> bool:
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass
    return True


def _is_own(entry: os.DirEntry[str]) -> bool:
    facts = entry.stat(follow_symlinks=False)
    return stat.S_ISDIR(facts.st_mode) and facts.st_uid == os.getuid()


def _remove_if_free(path: str) -> None:
    """Remove a folder that nobody holds: numbers of processes mean nothing to those of another container."""
    with contextlib.suppress(OSError):
        lock = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Held meanwhile: who has made it a moment ago waits, and finds that it is gone.
            shutil.rmtree(path, ignore_errors=True)
        finally:
            os.close(lock)
