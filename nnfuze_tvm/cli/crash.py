"""What is left of a fault of our own: one line for the user, and a file for those who mend it."""

from __future__ import annotations

import os
import platform
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

from nnfuze_tvm.errors import printable


def note(error: Exception, arguments: Sequence[str]) -> str:
    """Write down where an exception came from, and return a line that says so.

    Parameters
    ----------
    error : Exception
        What nobody expected.
    arguments : sequence of str
        The command line.
    """
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    # The last line of what TVM says is what happened; before it come its own frames.
    what = f"{type(error).__name__}: {lines[-1]}" if lines else type(error).__name__
    return note_text(what, "".join(traceback.format_exception(error)), arguments)


def note_text(what: str, text: str, arguments: Sequence[str]) -> str:
    """Write down a text, and return a line that says what happened and where the text is.

    Parameters
    ----------
    what : str
        What happened.
    text : str
        All that is known of it.
    arguments : sequence of str
        The command line.
    """
    what = printable(what, 100)
    header = f"nnfuze {' '.join(arguments)}\nPython {sys.version.split()[0]} on {platform.platform()}\n\n"
    name = f"crash-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.txt"
    for folder in (_state_folder(), Path(tempfile.gettempdir())):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(header + text, encoding="utf-8", errors="backslashreplace")
        except OSError:
            continue
        return f"{what}; this is a fault of nnfuze: please report it, with {folder / name}"
    return f"{what}; this is a fault of nnfuze: please report it"


def _state_folder() -> Path:
    given = os.environ.get("XDG_STATE_HOME")
    return (Path(given) if given else Path.home() / ".local/state") / "nnfuze"
