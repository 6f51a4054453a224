"""What the child processes of a tuning job do: compile one candidate, measure one candidate.

Both are loops that answer one message after another, so that TVM and the kernels are loaded once per process.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import tvm
from tvm import rpc, s_tir
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm import schedules
from nnfuze_tvm.devices import toolchain
from nnfuze_tvm.devices.remote import server, tracker
from nnfuze_tvm.devices.remote.session import open_session
from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.jobs.board_queue import RUNNING
from nnfuze_tvm.jobs.tuning.search import Decisions
from nnfuze_tvm.schedules.blocks import statements

Space = Callable[..., str]
# A library's path, and shape and dtype of every operand of its function.
Library = tuple[str, list[tuple[tuple[int, ...], str]]]

_RETRY_SECONDS = 0.5

# One candidate is timed in repeats of about this many seconds ...
_REPEAT_SECONDS = 0.015
_REPEATS = 3
# ... unless its first run already takes this many times the best one's.
_HOPELESS = 3.0

# A candidate's operands are filled with random values where TVM's runtime offers that.
_RANDOM_FILL = "tvm.contrib.random.random_fill_for_measure"


class SteeredSchedule(s_tir.Schedule):
    """A schedule whose ``sample_categorical`` follows given decisions instead of chance.

    Rules compute with the sampled values, so a candidate is made by running the rule again, not by changing
    the decisions of a trace. Where a rule asks for more decisions than given, or for ones that its candidates
    do not hold, the choice is derived from the given ones; ``decisions`` says what was taken in the end.
    """

    # TVM's objects have no __dict__ of their own.
    __slots__ = ("arity", "decisions", "wanted")

    def __init__(self, mod: tvm.IRModule, wanted: Decisions) -> None:
        super().__init__(mod, seed=1, error_render_level="fast")
        self.wanted = wanted
        self.decisions: list[int] = []
        self.arity: list[int] = []

    def sample_categorical(self, candidates: list[int], probs: list[float], decision: int | None = None) -> tvm.ir.Expr:
        """Take the wanted candidate, see the class."""
        position = len(self.decisions)
        index = self.wanted[position] % len(candidates) if position < len(self.wanted) else 0
        self.decisions.append(index)
        self.arity.append(len(candidates))
        return super().sample_categorical(candidates, probs, index)


@dataclass
class Candidate:
    """One candidate of one kernel, as far as it came.

    Attributes
    ----------
    kernel : str
        The kernel's id.
    wanted, decisions : tuple of int
        What was asked for, and what the rule made of it.
    arity : tuple of int
        The number of candidates at each decision.
    rule : str
        The schedule rule that took the kernel.
    trace : Any
        The schedule's trace as a JSON object.
    library : str, optional
        The shared library; None when only the schedule was asked for, or it is a known one.
    code : str
        A digest of the machine code: equal for candidates that differ in their decisions alone.
    args : list of (shape, dtype)
        The operands of the compiled function.
    error : str, optional
        Why there is no library.
    broken : bool
        The error is this machine's fault, not the candidate's: no linker, no space on the disk.
    """

    kernel: str
    wanted: Decisions
    decisions: Decisions = ()
    arity: tuple[int, ...] = ()
    rule: str = ""
    trace: Any = None
    library: str | None = None
    code: str = ""
    args: list[tuple[tuple[int, ...], str]] = field(default_factory=list)
    error: str | None = None
    broken: bool = False


@dataclass
class Measured:
    """What a device said about some libraries: per library the seconds of a run, once per repeat; or an error.

    ``lost`` says that the device went away, which need not be a candidate's fault.
    """

    seconds: list[list[float]] | None = None
    error: str | None = None
    lost: bool = False


def compile_loop(
    channel: Connection, kernels: Mapping[str, tvm.IRModule], target: tvm.target.Target, space: Space
) -> None:
    """Answer every ``(kernel, decisions, known, folder)`` with a ``Candidate``.

    ``known`` holds the decisions that need no library any more; with ``folder`` None no library is made.
    """
    # Every candidate starts from the same module, which no schedule may change.
    _originals = [statements(mod) for mod in kernels.values()]
    while True:
        kernel, wanted, known, folder = channel.recv()
        candidate = Candidate(kernel, wanted)
        try:
            _compile(candidate, kernels[kernel], target, space, known, folder)
        except Exception as err:
            candidate.error = _one_line(err)
            candidate.broken = isinstance(err, DeviceError | OSError)
        channel.send(candidate)


def _compile(
    candidate: Candidate,
    mod: tvm.IRModule,
    target: tvm.target.Target,
    space: Space,
    known: frozenset[Decisions],
    folder: str | None,
) -> None:
    sch = SteeredSchedule(mod, candidate.wanted)
    try:
        with target:
            candidate.rule = space(sch, target, tunable=True)
    finally:
        candidate.decisions = tuple(sch.decisions)
        candidate.arity = tuple(sch.arity)
    if folder is None or candidate.decisions in known:
        return
    candidate.trace = plain(sch.trace.as_json())
    # What the database will do with the record; better a failed candidate now than a failed build later.
    s_tir.Trace.apply_json_to_schedule(candidate.trace, s_tir.Schedule(mod))
    whole = tvm.IRModule({"main": schedules.apply_rewrites(sch.mod["main"])})
    lowered = s_tir.transform.RemoveWeightLayoutRewriteBlock(skip_tensor_rewrite=True)(whole)
    candidate.args = [
        (tuple(int(dim) for dim in info.shape), str(info.dtype))
        for info in ms.arg_info.ArgInfo.from_prim_func(lowered["main"])
    ]
    # As in a network, and checks of the arguments are half of a small kernel's code.
    with tvm.transform.PassContext(config={"tirx.disable_assert": True}):
        built = tvm.tirx.build(lowered, target=target)
    digest = hashlib.sha256()
    link = toolchain.quick_linker_for(target)

    def link_and_digest(output: str, objects: list[str], **options: Any) -> None:
        for path in objects:
            digest.update(Path(path).read_bytes())
        link(output, objects, **options)

    link_and_digest.output_format = link.output_format  # type: ignore[attr-defined]
    link_and_digest.object_format = link.object_format  # type: ignore[attr-defined]
    handle, library = tempfile.mkstemp(suffix=".so", dir=folder)
    os.close(handle)
    built.export_library(library, fcompile=link_and_digest)
    candidate.code = digest.hexdigest()[:16]
    candidate.library = library


def measure_loop(channel: Connection, place: tracker.Place, key: str, timeout: float, threads: int) -> None:
    """Answer every ``(libraries, best)`` with ``Measured``: libraries as (path, operands), timed in turns.

    ``best`` is the shortest time so far or None. Before the answer come up to two notes: the device's address when
    the tracker has one for us, then ``RUNNING`` when what happens may be the candidate's fault.
    """
    session: tracker.Session | None = None
    while True:
        libraries, best = channel.recv()
        while True:
            try:
                session = session or tracker.connect(place)
                host, port, word = tracker.reserve(session, key)
                break
            except (DeviceError, OSError, RuntimeError):
                # It may come back; who gave us the candidates decides how long to wait.
                session = None
                time.sleep(_RETRY_SECONDS)
        channel.send(f"{host}:{port}")
        remote = None
        try:
            remote = open_session(place.secret, host, port, word, timeout * len(libraries))
            for path, _ in libraries:
                remote.upload(path)
        except Exception as err:
            result = Measured(error=_one_line(err), lost=True)
        else:
            channel.send(RUNNING)
            try:
                result = Measured(_measure(remote, libraries, best, threads))
            except Exception as err:
                told = [line for line in str(err).splitlines() if line.strip().startswith(server.LAST_WORDS)]
                if told:
                    result = Measured(error=told[-1].strip())
                else:
                    result = Measured(error=_one_line(err))
                    if not _answers(remote):
                        result = Measured(error="it closed the connection", lost=True)
        # The device ends the session, and takes the next one, when the last handle is gone.
        del remote
        channel.send(result)


def _answers(remote: rpc.RPCSession) -> bool:
    """Tell whether a session is still there after an error: then the error was the candidate's."""
    try:
        remote.get_function("runtime.NumThreads")
    except Exception:
        return False
    return True


