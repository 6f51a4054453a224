"""What commands have in common: results on standard output, progress on standard error, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.text import Text

from nnfuze_tvm.errors import escaped, printable
from nnfuze_tvm.jobs.announce import NOTE

if TYPE_CHECKING:
    import numpy as np

    from nnfuze_tvm.jobs.announce import Announce


# Columns of what goes to files and other programs.
_WIDE = 200
# Seconds within which a signal that comes again is the same one.
_TWICE = 0.5


class Interruption:
    """Ctrl-C or SIGTERM, remembered: the exception that it raises may get lost on its way through TVM's C++ parts."""

    def __init__(self) -> None:
        self.came = False
        self._when = 0.0
        self._stderr: int | None = None

    def handle(self, _signal: int, _frame: FrameType | None) -> None:
        """Stop what is being done, without whatever that makes TVM print."""
        # A terminal sends Ctrl-C to this process and to the one that waits for it and hands it on.
        before, self._when = self._when, time.monotonic()
        if self.came and self._when - before < _TWICE:
            return
        self.came = True
        if self._stderr is None:
            sys.stderr.flush()
            self._stderr = os.dup(2)
            with open(os.devnull, "wb") as nowhere:
                os.dup2(nowhere.fileno(), 2)
        raise KeyboardInterrupt

    def end(self) -> None:
        """Let things be printed again."""
        if self._stderr is not None:
            os.dup2(self._stderr, 2)
            os.close(self._stderr)
            self._stderr = None

    def check(self) -> None:
        """Stop here if what was being done didn't stop."""
        if self.came:
            raise KeyboardInterrupt


interruption = Interruption()


@contextmanager
def until_ended() -> Iterator[None]:
    """Run what serves others until Ctrl-C or SIGTERM, which are its usual end and no error."""

    def end(_signal: int, _frame: FrameType | None) -> None:
        raise KeyboardInterrupt

    previous = {number: signal.signal(number, end) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    except KeyboardInterrupt:
        pass
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def progress() -> Iterator[Announce]:
    """Show what is being done: a spinner on a terminal, lines elsewhere."""
    console = Console(stderr=True)
    status = console.status("starting") if console.is_terminal else None

    def announce(what: str) -> None:
        interruption.check()
        if status is None or what.startswith(NOTE):
            print(printable(f"nnfuze: {what}"), file=sys.stderr, flush=True)
            return
        status.update(Text(printable(what)))
        # Tuning draws bars of its own.
        status.stop() if what.startswith("tuning") else status.start()

    announce("starting")
    try:
        yield announce
    finally:
        if status is not None:
            status.stop()


class _Plain(Console):
    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(escaped, text.split("\n"))), **options)


def out() -> Console:
    """Return the console that results are printed on; names in them are no markup, and nothing is obeyed."""
    console = _Plain(soft_wrap=True, markup=False, emoji=False)
    if not console.is_terminal and "COLUMNS" not in os.environ:
        # Nobody's screen: tables are as wide as what is in them.
        console.width = _WIDE
    return console


def print_arrays(arrays: Mapping[str, np.ndarray]) -> None:
    """Print an output per line: its shape, and where its largest value is."""
    import numpy as np  # what prints arrays has it, and other verbs start without

    for name, array in arrays.items():
        largest = ""
        if array.size:
            place = np.unravel_index(array.argmax(), array.shape)
            index = [int(at) for at, extent in zip(place, array.shape, strict=True) if extent > 1] or [0]
            largest = f", largest {array[place]:.6g} at {index if len(index) > 1 else index[0]}"
        out().print(f"{name}: {list(array.shape)} {array.dtype}{largest}")
