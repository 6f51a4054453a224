"""Boards without a board: the server of a 64-bit ARM board, run by QEMU's user-mode emulation.

A folder with Debian's aarch64 Python and TVM's aarch64 wheels is made once and kept in the user's cache. Code runs as
it would on the CPU that is emulated, to the last bit, and an instruction that this CPU lacks ends the session. Its
speed says nothing about any board.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import hashlib
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import IO

from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.devices.remote.server import LOOPBACK, check_host
from nnfuze_tvm.errors import DeviceError

# What runs aarch64 code, and what makes the folder: commands by Debian package.
TOOLS = {"qemu-user": "qemu-aarch64", "mmdebstrap": "mmdebstrap"}

_SUITE = "bookworm"
_PYTHON = "3.11"
_PACKAGES = (
    "python3-minimal", f"libpython{_PYTHON}-stdlib", "libstdc++6", "libgcc-s1", "libffi8", "zlib1g", "libexpat1",
    "libssl3",
)  # fmt: skip
# The oldest and the newest C library that a wheel for that Debian may ask for.
_GLIBC = (17, 36)
_START_SECONDS = 120.0
# Not `sys.stderr`, which may be no file.
_STDERR = 2
_PR_SET_PDEATHSIG = 1
_SERVE = """
import sys
from nnfuze_tvm.devices.remote import server
server.start((sys.argv[1], int(sys.argv[2])), sys.argv[3], sys.stdin.buffer.read() or None, host=sys.argv[4])
"""


def folder(announce: Callable[[str], None] = lambda _: None) -> Path:
    """Return the folder with an aarch64 root file system and Python packages; make it if it isn't in the cache.

    Parameters
    ----------
    announce : callable
        Is told what is being downloaded.

    Returns
    -------
    pathlib.Path
        Holds ``root`` (what ``qemu-aarch64 -L`` takes) and ``site`` (for PYTHONPATH): TVM's runtime without its
        compiler, NumPy, and what these need.

    Raises
    ------
    DeviceError
        If a tool is missing, or a download or the disk fails.
    """
    _check_tools()
    wheels = [f"{name}=={version(name)}" for name in ("apache-tvm", "apache-tvm-ffi")]
    wheels += ["ml_dtypes", "numpy", "typing_extensions"]
    contents = hashlib.sha256(repr((_SUITE, _PACKAGES, wheels)).encode()).hexdigest()[:12]
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnfuze" / "boards"
    ready = base / f"aarch64-{contents}"
    if ready.is_dir():
        return ready
    try:
        base.mkdir(parents=True, exist_ok=True)
        with open(base / ".lock", "w") as lock:
            # Whoever comes second finds it made. What a killed one left behind is removed.
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not ready.is_dir():
                fresh = base / ".unfinished"
                shutil.rmtree(fresh, ignore_errors=True)
                fresh.mkdir()
                _fill(fresh, wheels, announce)
                fresh.rename(ready)
    except OSError as err:
        raise DeviceError(f"can't make the emulator's folder {ready}: {err.strerror or err}") from err
    return ready


def models() -> list[str]:
    """Return the CPU models that the emulator of this machine knows.

    Raises
    ------
    DeviceError
        If there is no emulator.
    """
    _check_tools()
    listed = subprocess.run([TOOLS["qemu-user"], "-cpu", "help"], capture_output=True, text=True, check=False)
    return [line.strip() for line in listed.stdout.splitlines()[1:] if line.strip()]


def python(cpu: str, at: Path, *paths: str | os.PathLike[str]) -> tuple[list[str], dict[str, str]]:
    """Return the command and the environment that run an emulated Python with TVM's runtime.

    Parameters
    ----------
    cpu : str
        One of ``models()``.
    at : pathlib.Path
        What ``folder()`` returned.
    *paths : path
        Where modules come from besides.
    """
    root = at / "root"
    search = [str(at / "site"), *(os.fspath(path) for path in paths)]
    inner = {"PYTHONHOME": str(root / "usr"), "PYTHONPATH": os.pathsep.join(search)}
    # The emulator hands its environment on; of this machine's Python and libraries, nothing may reach into the other.
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "LD_", "TVM_LIBRARY_PATH"))}
    return [TOOLS["qemu-user"], "-cpu", cpu, "-L", str(root), str(root / f"usr/bin/python{_PYTHON}")], kept | inner


@contextlib.contextmanager
def emulate(
    cpu: str,
    tracker: str | trackers.Place,
    key: str,
    count: int = 1,
    *,
    host: str = LOOPBACK,
    output: IO[bytes] | None = None,
    announce: Callable[[str], None] = lambda _: None,
) -> Iterator[list[subprocess.Popen]]:
    """A context with emulated boards that are registered with a tracker; they also end with this process.

    Parameters
    ----------
    cpu : str
        One of ``models()``.
    tracker : str or Place
        The tracker: ``host:port`` of one with this user's secret, or its place.
    key : str
        The key to register under.
    count : int
        How many boards.
    host : str
        Where their servers listen.
    output : file, optional
        Gets what the boards' servers print; standard error by default.
    announce : callable
        Is told what is being done.

    Yields
    ------
    list of subprocess.Popen
        The boards' servers.

    Raises
    ------
    DeviceError
        If the CPU model is unknown, a tool is missing, the tracker doesn't answer, or a server doesn't start.
    """
    if cpu not in (known := models()):
        raise DeviceError(f"CPU {cpu!r}: the emulator has no such model; use one of {', '.join(known)}")
    place = trackers.Place.of(tracker)
    at_host, port = trackers.parse_address(place.address)
    check_host(host, at_host)
    session = trackers.connect(place, 10.0)
    at = folder(announce)
    before = len(trackers.devices(session).get(key, ()))
    announce(f"starting {cpu}")
    with temporary.folder("board") as scratch, contextlib.ExitStack() as stack:
        # Nothing but this package: beside it may be packages for this machine.
        (Path(scratch) / "nnfuze_tvm").symlink_to(Path(__file__).parents[2].resolve())
        command, env = python(cpu, at, scratch)
        boards = []
        for _ in range(count):
            board = subprocess.Popen(
                [*command, "-c", _SERVE, socket.gethostbyname(at_host), str(port), key, host],
                env=env,
                cwd=scratch,
                stdin=subprocess.PIPE,
                stdout=output or _STDERR,
                stderr=output or _STDERR,
                # Ctrl-C in the terminal is for this process, which then ends them.
                start_new_session=True,
                preexec_fn=_end_with_parent,
            )
            stack.callback(_end, board)
            assert board.stdin is not None
            with contextlib.suppress(BrokenPipeError), board.stdin as pipe:
                # Other users see what a process was started with.
                pipe.write(place.secret or b"")
            boards.append(board)
        _wait_for(session, key, before, boards)
        session.close()
        yield boards


def _wait_for(session: trackers.Session, key: str, before: int, boards: list[subprocess.Popen]) -> None:
    waited = 0.0
    while True:
        if any(board.poll() is not None for board in boards):
            raise DeviceError("the emulated board's server ended at once; its output says why")
        try:
            trackers.wait_for_device(session, key, 1.0, before + len(boards))
            return
        except DeviceError:
            waited += 1.0
            if waited > _START_SECONDS:
                raise


def _end(board: subprocess.Popen) -> None:
    board.kill()
    board.wait()


_libc = ctypes.CDLL(None)


def _end_with_parent() -> None:
    _libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def _check_tools() -> None:
    missing = [package for package, command in TOOLS.items() if not shutil.which(command)]
    if missing:
        raise DeviceError(
            f"emulating a board needs the Debian package{'s' if len(missing) > 1 else ''} {' and '.join(missing)}: "
            f"sudo apt-get install {' '.join(missing)}"
        )


def _fill(fresh: Path, wheels: list[str], announce: Callable[[str], None]) -> None:
    announce("downloading an aarch64 Debian (30 MB, once; a minute or more)")
    packages = ",".join(_PACKAGES)
    # Nothing of it is run, so it needs neither root nor a change of root.
    recipe = ["--mode=chrootless", "--variant=extract", "--arch=arm64", f"--include={packages}", _SUITE]
    _run([TOOLS["mmdebstrap"], *recipe, str(fresh / "root")], {})
    announce("downloading TVM's aarch64 packages (90 MB, once; a minute or more)")
    platforms = [f"--platform=manylinux_2_{minor}_aarch64" for minor in range(_GLIBC[1], _GLIBC[0] - 1, -1)]
    only = ["--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={_PYTHON}", *platforms]
    target = ["--quiet", "--disable-pip-version-check", "--target", str(fresh / "site")]
    _run([sys.executable, "-m", "pip", "install", *target, *only, *wheels], {"PIP_REQUIRE_VIRTUALENV": "0"})
    # Two thirds of it all, and of no use on a board.
    (fresh / "site/tvm/lib/libtvm_compiler.so").unlink()


def _run(command: list[str], env: Mapping[str, str]) -> None:
    done = subprocess.run(
        command,
        env={**os.environ, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        check=False,
    )
    if done.returncode:
        lines = [line.strip() for line in done.stdout.splitlines() if line.strip()] or ["no message"]
        errors = [line for line in lines if line.startswith(("E:", "ERROR"))] or lines[-1:]
        raise DeviceError(f"{Path(command[0]).name} failed while an emulated board was made: {errors[0]}")


def _main(arguments: list[str]) -> None:
    """Become a Python script or a program on an emulated CPU, with TVM's runtime at hand."""
    if len(arguments) < 2:
        sys.exit("usage: python -m nnfuze_tvm.devices.remote.emulator CPU SCRIPT.py|PROGRAM ARGUMENT ...")
    cpu, program, *rest = arguments
    try:
        command, env = python(cpu, folder())
    except DeviceError as err:
        sys.exit(f"error: {err}")
    if not program.endswith(".py"):
        command = command[:-1]
    os.execvpe(command[0], [*command, program, *rest], env)


if __name__ == "__main__":
    _main(sys.argv[1:])
