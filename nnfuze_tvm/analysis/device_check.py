"""Whether a board is what its key says: its CPU's features, and what two kernels compute on it and how fast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import tvm
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm.analysis import roofline
from nnfuze_tvm.deploy.bundle import unfit
from nnfuze_tvm.deploy.manifest import CPU_FLAGS, describe_target
from nnfuze_tvm.devices import cpu, targets
from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.errors import DeviceError, last_line

_SESSION_SECONDS = 120.0


@dataclass(frozen=True)
class KernelCheck:
    """One kernel on one core of a board.

    Attributes
    ----------
    error : float
        The largest difference from what NumPy computes, relative to the largest result.
    rate : float
        Operations per second; a multiply-add is two.
    expected : float, optional
        The most that such a CPU does, by the catalogue.
    """

    error: float
    rate: float
    expected: float | None


@dataclass(frozen=True)
class DeviceCheck:
    """What was found on a board.

    Attributes
    ----------
    target : str
        The board or CPU class that it was compared with.
    address : str
        ``host:port``.
    machine : str, optional
        The processor's architecture; None if the board runs TVM's own server, which doesn't say.
    features : tuple of str
        LLVM's names of what the CPU has.
    unused : tuple of str
        Those that code for the target doesn't use.
    kernels : dict of str to KernelCheck
        ``fp32`` and ``int8``; none where the CPU can't run code for the target.
    problem : str, optional
        What is wrong; None if nothing is.
    """

    target: str
    address: str
    machine: str | None
    features: tuple[str, ...]
    unused: tuple[str, ...]
    kernels: dict[str, KernelCheck]
    problem: str | None

    def to_dict(self) -> dict[str, Any]:
        """Return everything, for JSON."""
        return asdict(self)


def check_device(
    place: trackers.Place, key: str, name: str, wait: float, announce: Callable[[str], None]
) -> DeviceCheck:
    """Compare a board with what a target says of it, and run a kernel of each kind on it.

    Parameters
    ----------
    place : Place
        The tracker.
    key : str
        The board's key there.
    name : str
        The target; see `devices.targets.resolve`.
    wait : float
        Seconds to wait for the tracker and for a board to register.
    announce : callable
        Is told what is being done.

    Raises
    ------
    DeviceError
        If the target is unknown, no board comes, or the board drops the connection.
    """
    target = targets.resolve(name)
    record = describe_target(target)
    session = trackers.connect(place, wait)
    trackers.wait_for_device(session, key, wait)
    announce(f"waiting until a {key} is free")
    try:
        remote, board = trackers.request(session, key, _SESSION_SECONDS)
        try:
            found = cpu.of(remote)
            problem = unfit(record, found) if found else None
            kernels = {}
            if problem is None:
                announce(f"running kernels on {board}")
                kernels = _run(remote, target)
        finally:
            trackers.end_session(remote)
    except (OSError, RuntimeError) as error:
        why = last_line(error)
        raise DeviceError(f"device {key!r} of tracker {place}: the check failed ({why})") from None
    # An int8 sum is exact; a float32 one is rounded after each of some thousand steps.
    wrong = [kind for kind, limit in (("int8", 0.0), ("fp32", 1e-4)) if kernels and not kernels[kind].error <= limit]
    if wrong:
        problem = f"the {' and the '.join(wrong)} kernel computed something else than NumPy does"
    flags = CPU_FLAGS.get(record.arch, {})
    features = tuple(sorted(f for f, flag in flags.items() if flag in found.flags)) if found else ()
    unused = tuple(f for f in features if f not in record.features)
    return DeviceCheck(name, board, found.machine if found else None, features, unused, kernels, problem)


def _run(remote: tvm.rpc.RPCSession, target: tvm.target.Target) -> dict[str, KernelCheck]:
    """Run the kernels by which `roofline` measures a core on data that no wrong kernel gets right."""
    expected = roofline.of_board(target)
    mod = roofline.kernels(Hardware.of(target), 1, {})
    with temporary.folder() as scratch:
        path = export_library(tvm.compile(mod, target=target), Path(scratch) / "check.so", target)
        remote.upload(str(path))
    module, device = remote.load_module("check.so"), remote.cpu()
    rng = np.random.default_rng(0)
    found = {}
    for name in ("fp32", "int8"):
        func = mod[name]
        shapes = [tuple(int(dim) for dim in info.shape) for info in ms.arg_info.ArgInfo.from_prim_func(func)]
        arrays, wanted = (_floats if name == "fp32" else _integers)(rng, shapes)
        arguments = [tvm.runtime.tensor(array, device) for array in arrays]
        module[name](*arguments)
        difference = np.abs(arguments[-1].numpy().astype(np.float64) - wanted).max()
        seconds = module.time_evaluator(name, device, number=5, repeat=5)(*arguments).min
        error = float(difference / np.abs(wanted).max())
        found[name] = KernelCheck(error, int(func.attrs["work"]) / seconds, getattr(expected, name, None))
    return found


def _floats(rng: np.random.Generator, shapes: list[tuple[int, ...]]) -> tuple[list[np.ndarray], np.ndarray]:
    factor = rng.uniform(-2e-4, 2e-4, shapes[0]).astype(np.float32)
    sums = rng.uniform(0.5, 1, shapes[1]).astype(np.float32)
    return [factor, sums], sums * (1 + factor.astype(np.float64)) ** roofline.FMA_STEPS


def _integers(rng: np.random.Generator, shapes: list[tuple[int, ...]]) -> tuple[list[np.ndarray], np.ndarray]:
    data = rng.integers(0, 128, shapes[0]).astype(np.uint8)
    weights = rng.integers(-127, 128, shapes[1]).astype(np.int8)
    groups = data.reshape(*shapes[0][:2], -1, 4).astype(np.int64)
    sums = np.einsum("trsb,tscb->trc", groups, weights.astype(np.int64)) * roofline.DOT_REPEATS
    return [data, weights, np.zeros(shapes[2], np.int32)], sums
