"""The directory of a job: held by one process, bound to what the job is about, safe from being killed.

- ``job.json``: what the job is about.
- ``logs/``: what the job and its child processes print; ``logs/processes.log`` is theirs.
- ``scratch/``: what only a running job needs.
- ``lock``: held while the job runs.

Jobs add journals of their own (`journal.Journal`).
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.reading.files import check_kind, parse_json, read_file

JOB = "job.json"


class JobDirectory:
    """A job's directory, held by one process at a time.

    Parameters
    ----------
    path : path
        The directory; it is made if need be.
    kind : str
        What such a job is called, for messages.

    Raises
    ------
    InputError
        If another process holds it, or if it can't be written.
    """

    def __init__(self, path: str | os.PathLike[str], kind: str) -> None:
        self.path = Path(path)
        self._kind = kind
        try:
            (self.path / "logs").mkdir(parents=True, exist_ok=True)
            # A pipe in its place is not waited for.
            number = os.open(self.path / "lock", os.O_WRONLY | os.O_CREAT | os.O_NONBLOCK, 0o666)
        except OSError as err:
            raise InputError(f"work directory {self.path}: {err.strerror}") from err
        self._lock = os.fdopen(number, "w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as err:
            self._lock.close()
            raise InputError(f"work directory {self.path}: another {kind} is using it") from err

    def close(self) -> None:
        """Let other processes have the directory."""
        self._lock.close()

    @property
    def process_log(self) -> Path:
        """Where child processes print to."""
        return self._writable("processes.log")

    def _writable(self, name: str) -> Path:
        """Return a log's path; a pipe in its place is not waited for."""
        path = self.path / "logs" / name
        try:
            if os.path.lexists(path):
                check_kind(path)
        except OSError as err:
            raise InputError(f"{path}: {err.strerror}; delete it to go on") from None
        return path

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """Give an empty directory that vanishes at the end; one that a killed job left is emptied."""
        scratch = self.path / "scratch"
        shutil.rmtree(scratch, ignore_errors=True)
        try:
            scratch.mkdir()
        except OSError as err:
            raise InputError(f"{scratch}: {err.strerror}; delete it to go on") from None
        try:
            yield scratch
        finally:
            shutil.rmtree(scratch, ignore_errors=True)

    @contextmanager
    def logging(self, name: str) -> Iterator[None]:
        """Send what jobs log into ``logs/<name>.log``."""
        handler = logging.FileHandler(self._writable(f"{name}.log"))
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
        logger = logging.getLogger("nnfuze_tvm.jobs")
        before = logger.propagate
        logger.addHandler(handler)
        logger.propagate = False
        try:
            yield
        finally:
            logger.propagate = before
            logger.removeHandler(handler)
            handler.close()

    def claim(self, facts: Mapping[str, Any], fixed: Sequence[str]) -> None:
        """Write ``job.json``; the facts named in ``fixed`` may not differ from those of an earlier run.

        Raises
        ------
        InputError
            If they do: its results can't be compared with new ones; or if the job is of another kind.
        """
        path = self.path / JOB
        try:
            before = parse_json(read_file(path))
        except (FileNotFoundError, ValueError):
            before = {}
        except OSError as err:
            raise InputError(f"{path}: can't be read ({err.strerror}); delete it to go on without it") from None
        before = before if isinstance(before, dict) else {}
        kind = before.get("kind", self._kind)
        if kind != self._kind:
            raise InputError(
                f"work directory {self.path} belongs to a {kind!r:.50}, not to a {self._kind}; use another one"
            )
        for name in fixed:
            if before.get(name, facts[name]) != facts[name]:
                raise InputError(
                    f"work directory {self.path} belongs to a job with {name} {before[name]!r}, "
                    f"not {facts[name]!r}; use another directory"
                )
        replace(path, json.dumps({"kind": self._kind, **facts}, indent=1) + "\n")


def replace(path: Path, content: str | bytes) -> None:
    """Write a file so that it is always either the old or the new one."""
    temporary = path.with_name(f".{path.name}.new")
    # A pipe or a link there is not written to.
    temporary.unlink(missing_ok=True)
    with open(temporary, "xb") as out:
        out.write(content.encode() if isinstance(content, str) else content)
        out.flush()
        os.fsync(out.fileno())
    os.replace(temporary, path)
