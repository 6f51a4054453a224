"""Files of JSON lines that survive being killed: a line is on the disk before anything goes on."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Generic, TypeVar

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.reading.files import parse_json, read_file

Line = TypeVar("Line")
"""A dataclass; its fields are JSON values, or become ones (tuples become lists)."""


class Journal(Generic[Line]):
    """A file with one line per result, which only ever grows.

    Parameters
    ----------
    path : Path
        The file; it need not exist. A last line that was cut off is cut away.
    make : callable
        Returns the record that a line's fields stand for.

    Attributes
    ----------
    lines : list
        The records so far.

    Raises
    ------
    InputError
        If any line but a last, cut-off one can't be read.
    """

    def __init__(self, path: Path, make: Callable[[dict[str, Any]], Line]) -> None:
        self.path = path
        self.lines = read_lines(path, make, repair=True)

    def append(self, line: Line) -> None:
        """Write one record; it is on the disk when this returns."""
        with open(self.path, "a", encoding="utf-8") as out:
            out.write(json.dumps(asdict(line), separators=(",", ":")) + "\n")  # type: ignore[call-overload]
            out.flush()
            os.fsync(out.fileno())
        self.lines.append(line)


def read_lines(path: Path, make: Callable[[dict[str, Any]], Line], *, repair: bool = False) -> list[Line]:
    """Return a journal's records; a last line that was cut off is left out, and with ``repair`` cut away.

    Raises
    ------
    InputError
        If any other line can't be read.
    """
    try:
        data = read_file(path)
    except FileNotFoundError:
        return []
    except OSError as err:
        raise InputError(f"{path}: can't be read ({err.strerror})") from None
    whole = data[: data.rfind(b"\n") + 1]
    if repair and len(whole) < len(data):
        os.truncate(path, len(whole))
    lines = []
    for number, line in enumerate(whole.splitlines(), 1):
        try:
            lines.append(make(parse_json(line)))
        except (ValueError, TypeError, KeyError, AttributeError, OverflowError) as err:
            raise InputError(f"{path}, line {number}: damaged; delete the line to go on without it") from err
    return lines
