"""How fast a built network is and how well it answers."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import tvm

from nnfuze_tvm.deploy.runner import Output
from nnfuze_tvm.errors import InputError

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Latency:
    """Wall time of one call, in seconds, over ``repeats`` calls."""

    median: float
    p95: float
    repeats: int

    @property
    def throughput(self) -> float:
        """Calls per second."""
        return 1.0 / self.median


@dataclass(frozen=True)
class Quality:
    """How well one output answers.

    Attributes
    ----------
    accuracy : float or None
        Fraction of the labelled samples whose largest score is the label's.
    labelled : int
        Number of labelled samples.
    agreement : float or None
        Fraction of the samples with the same largest score as the original network.
    error : float or None
        Root mean square of the difference from the original network's output, relative to that output's.
    """

    accuracy: float | None = None
    labelled: int = 0
    agreement: float | None = None
    error: float | None = None


def measure(call: Callable[[], object], repeats: int = 200, max_seconds: float = 5.0) -> Latency:
    """Return the latency of ``call`` after a warm-up."""
    return measure_interleaved({"call": call}, repeats, max_seconds)["call"]


def measure_interleaved(
    calls: Mapping[str, Callable[[], object]], repeats: int = 200, max_seconds: float = 4.0
) -> dict[str, Latency]:
    """Return the latency of several calls, measured in turns so that a drifting machine is fair to all.

    Parameters
    ----------
    calls : mapping of str to callable
        What to measure, by name.
    repeats : int
        Calls of each, fewer (but at least three) if ``max_seconds`` pass first.
    max_seconds : float
        Time for all of it, the warm-up excluded.
    """
    if repeats < 1:
        raise InputError(f"repeats: {repeats} given; use 1 or more")
    for call in calls.values():
        started = time.perf_counter()
        for _ in range(10):
            call()
            if time.perf_counter() - started > 0.3:
                break
    times: dict[str, list[float]] = {name: [] for name in calls}
    collecting = gc.isenabled()
    gc.disable()
    try:
        deadline = time.perf_counter() + max_seconds
        for turn in range(repeats):
            if turn >= 3 and time.perf_counter() > deadline:
                break
            for name, call in calls.items():
                call()  # the first call after another network's finds cold caches
                started = time.perf_counter()
                call()
                times[name].append(time.perf_counter() - started)
    finally:
        if collecting:
            gc.enable()
    return {
        name: Latency(float(np.median(values)), float(np.percentile(values, 95)), len(values))
        for name, values in times.items()
    }


def kernel_times(
    library: tvm.runtime.Module,
    kernels: Iterable[tuple[str, Sequence[tuple[Sequence[int], str]]]],
    device: tvm.runtime.Device | None = None,
    *,
    seconds_each: float = 0.02,
) -> dict[str, float]:
    """Return the seconds of one call of each kernel, each timed alone on made-up data, warm caches.

    Parameters
    ----------
    library : tvm.runtime.Module
        The executable, built here or loaded.
    kernels : iterable of (str, sequence of (shape, dtype))
        Name and arguments per kernel.
    device : tvm.runtime.Device, optional
        Where the library is loaded; by default this CPU.
    seconds_each : float
        Roughly how long to measure each.
    """
    rng = np.random.default_rng(0)
    device = device or tvm.cpu()
    times = {}
    for name, arguments in kernels:
        module = next((m for m in [library, *library.imports] if _implements(m, name)), None)
        if module is None:
            continue
        data = [tvm.runtime.tensor(_made_up(rng, tuple(shape), dtype), device) for shape, dtype in arguments]
        once = min(module.time_evaluator(name, device, number=1, repeat=5)(*data).results)
        # Many short turns: their median forgets those in which other processes had the CPU.
        number = max(1, int(1e-4 / max(once, 1e-8)))
        repeat = min(200, max(5, int(seconds_each / max(number * once, 1e-8))))
        turns = module.time_evaluator(name, device, number=number, repeat=repeat)(*data).results
        times[name] = float(np.median(turns))
    return times


def _implements(module: tvm.runtime.Module, name: str) -> bool:
    return bool(module.implements_function(name))


def _made_up(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    if np.issubdtype(np.dtype(dtype), np.floating):
        return rng.standard_normal(shape).astype(dtype)
    # Wider integers may be indices.
    low, high = {"int8": (-127, 128), "uint8": (0, 128)}.get(dtype, (0, 2))
    return rng.integers(low, high, shape).astype(dtype)


def answers(
    step: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]], batches: Iterable[Mapping[str, np.ndarray]]
) -> list[np.ndarray]:
    """Return what a network's outputs are for all batches, one after the other, joined along the leading axis."""
    collected = [list(map(np.atleast_1d, step(batch))) for batch in batches]
    return [np.concatenate(values) for values in zip(*collected, strict=True)]


def quality(output: Output, answer: np.ndarray, reference: np.ndarray | None, labels: np.ndarray | None) -> Quality:
    """Return how well an output's answers fit the labels and the original network's answers.

    Parameters
    ----------
    output : Output
        The output; what has no classes gets an error only.
    answer, reference : numpy.ndarray
        Outputs ``[N, …]`` of this network and of the original one.
    labels : numpy.ndarray, optional
        Class per sample, ``[N]``; -1: the sample has no label for this task.
    """
    accuracy = agreement = error = None
    labelled = 0
    if output.classes is not None:
        top = answer.reshape(len(answer), -1).argmax(axis=1)
        if labels is not None:
            labels = labels[: len(top)]
            counted = labels >= 0
            labelled = int(counted.sum())
            accuracy = float((top == labels)[counted].mean()) if labelled else None
        if reference is not None:
            agreement = float((top == reference.reshape(len(reference), -1).argmax(axis=1)).mean())
    if reference is not None:
        error = relative_error(reference, answer)
    return Quality(accuracy, labelled, agreement, error)


def relative_error(reference: np.ndarray, answer: np.ndarray) -> float:
    """Return the root mean square of ``answer - reference``, relative to that of ``reference``."""
    exact = reference.astype(np.float64)
    difference = float(np.linalg.norm(exact - answer.astype(np.float64)))
    scale = float(np.linalg.norm(exact))
    return difference / scale if scale else difference


def labels_of(
    arrays: Mapping[str, np.ndarray], outputs: Sequence[Output], samples: int, what: str = "evaluation data"
) -> Arrays:
    """Return the labels that evaluation data holds under the tasks' names.

    Parameters
    ----------
    arrays : mapping of str to numpy.ndarray
        What it holds.
    outputs : sequence of Output
        The networks' outputs.
    samples : int
        How many samples it has.
    what : str
        What holds them, for messages.

    Raises
    ------
    InputError
        If labels aren't an integer per sample, or name a class that the task doesn't have.
    """
    found = {}
    for output in outputs:
        if output.task not in arrays or output.task in found:
            continue
        labels = arrays[output.task]
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise InputError(
                f"{what}: labels of {output.task!r} are {labels.dtype} {list(labels.shape)}; "
                "use integers [N], -1 where a sample has none"
            )
        if len(labels) != samples:
            raise InputError(f"{what}: {len(labels)} labels of {output.task!r} for {samples} samples")
        if labels.size and labels.min() < -1:
            raise InputError(f"{what}: label {labels.min()} of {output.task!r}; use -1 where there is none")
        if output.classes is not None and labels.size and labels.max() >= output.classes:
            raise InputError(f"{what}: label {labels.max()} of {output.task!r}; it has {output.classes} classes")
        found[output.task] = labels
    return found
