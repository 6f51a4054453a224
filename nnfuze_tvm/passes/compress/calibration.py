"""Calibration data, and what the float network makes of it: the range of every tensor that gets quantized."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate, ir, ops
from nnfuze_tvm.graph.dataflow import Value, bindings, operands, returning, with_kernels_of
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.samples import in_a_row
from nnfuze_tvm.graph.wiring import stream
from nnfuze_tvm.passes.compress.magnitudes import CalibrationMethod, Magnitudes
from nnfuze_tvm.reading.arrays import read_npz

_Kind = TypeVar("_Kind")


def load_calibration(
    source: str | os.PathLike[str] | Mapping[str, np.ndarray],
    mod: tvm.IRModule,
    executor: Executor = evaluate.executor,
    what: str = "calibration data",
) -> dict[str, np.ndarray]:
    """Return checked calibration samples for the inputs of a network.

    Parameters
    ----------
    source : path of an ``.npz`` file, or mapping
        One array per network input, by its name: ``[N, ...]``, N a multiple of the network's batch; ``[N]`` for an
        input that is one number.
    mod : tvm.IRModule
        The network.
    executor : callable
        Runs the network where it has states and the samples don't give them: then they follow each other, and a state
        is what the sample before left.
    what : str
        What a mapping is called in messages.

    Raises
    ------
    InputError
        If the file can't be read, or an array is missing, unknown, empty, of the wrong shape or type, not
        finite, or of another number of samples than the others.
    """
    if isinstance(source, Mapping):
        label, arrays = what, {str(k): np.asarray(v) for k, v in source.items()}
    else:
        label, arrays = str(source), _read(Path(source))
    params = {p.name: p for _, func in _relax_functions(mod) for p in func.params}
    states = [name for name in ir.states(mod) if name not in arrays]
    wanted = {name: param for name, param in params.items() if name not in states}
    for name in arrays:
        if name not in wanted:
            known = ", ".join(wanted)
            raise InputError(f"{label}: array {name!r} is no input of the network; its inputs are: {known}")
    for name in wanted:
        if name not in arrays:
            raise InputError(f"{label}: no array for input {name!r}; it holds: {', '.join(arrays) or 'nothing'}")
    checked = {}
    for name, param in wanted.items():
        checked[name] = _checked(f"{label}: array {name!r}", arrays[name], param)
    counts = {name: len(array) // _batch(static_shape(wanted[name])) for name, array in checked.items()}
    if len(set(counts.values())) > 1:
        listed = ", ".join(f"{name!r}: {count}" for name, count in counts.items())
        raise InputError(f"{label}: the arrays have different numbers of network batches ({listed})")
    if states and states != ir.states(mod):
        raise InputError(f"{label}: give all states or none; there is none of {', '.join(states)}")
    return {**checked, **_recorded(checked, mod, executor)} if states else checked


def _recorded(samples: Mapping[str, np.ndarray], mod: tvm.IRModule, executor: Executor) -> dict[str, np.ndarray]:
    """Return the states that samples leave to each other."""
    main = mod["main"]
    zeros = {p.name: np.zeros(static_shape(p), str(p.ty.dtype)) for p in main.params if p.name in ir.states(mod)}
    taken: dict[str, list[np.ndarray]] = {name: [] for name in zeros}
    calls = list(batches(samples, [p for p in main.params if p.name not in zeros]))
    for given, _ in stream(zeros, executor(mod, len(calls)), calls):
        for name, values in taken.items():
            values.append(np.atleast_1d(given[name]))
    return {name: np.concatenate(values) for name, values in taken.items()}


def _read(path: Path) -> dict[str, np.ndarray]:
    try:
        return read_npz(path)
    except OSError as error:
        raise InputError(f"{path}: can't read calibration data: {error.strerror or error}") from None
    except ValueError as error:
        raise InputError(f"{path}: {error}") from None


def _checked(label: str, array: np.ndarray, param: relax.Var) -> np.ndarray:
    shape, dtype = static_shape(param), np.dtype(str(param.ty.dtype))
    batch = _batch(shape)
    array = in_a_row(array, shape)
    expected = "[N" + "".join(f", {dim}" for dim in shape[1:]) + "]"
    if array.shape[1:] != shape[1:] or array.ndim != max(len(shape), 1):
        raise InputError(f"{label} has shape {list(array.shape)}; expected {expected}")
    if array.shape[0] == 0:
        raise InputError(f"{label} is empty; expected {expected} with at least {batch} sample(s)")
    if array.shape[0] % batch:
        raise InputError(f"{label} has {len(array)} samples; expected a multiple of the batch, {batch}")
    if array.dtype.kind != dtype.kind:
        raise InputError(f"{label} has type {array.dtype}; expected {dtype}")
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise InputError(f"{label} holds NaN or infinity; expected finite numbers")
    return np.asarray(array, dtype=dtype, order="C")


def batches(samples: Mapping[str, np.ndarray], params: Sequence[relax.Var]) -> Iterator[dict[str, np.ndarray]]:
    """Split samples into the inputs of one inference each."""
    shapes = {param.name: static_shape(param) for param in params}
    count = min((len(samples[name]) // _batch(shape) for name, shape in shapes.items()), default=0)
    for k in range(count):
        yield {
            name: samples[name][k * _batch(shape) : (k + 1) * _batch(shape)].reshape(shape)
            for name, shape in shapes.items()
        }


def observed(
    mod: tvm.IRModule,
    func: relax.Function,
    samples: Mapping[str, np.ndarray],
    executor: Executor,
    most: int,
) -> Iterator[list[np.ndarray]]:
    """Yield what a function of ``mod`` returns, inference by inference, ``most`` at most.

    Raises
    ------
    InputError
        If that is not finite.
    """
    inferences = list(islice(batches(samples, func.params), most))
    run = executor(with_kernels_of(mod, func), len(inferences))
    for batch in inferences:
        values = run(batch)
        if not all(np.isfinite(each).all() for each in values):
            raise InputError("calibration data: the network makes NaN or infinity of it")
        yield values


def spread(inferences: Sequence[_Kind], count: int) -> list[_Kind]:
    """Return so many inferences, evenly spread over those that there are; all where there are no more."""
    count = min(count, len(inferences))
    return [inferences[n * len(inferences) // count] for n in range(count)]


def _batch(shape: tuple[int, ...]) -> int:
    """Return how many samples one inference takes."""
    return shape[0] if shape else 1


@dataclass
class _Moments:
    """Of samples of about one size: how many; per channel the sums of their means and mean squares, and the peaks."""

    samples: int = 0
    means: np.ndarray = field(default_factory=lambda: np.zeros(1))
    powers: np.ndarray = field(default_factory=lambda: np.zeros(1))
    peaks: np.ndarray = field(default_factory=lambda: np.zeros(1))


@dataclass
class Range:
    """What was seen of one tensor, in constant memory however many samples there are.

    Attributes
    ----------
    channel_axis
        Which axis of the tensor holds the channels.
    low, high
        Smallest and largest value.
    count
        How many values of each channel were seen.
    magnitudes
        All its absolute values.
    """

    channel_axis: int = 0
    low: float = np.inf
    high: float = -np.inf
    count: int = 0
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    _moments: dict[int, _Moments] = field(default_factory=dict)

    def observe(self, values: np.ndarray) -> None:
        """Add one array of the tensor's values."""
        self.low = min(self.low, float(values.min()))
        self.high = max(self.high, float(values.max()))
        others = tuple(axis for axis in range(values.ndim) if axis != self.channel_axis)
        means = values.mean(others, dtype="float64")
        magnitudes = np.abs(values)
        own = self._moments.setdefault(self.magnitudes.add(magnitudes), _Moments())
        own.samples += 1
        own.means = own.means + means
        own.powers = own.powers + np.square(values, dtype="float64").mean(others)
        own.peaks = np.maximum(own.peaks, magnitudes.max(others))
        self.count += values.size // means.size

    def _usual(self) -> list[_Moments]:
        """Return the moments of all samples but those like no other."""
        return [moments for octave, moments in self._moments.items() if self.magnitudes.is_usual(octave)]

    @property
    def mean(self) -> np.ndarray:
        """Mean per channel."""
        return np.asarray(sum(each.means for each in self._usual()) / sum(each.samples for each in self._usual()))

    @property
    def powers(self) -> np.ndarray:
        """Mean square per channel."""
        return np.asarray(sum(each.powers for each in self._usual()) / sum(each.samples for each in self._usual()))

    @property
    def peaks(self) -> np.ndarray:
        """Largest absolute value per channel."""
        return np.max([each.peaks for each in self._usual()], 0)

    @property
    def largest(self) -> float:
        """Largest absolute value."""
        return max(abs(self.low), abs(self.high))

    def limit(self, method: CalibrationMethod, levels: int = 127) -> float:
        """Return the absolute value that becomes the largest code."""
        return self.largest if method == "minmax" else min(self.magnitudes.limit(method, levels), self.largest)

    def error(self, scale: float, levels: int = 127) -> float:
        """Return the error of 8 bits of a scale on what was seen, as a part of its standard deviation.

        It is that of `Magnitudes.error`. What hardly varies has none: an input that is always the same is no reason.
        """
        power = float(self.powers.mean())
        variance = power - float(self.mean.mean()) ** 2
        return 0.0 if variance <= power / 2048 else self.magnitudes.error(scale, levels) / float(np.sqrt(variance))


