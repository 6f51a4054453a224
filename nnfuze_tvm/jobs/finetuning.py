"""Fine-tuning as a step of a compilation: its data, what it shows, and what was learnt kept for the next time."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import tvm

from nnfuze_tvm.analysis import measure
from nnfuze_tvm.deploy.executor import calibration_executor
from nnfuze_tvm.deploy.manifest import package_versions
from nnfuze_tvm.deploy.runner import signature
from nnfuze_tvm.devices import scratch
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.jobs.announce import Announce
from nnfuze_tvm.jobs.directory import JobDirectory
from nnfuze_tvm.jobs.request import WORK_DIR, NetworkRequest
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.compress.method import Method, Training
from nnfuze_tvm.reading.arrays import read_arrays, read_npz
from nnfuze_tvm.report.text import duration
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.distill import Progress
from nnfuze_tvm.training.finetune import learn, with_parameters

# With fewer samples there is none to judge by.
_FEWEST = 4
# Seconds between two lines about a training.
_PAUSE = 10.0


class FineTuning:
    """Trains what methods of compression make of a network to give its answers.

    Parameters
    ----------
    original : tvm.IRModule
        The network, merged and not compressed.
    methods : sequence of Method
        Those that compress it.
    request : NetworkRequest
        What was asked for: the data, how often each sample is seen, and the directory that keeps what was learnt.
    announce : callable
        Is told what is being done.

    Raises
    ------
    InputError
        If there are none, or the data don't fit the network.
    """

    def __init__(
        self, original: tvm.IRModule, methods: Sequence[Method], request: NetworkRequest, announce: Announce
    ) -> None:
        path = request.finetune
        assert path is not None
        if not methods:
            raise InputError(f"--finetune {path}: nothing is compressed; give --prune, --quantize or a --policy")
        self._original, self._announce = original, announce
        self._samples, self._labels = _data(original, path)
        self._schedule = Schedule() if request.epochs is None else Schedule(epochs=request.epochs)
        self._kept = Path(request.work_dir or WORK_DIR) / "finetuned"

    def after(self, mod: tvm.IRModule, method: Method) -> tvm.IRModule:
        """Return a network that a method has compressed, trained."""
        training = method.training
        assert training is not None
        schedule = replace(self._schedule, rate=self._schedule.rate * training.rate)
        directory = JobDirectory(self._kept, "fine-tuning")
        try:
            path = directory.path / f"{self._digest(mod, schedule)}.npz"
            if path.exists():
                self._announce(f"fine-tuning {method.name}: as in {path}")
                return _as_kept(path, mod, training)
            progress = _told(f"fine-tuning {method.name}", self._announce)
            found = learn(mod, self._original, self._samples, schedule, training, self._labels, progress)
            _write(path, found)
            trained = with_parameters(mod, found, training)
            if trained.same_as(mod):
                self._announce(f"fine-tuning {method.name}: no better on samples held back, so it stays as it was")
            return trained
        finally:
            directory.close()

    def _digest(self, mod: tvm.IRModule, schedule: Schedule) -> str:
        """Return what differs where anything does that the training depends on."""
        digest = hashlib.sha256(json.dumps([package_versions(), asdict(schedule)]).encode())
        for each in (self._original, mod):
            digest.update(tvm.ir.save_json(each).encode())
        for arrays in (self._samples, self._labels):
            for name, values in arrays.items():
                digest.update(f"{name} {values.dtype} {values.shape} ".encode() + values.tobytes())
        return digest.hexdigest()[:32]


def _data(original: tvm.IRModule, path: str) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return samples as the network takes them, ``[N, *shape]`` by input, and labels ``[N, batch]`` by task."""
    what = f"fine-tuning data {path}"
    arrays = read_arrays(path, "fine-tuning data")
    inputs, outputs, _ = signature(original)
    names = [param.name for param in original["main"].params]
    given = {name: values for name, values in arrays.items() if name in ir.tasks(original) and name not in names}
    samples = {name: values for name, values in arrays.items() if name not in given}
    checked = load_calibration(samples, original, calibration_executor, what)
    count = max(len(checked[i.name]) for i in inputs)
    labels = measure.labels_of(given, outputs, count, what)
    for task in labels:
        first = next((o for o in outputs if o.task == task and o.dtype.startswith("float")), None)
        if first is None or first.classes is None:
            raise InputError(f"{what}: has labels of {task!r}, whose first output of floats is no row of scores")
    shapes = {param.name: ir.static_shape(param) for param in original["main"].params}
    taken = {name: values.reshape(-1, *shapes[name]) for name, values in checked.items()}
    steps = len(next(iter(taken.values())))
    if steps < _FEWEST:
        raise InputError(f"{what}: holds {steps} samples; give many")
    return taken, {task: values.reshape(steps, -1) for task, values in labels.items()}


def _told(what: str, announce: Announce) -> Progress:
    """Return what tells of steps now and then, and when they will be done."""
    began = said = 0.0

    def progress(step: int, steps: int, loss: float) -> None:
        nonlocal began, said
        now = time.monotonic()
        if step == 1:
            # Before that, PyTorch imports things.
            began = said = now
        elif now - said > _PAUSE and step < steps:
            said = now
            left = (now - began) / (step - 1) * (steps - step)
            announce(f"{what}: {100 * step // steps} %, loss {loss:.4g}, {duration(left)} left")

    announce(what)
    return progress


def _as_kept(path: Path, mod: tvm.IRModule, training: Training) -> tvm.IRModule:
    """Return a network with the parameters of a file."""
    try:
        arrays = read_npz(path)
        if not all(values.dtype.kind == "f" and np.isfinite(values).all() for values in arrays.values()):
            raise ValueError("parameters that are no finite numbers")
        return with_parameters(mod, arrays, training)
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise InputError(f"{path}: {said}; delete it to train again") from None


def _write(path: Path, parameters: Mapping[str, np.ndarray]) -> None:
    """Write a file that is either there, whole, or not."""
    try:
        with scratch.folder(parent=path.parent) as directory:
            file = directory / "parameters.npz"
            np.savez(file, **parameters)  # type: ignore[arg-type]
            os.replace(file, path)
    except OSError as error:
        raise InputError(f"--work-dir {path.parent.parent}: can't be written ({error.strerror or error})") from None
