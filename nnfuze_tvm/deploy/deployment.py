"""Running a bundle on a board behind an RPC tracker: uploaded, run, timed, and its outputs brought back."""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm import relax, rpc

from nnfuze_tvm.deploy import loading
from nnfuze_tvm.deploy.bundle import LIBRARY, check_files, read_weights, unfit
from nnfuze_tvm.deploy.manifest import Manifest, read_manifest, recorded_signature
from nnfuze_tvm.deploy.runner import LOAD, made_up, places, sample_batches
from nnfuze_tvm.devices import cpu
from nnfuze_tvm.devices.processes import Nursery
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.errors import BundleError, DeviceError, NNFuzeError, last_line

# A board gets at least this long for each step; a large library on a slow link, a large network on a slow CPU.
_ANSWER_SECONDS = 60.0


@dataclass(frozen=True)
class Deployment:
    """What a board made of a bundle.

    Attributes
    ----------
    board : str
        The board's ``host:port``.
    answers : dict
        As `Bundle.run` gives them; of several samples, joined along the leading axis.
    seconds : list of float
        Of every inference that was timed, by the board's clock.
    threads : int
        Threads per inference.
    """

    board: str
    answers: dict[str, Any]
    seconds: list[float]
    threads: int

    @property
    def median(self) -> float:
        """The median of `seconds`."""
        return statistics.median(self.seconds)


@dataclass(frozen=True)
class _Order:
    """What the process that talks to the board is to do."""

    tracker: trackers.Place
    key: str
    directory: Path
    manifest: Manifest
    batches: list[list[np.ndarray]]
    states: list[np.ndarray]
    repeat: int
    threads: int
    patience: float


@dataclass(frozen=True)
class _Step:
    """What it does next, and how long that may take."""

    what: str
    seconds: float


def _silent(_: str) -> None:
    pass


def deploy(
    bundle: str | os.PathLike[str],
    tracker: str | trackers.Place,
    key: str,
    inputs: Mapping[str, np.ndarray] | None = None,
    *,
    repeat: int = 20,
    threads: int | None = None,
    wait: float = 60.0,
    trust: str | os.PathLike[str] | None = None,
    announce: Callable[[str], None] = _silent,
) -> Deployment:
    """Run a bundle on a board.

    The bundle need not be made for this machine. Nothing of it is sent before it is clear that the board's CPU has
    what its code uses.

    Parameters
    ----------
    bundle : path
        The bundle's directory.
    tracker : str or Place
        The RPC tracker: ``host:port`` of one with this user's secret, or its place.
    key : str
        The key of the board there.
    inputs : mapping of str to numpy.ndarray, optional
        Samples ``[N, …]`` by input; each batch of them is run once. By default one batch of random numbers.
    repeat : int
        How many inferences of the first batch are timed.
    threads : int, optional
        Threads per inference; by default as many as the bundle was compiled for.
    wait : float
        Seconds to wait for the tracker and for a board; a board gets that long, or a minute, for an answer.
    trust : path, optional
        A public key that must have signed the bundle; see `Bundle.load`.
    announce : callable
        Is told what is being done, in a few words.

    Raises
    ------
    BundleError
        If the bundle is damaged or its code isn't for that board.
    InputError
        If the inputs aren't the network's.
    DeviceError
        If there is no such tracker or board, or the board crashes or doesn't answer.
    """
    directory = Path(bundle)
    manifest = read_manifest(directory, trust)
    check_files(directory, manifest)
    taken, given, states = recorded_signature(manifest)
    samples = [made_up(taken)] if inputs is None else sample_batches(inputs, taken, "inputs")
    place = trackers.Place.of(tracker)
    announce(f"looking for a board {key!r} at {place}")
    session = trackers.connect(place, min(wait, 10.0))
    trackers.wait_for_device(session, key, wait)
    session.close()
    order = _Order(
        place,
        key,
        directory,
        manifest,
        [[sample[i.name] for i in taken] for sample in samples],
        [np.zeros(state.shape, state.dtype) for state in states],
        repeat,
        manifest.threads if threads is None else threads,
        max(_ANSWER_SECONDS, wait),
    )
    board, outputs, seconds = _elsewhere(order, announce)
    answers: dict[str, Any] = {}
    for (task, name), parts in zip(places(given), zip(*outputs, strict=True), strict=True):
        joined = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if name is None:
            answers[task] = joined
        else:
            answers.setdefault(task, {})[name] = joined
    return Deployment(board, answers, seconds, order.threads)


