"""Commands in a process of their own: if compilers and libraries in it crash, that ends in a line, too."""

from __future__ import annotations

import argparse
import ctypes
import os
import resource
import shlex
import signal
import sys
import tempfile
from collections.abc import Callable, Sequence
from types import FrameType
from typing import IO

from nnfuze_tvm.cli import crash
from nnfuze_tvm.jobs.directory import JOB
from nnfuze_tvm.reading import memory

OUT_OF_MEMORY = "out of memory; use smaller samples or shapes, or a machine with more"

# As shells have it of what Ctrl-C ended.
INTERRUPTED = 130

_PR_SET_PDEATHSIG = 1
_ENDS = (signal.SIGINT, signal.SIGTERM)
# Less than that is never the limit: what is free now may be little, and what is cached is given back.
_LEAST_MEMORY = 2 << 30


def run(command: Callable[[Sequence[str]], int], arguments: Sequence[str]) -> tuple[int, str]:
    """Run a command in a child process that ends with this one, and gets Ctrl-C and SIGTERM from it.

    What native code prints is kept back: it says nothing to users, and goes with the note of a crash.

    Parameters
    ----------
    command : callable
        Gets the arguments, returns the exit code, and prints what there is to say.
    arguments : sequence of str
        The command line.

    Returns
    -------
    tuple
        The exit code, and the line to print if the child could print none. Only the parent returns.
    """
    with _log() as log:
        end, begin = os.pipe()
        parent = os.getpid()
        signal.pthread_sigmask(signal.SIG_BLOCK, _ENDS)
        sys.stdout.flush()
        pid = os.fork()
        if not pid:
            os.close(end)
            _end_with(parent)
            _child(command, arguments, log, begin)
        os.close(begin)
        came: list[int] = []
        previous = {number: signal.signal(number, _forward(pid, came)) for number in _ENDS}
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        try:
            status = os.waitpid(pid, 0)[1]
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
        said = os.read(end, 1)
        os.close(end)
        if said:
            return said[0], ""
        log.seek(0)
        return interrupted(arguments) if came else (2, _reason(status, log.read().decode(errors="replace"), arguments))


def interrupted(arguments: Sequence[str]) -> tuple[int, str]:
    """Return the exit code and the line of a command that Ctrl-C or SIGTERM ended."""
    kept = ""
    if any(word.startswith(("--trials", "--work-dir")) for word in arguments):
        kept = "; the same command goes on with what has been measured"
    elif place := _begun_merge(arguments):
        kept = f"; nnfuze merge -o {shlex.quote(place)} goes on with what has been learnt"
    return INTERRUPTED, f"interrupted{kept}"


def _begun_merge(arguments: Sequence[str]) -> str | None:
    """Return where a merge can go on that has come so far."""
    if arguments[:1] != ["merge"]:
        return None
    parser = argparse.ArgumentParser(add_help=False)
    parser.add_argument("-o", "--output", nargs="?")
    place = parser.parse_known_args(arguments)[0].output
    return place if place and os.path.isfile(os.path.join(place, JOB)) else None


def _log() -> IO[bytes]:
    # Not on the disk, which may be full.
    linux = sys.platform == "linux"
    return os.fdopen(os.memfd_create("nnfuze"), "w+b") if linux else tempfile.TemporaryFile()


def _end_with(parent: int) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:
        os._exit(2)


def _forward(pid: int, came: list[int]) -> Callable[[int, FrameType | None], None]:
    def handle(number: int, _frame: FrameType | None) -> None:
        came.append(number)
        os.kill(pid, number)

    return handle


def _child(command: Callable[[Sequence[str]], int], arguments: Sequence[str], log: IO[bytes], begin: int) -> None:
    """Run the command and end as any program does; that it has come so far is said before."""
    try:
        for number in _ENDS:
            signal.signal(number, signal.default_int_handler)
        sys.stderr.flush()
        sys.stderr = os.fdopen(os.dup(2), "w", buffering=1, errors="backslashreplace")
        os.dup2(log.fileno(), 2)
        limit_memory()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _ENDS)
        code = command(arguments)
    except KeyboardInterrupt:
        code, message = interrupted(arguments)
        print(f"error: {message}", file=sys.stderr)
    except SystemExit as ended:
        # What rich does where who read has gone, as `head` does.
        code = 2 if ended.code else 0
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        # Nor does Python's own end have anything to write then.
        os.dup2(log.fileno(), 1)
    os.write(begin, bytes([code]))
    sys.exit(code)


def limit_memory() -> None:
    """Let what asks for more memory than there is fail, so that nothing has to be killed for it."""
    if sys.platform != "linux":
        return
    most = max(memory.available(), _LEAST_MEMORY)
    _, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))


def _reason(status: int, printed: str, arguments: Sequence[str]) -> str:
    """Return why a child ended that said nothing."""
    number = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    if number == signal.SIGKILL or "bad_alloc" in printed or "out of memory" in printed.lower():
        return OUT_OF_MEMORY
    if "No space left on device" in printed:
        return "No space left on device"
    how = f"was ended by {signal.Signals(number).name}" if number else "ended"
    lines = [line.strip() for line in printed.splitlines() if line.strip()]
    return crash.note_text(f"native code {how}" + (f" ({lines[0]:.100})" if lines else ""), printed, arguments)
