"""Where a command's one file goes: never half of it, and never in the place of what is no file."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nnfuze_tvm.devices import scratch
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.reading.files import check_kind


def destination(output: str | os.PathLike[str], *, force: bool) -> Path:
    """Return where a file will be written, or say at once why it can't be.

    Of a link that is to be replaced, that is where it points.

    Raises
    ------
    InputError
        If something is there (with ``force``: that is no file), or its directory can't be written.
    """
    path = Path(os.path.realpath(output) if force else os.path.abspath(output))
    if os.path.lexists(path):
        try:
            check_kind(path)
        except OSError as error:
            raise InputError(f"--output {output}: {error.strerror}; give the name of a new file") from None
        if not force:
            raise InputError(f"--output {output}: exists already; use --force to replace it")
    if not (path.parent.is_dir() and os.access(path.parent, os.W_OK)):
        raise InputError(f"--output {output}: {path.parent} is no directory that can be written")
    return path


@contextmanager
def whole(path: Path, output: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a file's name; what is written there is at ``path`` when the block ends well, and gone otherwise.

    Raises
    ------
    InputError
        If it can't be written; the message calls it ``output``.
    """
    try:
        with scratch.folder(parent=path.parent) as directory:
            file = directory / path.name
            yield file
            os.replace(file, path)
    except OSError as error:
        raise InputError(f"--output {output}: can't be written ({error.strerror or error})") from None