def _measure(
    remote: rpc.RPCSession, libraries: Sequence[Library], best: float | None, threads: int
) -> list[list[float]]:
    device = remote.cpu(0)
    tracker.use_threads(remote, threads)
    runs = []
    for path, args in libraries:
        module = remote.load_module(os.path.basename(path))
        operands = [tvm.runtime.empty(shape, dtype, device) for shape, dtype in args]
        with contextlib.suppress(AttributeError, ValueError):
            fill = remote.get_function(_RANDOM_FILL)
            for operand in operands:
                fill(operand)
        first = module.time_evaluator(module.entry_name, device, number=1, repeat=1)(*operands).results[0]
        if len(libraries) == 1 and (first > 1.0 or (best is not None and first > max(_HOPELESS * best, best + 1e-3))):
            return [[float(first)]]
        number = max(1, math.ceil(_REPEAT_SECONDS / max(first, 1e-7)))
        runs.append((module.time_evaluator(module.entry_name, device, number=number, repeat=1), operands))
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(_REPEATS):
        for seconds, (evaluate, operands) in zip(times, runs, strict=True):
            seconds.append(float(evaluate(*operands).results[0]))
    return times


def _one_line(err: BaseException) -> str:
    """Return the telling line of an error: TVM's messages bring whole tracebacks and whole programs."""
    lines = [line.strip() for line in str(err).splitlines() if line.strip()]
    telling = [line for line in lines if "Error" in line.split(":")[0]] or lines
    name = type(err).__name__
    text = telling[-1].removeprefix(f"{name}: ") if telling else ""
    return f"{name}: {text}"[:300]


def plain(value: Any) -> Any:
    """Return a JSON object made of TVM's containers and constants as one of Python's."""
    if isinstance(value, tvm.tirx.IntImm | tvm.tirx.FloatImm):
        return value.value
    if isinstance(value, tvm.ir.Array | list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, tvm.ir.Map | dict):
        return {str(key): plain(item) for key, item in value.items()}
    return str(value) if isinstance(value, str) else value


def now() -> float:
    """Seconds since the epoch, to the millisecond, as the journal keeps them."""
    return round(time.time(), 3)
