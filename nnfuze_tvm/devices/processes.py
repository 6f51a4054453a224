"""Child processes that already have TVM loaded, start in milliseconds and never outlive their parent.

Importing TVM takes some seconds of CPU time. A ``Nursery`` is one helper process that imports it once and
then forks a child for every request: RPC servers, compile workers and measuring workers all come from it.
"""

from __future__ import annotations

import contextlib
import ctypes
import importlib
import os
import signal
import subprocess
import sys
import traceback
from collections.abc import Callable
from multiprocessing import Pipe, reduction
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.errors import DeviceError

_PR_SET_PDEATHSIG = 1
_START_TIMEOUT = 120.0


class Child:
    """A running child: ``channel`` carries what its function sends and receives."""

    def __init__(self, nursery: Nursery, pid: int, channel: Connection) -> None:
        self._nursery = nursery
        self.pid = pid
        self.channel = channel

    def kill(self) -> None:
        """End the process at once; harmless when it has ended already."""
        self.channel.close()
        with contextlib.suppress(DeviceError):
            self._nursery._request(("kill", self.pid))


class Nursery:
    """A context that starts children with TVM loaded and ends all of them with it.

    They also end when this process is killed, whatever the signal. Ctrl-C in the terminal does not reach
    them.

    Parameters
    ----------
    preload : tuple of str
        Modules that are imported once, before any child is forked.
    log : path, optional
        File that gets what the children print; thrown away by default.
    scratch : path, optional
        Directory for the children's temporary files; by default one that is removed at the end.
    """

    def __init__(
        self,
        preload: tuple[str, ...] = ("tvm.rpc.server",),
        log: str | os.PathLike[str] | None = None,
        scratch: str | os.PathLike[str] | None = None,
    ) -> None:
        self._own_scratch = contextlib.ExitStack()
        self.scratch = Path(scratch or self._own_scratch.enter_context(temporary.folder()))
        self._hint = f"; see {log}" if log else ""
        self._control, theirs = Pipe()
        output: IO[bytes] | int = open(log, "ab") if log else subprocess.DEVNULL
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
            "TMPDIR": str(self.scratch.resolve()),
        }
        code = f"from {__name__} import _nursery_main; _nursery_main({theirs.fileno()}, {preload!r})"
        try:
            self._process = subprocess.Popen(
                [sys.executable, "-c", code],
                pass_fds=(theirs.fileno(),),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,
            )
        finally:
            theirs.close()
            if not isinstance(output, int):
                output.close()

    def __enter__(self) -> Nursery:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def start(self, function: Callable[..., None], *args: Any) -> Child:
        """Run ``function(channel, *args)`` in a new child.

        ``function`` must be importable by its name, the arguments picklable. What it sends through
        ``channel`` arrives at the ``channel`` of the returned child, and the other way round.

        Raises
        ------
        DeviceError
            If the helper process does not answer.
        """
        ours, theirs = Pipe()
        with theirs:
            # By name, as the helper process shall import the function's module only in the child.
            self._send(("start", (function.__module__, function.__qualname__)))
            reduction.send_handle(self._control, theirs.fileno(), self._process.pid)
        pid = self._receive()
        ours.send(args)
        return Child(self, pid, ours)

    def close(self) -> None:
        """End all children and wait until they are gone."""
        self._control.close()
        try:
            self._process.wait(5)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._own_scratch.close()

    def _request(self, message: tuple[str, Any]) -> Any:
        if self._control.closed:
            return None
        self._send(message)
        return self._receive()

    def _send(self, message: tuple[str, Any]) -> None:
        try:
            self._control.send(message)
        except OSError as err:
            raise DeviceError(f"the helper for child processes ended unexpectedly{self._hint}") from err

    def _receive(self) -> Any:
        if not self._control.poll(_START_TIMEOUT):
            raise DeviceError(f"the helper process gave no answer within {_START_TIMEOUT:.0f} s")
        try:
            return self._control.recv()
        except (EOFError, OSError) as err:
            raise DeviceError(f"the helper for child processes ended unexpectedly{self._hint}") from err


def _nursery_main(fd: int, preload: tuple[str, ...]) -> None:
    """Fork a child per request until the control channel is closed; then end the whole process group."""
    control = Connection(fd)
    # The parent's log file is shared by many processes: whole lines, at once.
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    children: set[int] = set()
    try:
        for name in preload:
            importlib.import_module(name)
        while True:
            command, argument = control.recv()
            if command == "start":
                channel_fd = reduction.recv_handle(control)
                pid = os.fork()
                if pid == 0:
                    control.close()
                    _child_main(channel_fd, *argument)
                os.close(channel_fd)
                children.add(pid)
                control.send(pid)
            elif argument in children:
                # Not reaped before: the id still belongs to our child.
                children.discard(argument)
                os.kill(argument, signal.SIGKILL)
                os.waitpid(argument, 0)
                control.send(True)
            else:
                control.send(False)
    except (EOFError, OSError):
        pass
    finally:
        # Sessions of RPC servers are grandchildren: the process group reaches them, too.
        os.killpg(0, signal.SIGKILL)


def _child_main(fd: int, module: str, name: str) -> None:
    """Run one function in a freshly forked child; never returns."""
    status = 1
    try:
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        channel = Connection(fd)
        function = getattr(importlib.import_module(module), name)
        function(channel, *channel.recv())
        status = 0
    except EOFError:
        status = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
