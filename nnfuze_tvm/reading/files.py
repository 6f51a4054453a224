"""Bytes and JSON from files that anybody may have written."""

from __future__ import annotations

import errno
import json
import os
import stat
from collections.abc import Callable
from io import BufferedReader
from typing import Any

from nnfuze_tvm.reading import memory

_DEEPEST = 64
_KINDS = {stat.S_IFDIR: "a directory", stat.S_IFIFO: "a pipe", stat.S_IFSOCK: "a socket"}


def open_file(path: str | os.PathLike[str]) -> BufferedReader:
    """Open a file for reading; what is none, such as a pipe or a device, is not waited for.

    Raises
    ------
    OSError
        If there is no such file, or it can't be opened; ``strerror`` says why in a few words.
    """
    check_kind(path)
    # Should it have become a pipe meanwhile.
    return open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK))


def check_kind(path: str | os.PathLike[str]) -> None:
    """Check that there is a file.

    Raises
    ------
    OSError
        If there is none, or a directory, a pipe or a device.
    """
    try:
        kind = stat.S_IFMT(os.stat(path).st_mode)
    except ValueError:
        # A NUL, or half of a character.
        raise OSError(errno.EINVAL, "no file has such a name", os.fspath(path)) from None
    if kind != stat.S_IFREG:
        raise OSError(errno.EINVAL, f"{_KINDS.get(kind, 'a device')}, not a file", os.fspath(path))


def read_file(path: str | os.PathLike[str]) -> bytes:
    """Return what is in a file.

    Raises
    ------
    OSError
        As `open_file`; or if it is larger than memory, or grows meanwhile.
    """
    with open_file(path) as file:
        size = os.fstat(file.fileno()).st_size
        if reason := memory.too_large(size):
            raise OSError(errno.EFBIG, reason, os.fspath(path))
        data = file.read(size)
        if file.read(1):
            raise OSError(errno.EBUSY, "it is being written", os.fspath(path))
    return data


def parse_json(text: str | bytes, pairs: Callable[[list[tuple[str, Any]]], Any] | None = None) -> Any:
    """Return what a JSON text says.

    Parameters
    ----------
    text : str or bytes
        The text; bytes are UTF-8.
    pairs : callable, optional
        Makes an object of its pairs.

    Raises
    ------
    ValueError
        If it is none, or nested too deep for those who walk through it.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    try:
        document = json.loads(text, object_pairs_hook=pairs)
    except RecursionError:
        document, depth = None, _DEEPEST + 1
    else:
        depth = 0
    level = [document]
    while level and depth <= _DEEPEST:
        inner = [value for value in level if isinstance(value, dict | list)]
        level = [part for value in inner for part in (value.values() if isinstance(value, dict) else value)]
        depth += 1
    if depth > _DEEPEST:
        raise ValueError(f"nested deeper than {_DEEPEST} levels")
    return document
