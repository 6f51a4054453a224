"""Latency of libraries on a board behind an RPC tracker."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.errors import DeviceError, last_line


@dataclass(frozen=True)
class Network:
    """One network.

    Attributes
    ----------
    library : Path
        Its library.
    inputs : sequence of numpy.ndarray
        What its ``main`` is given, in order.
    first : mapping
        Functions that are called once before, with what they are given.
    """

    library: Path
    inputs: Sequence[np.ndarray]
    first: Mapping[str, Sequence[np.ndarray]] = field(default_factory=dict)


_ROUNDS = 5


def time_on_device(
    place: trackers.Place,
    key: str,
    stages: Mapping[str, Sequence[Network]],
    *,
    threads: int,
    wait: float,
    repeats: int = 20,
    max_seconds: float = 30.0,
) -> tuple[dict[str, list[float]], str]:
    """Return the seconds of single inferences of every stage, measured in turns on one board, and its address.

    Parameters
    ----------
    place : Place
        The tracker.
    key : str
        The key of the board there.
    stages : mapping
        The networks of each stage; one inference of a stage runs all of them.
    threads : int
        Threads per inference.
    wait : float
        Seconds to wait for a board.
    repeats : int
        Inferences per turn, in five turns; fewer turns if ``max_seconds`` pass first.

    Raises
    ------
    DeviceError
        If no board comes or it fails.
    """
    session = trackers.connect(place, min(wait, 10.0))
    trackers.wait_for_device(session, key, wait)
    remote = None
    try:
        remote, board = trackers.request(session, key)
        trackers.use_threads(remote, threads)
        timers = {
            name: [_timer(remote, f"{name}-{n}.so", network) for n, network in enumerate(networks)]
            for name, networks in stages.items()
        }
        times: dict[str, list[float]] = {name: [] for name in stages}
        deadline = time.monotonic() + max_seconds
        for turn in range(_ROUNDS):
            if turn and time.monotonic() > deadline:
                break
            for name, evaluate in timers.items():
                parts = [
                    machine.time_evaluator("invoke_stateful", device, number=1, repeat=repeats)("main").results
                    for machine, device in evaluate
                ]
                times[name] += [sum(values) for values in zip(*parts, strict=True)]
    except (OSError, RuntimeError, tvm.error.RPCError) as error:
        raise DeviceError(f"device {key!r} of tracker {place}: measuring failed ({last_line(error)})") from None
    finally:
        if remote is not None:
            trackers.end_session(remote)
    return times, board


def _timer(remote: tvm.rpc.RPCSession, name: str, network: Network) -> tuple[relax.VirtualMachine, tvm.runtime.Device]:
    remote.upload(str(network.library), name)
    device = remote.cpu()
    machine = relax.VirtualMachine(remote.load_module(name), device)
    for function, arrays in network.first.items():
        machine.set_input(function, *(tvm.runtime.tensor(array, device) for array in arrays))
        machine.invoke_stateful(function)
    machine.set_input("main", *(tvm.runtime.tensor(array, device) for array in network.inputs))
    return machine, device