def _elsewhere(order: _Order, announce: Callable[[str], None]) -> tuple[str, list[list[np.ndarray]], list[float]]:
    """Talk to the board in a process of its own: a call that never returns can't be given up otherwise."""
    step = _Step("starting", _ANSWER_SECONDS)
    with Nursery() as nursery:
        channel = nursery.start(_main, order).channel
        while channel.poll(step.seconds):
            try:
                message = channel.recv()
            except EOFError:
                raise DeviceError(f"{_name(order)}: talking to it crashed while {step.what}") from None
            if isinstance(message, NNFuzeError):
                raise message
            if not isinstance(message, _Step):
                return message
            if message.what != step.what:
                announce(message.what)
            step = message
    raise DeviceError(
        f"{_name(order)}: no answer within {step.seconds:g} s while {step.what}; "
        "restart its server, or give it longer with --wait"
    )


def _name(order: _Order) -> str:
    return f"board {order.key!r} of tracker {order.tracker}"


def _main(channel: Connection, order: _Order) -> None:
    """Send a ``_Step`` before each step, at last the board's address, the outputs of every batch and the seconds."""
    step = _Step("waiting until it is free", order.patience)

    def start(what: str, seconds: float = 0.0) -> None:
        nonlocal step
        step = _Step(what, order.patience + seconds)
        channel.send(step)

    channel.send(step)
    try:
        remote, board = trackers.request(trackers.connect(order.tracker), order.key)
        start(f"asking the board at {board}")
        outputs, seconds = _run(remote, order, start)
        del remote  # the session ends as it should before this process does
        channel.send((board, outputs, seconds))
    except NNFuzeError as error:
        channel.send(error)
    except (OSError, RuntimeError, tvm.error.RPCError) as error:
        channel.send(DeviceError(f"{_name(order)}: failed while {step.what} ({last_line(error)})"))


def _run(
    remote: rpc.RPCSession, order: _Order, start: Callable[..., None]
) -> tuple[list[list[np.ndarray]], list[float]]:
    found = cpu.of(remote)
    if found is not None and (reason := unfit(order.manifest.target, found)):
        raise BundleError(f"{order.directory}: {reason}; compile it with that board's --target")
    library = loading.read_checked(order.directory / LIBRARY, order.manifest.files[LIBRARY].sha256)
    weights = read_weights(order.directory, order.manifest)
    arrays = weights.arrays if weights else []
    start(f"uploading {(len(library) + sum(array.nbytes for array in arrays)) / 1e6:.1f} MB")
    trackers.use_threads(remote, order.threads)
    remote.upload(library, LIBRARY)
    device = remote.cpu()
    tensors = [tvm.runtime.tensor(array, device) for array in arrays]
    start("loading the library")
    machine = relax.VirtualMachine(remote.load_module(LIBRARY), device)
    if tensors:
        machine.set_input(LOAD, *tensors)
        machine.invoke_stateful(LOAD)

    zeros = [tvm.runtime.tensor(array, device) for array in order.states]

    def give(batch: Sequence[np.ndarray], states: Sequence[tvm.runtime.Tensor]) -> None:
        machine.set_input("main", *(tvm.runtime.tensor(array, device) for array in batch), *states)

    outputs, states = [], zeros
    for batch in order.batches:
        start("running")
        give(batch, states)
        machine.invoke_stateful("main")
        fields = machine.get_outputs("main")
        count = len(fields) - len(states)
        outputs.append([fields[n].numpy() for n in range(count)])
        states = [fields[n] for n in range(count, len(fields))]

    def timed(repeat: int) -> Sequence[float]:
        return machine.time_evaluator("invoke_stateful", device, number=1, repeat=repeat)("main").results

    start("timing")
    give(order.batches[0], zeros)
    seconds = list(timed(1))
    if order.repeat > 1:
        start("timing", 3 * order.repeat * seconds[0])
        seconds += timed(order.repeat - 1)
    return outputs, seconds