def collect_ranges(
    mod: tvm.IRModule,
    func: relax.Function,
    tensors: Mapping[Value, int],
    samples: Mapping[str, np.ndarray],
    executor: Executor = evaluate.executor,
) -> dict[Value, Range]:
    """Run a float function over samples and return what was seen of some of its tensors.

    Parameters
    ----------
    mod
        The module of the function.
    func
        The float function.
    tensors
        Vars bound in it, or parameters, each with its channel axis.
    samples
        Checked samples, see :func:`load_calibration`.
    executor
        Runs the function; by default with NumPy.

    Raises
    ------
    InputError
        If the samples lead to values that are not finite.
    """
    ranges = {tensor: Range(axis) for tensor, axis in tensors.items()}
    inner = [tensor for tensor in ranges if tensor not in set(func.params)]
    inferences = list(batches(samples, func.params))
    run = executor(with_kernels_of(mod, returning(func, inner)), len(inferences)) if inner else None
    for batch in inferences:
        for param in func.params:
            if param in ranges:
                ranges[param].observe(batch[param.name])
        if run is not None:
            for tensor, values in zip(inner, run(batch), strict=True):
                if not np.isfinite(values).all():
                    raise InputError(f"calibration data: the samples make {_reader(func, tensor)} infinite or NaN")
                ranges[tensor].observe(values)
    return ranges


def _reader(func: relax.Function, tensor: Value) -> str:
    """Return what a user can find a tensor by: the layer that reads it."""
    readers = [b.var.name for b in bindings(func) if ops.is_layer(b.value) and tensor in set(operands(b.value))]
    return f"the input of {readers[0]!r}" if readers else f"{tensor.name!r}"


def _relax_functions(mod: tvm.IRModule) -> list[tuple[tvm.ir.GlobalVar, relax.Function]]:
    return [(gvar, func) for gvar, func in mod.functions_items() if isinstance(func, relax.Function)]
