"""Runs a built network from numpy arrays to numpy arrays, with as little Python as possible."""

from __future__ import annotations

import math
import os
import threading
import weakref
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.deploy import threads
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.samples import in_a_row

# The function of a library without weights that is given them; see `apart`.
LOAD = "nnfuze_weights"

# What an array's own indexing calls after it has asked for the length: half the time.
_item = tvm.get_global_func("ffi.ArrayGetItem")


@dataclass(frozen=True)
class Input:
    """A network input: its name, shape and dtype."""

    name: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True)
class Output:
    """A network output: the task it belongs to, its name, shape, dtype, and the number of classes if it has such."""

    task: str
    name: str
    shape: tuple[int, ...]
    dtype: str
    classes: int | None = None


class Signature(NamedTuple):
    """What a network takes and gives, in order.

    Attributes
    ----------
    inputs, outputs : list of Input, Output
        What a caller gives and gets.
    states : list of Input
        What it takes behind the inputs, and what its last outputs were at the call before; zeros at first.
    """

    inputs: list[Input]
    outputs: list[Output]
    states: list[Input]


def signature(mod: tvm.IRModule) -> Signature:
    """Return what ``main`` of a merged module takes and gives."""
    main = mod["main"]
    taken = [Input(p.name, ir.static_shape(p), str(p.ty.dtype)) for p in main.params]
    kept = len(ir.states(mod))
    inputs, states = taken[: len(taken) - kept], taken[len(taken) - kept :]
    fields = main.ty.ret.fields
    outputs = []
    for owner, field in zip(ir.task_outputs(mod), fields, strict=True):
        shape = tuple(int(dim) for dim in field.shape.values)
        outputs.append(Output(owner.task, owner.name, shape, str(field.dtype), _classes(shape, inputs)))
    return Signature(inputs, outputs[: len(outputs) - kept], states)


def _classes(shape: tuple[int, ...], inputs: Sequence[Input]) -> int | None:
    """Return the number of classes, if the shape is that of scores: ``[batch, classes]``, ones aside."""
    significant = [dim for dim in shape[1:] if dim != 1]
    # As many numbers out as in: an autoencoder or a filter.
    if len(significant) != 1 or any(math.prod(i.shape) == math.prod(shape) for i in inputs):
        return None
    return significant[0]


def made_up(inputs: Sequence[Input]) -> dict[str, np.ndarray]:
    """Return one batch of made-up data, the same every time."""
    rng = np.random.default_rng(0)
    return {
        i.name: rng.standard_normal(i.shape).astype(i.dtype)
        if np.issubdtype(np.dtype(i.dtype), np.floating)
        else np.zeros(i.shape, i.dtype)
        for i in inputs
    }


def places(outputs: Sequence[Output]) -> list[tuple[str, str | None]]:
    """Return where each output goes in an answer: its task, and its name if the task has several outputs."""
    count = Counter(o.task for o in outputs)
    return [(o.task, None if count[o.task] == 1 else o.name) for o in outputs]


_runners: weakref.WeakSet[Runner] = weakref.WeakSet()


def _unlock() -> None:
    """Let a forked process use what another thread was using."""
    for runner in _runners:
        runner._lock = threading.Lock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_unlock)


class Runner:
    """A built network that maps ``{input name: array}`` to ``{task: array}``.

    Parameters
    ----------
    library : tvm.runtime.Module or tvm.relax.VMExecutable
        The executable, built here or loaded from a library.
    inputs, outputs, states : sequence of Input, Output, Input
        The signature of ``main``.
    threads : int
        How many threads a call may use.
    tensors : sequence of tvm.runtime.Tensor
        The weights of a library that has none inside; see `apart`.

    Notes
    -----
    What one call leaves to the next is not copied. Inputs are copied into buffers aligned as the kernels expect;
    outputs are the caller's, valid after the next call.
    A call takes a lock: use one runner per thread for calls that shall overlap.
    """

    def __init__(
        self,
        library: tvm.runtime.Module | relax.VMExecutable,
        inputs: Sequence[Input],
        outputs: Sequence[Output],
        states: Sequence[Input] = (),
        threads: int = 1,
        tensors: Sequence[tvm.runtime.Tensor] = (),
    ) -> None:
        if threads < 1:
            raise InputError(f"threads: {threads} given; use 1 or more")
        self.library = library.jit() if isinstance(library, relax.VMExecutable) else library
        self.inputs = list(inputs)
        self.outputs = list(outputs)
        self.states = list(states)
        self.tasks = list(dict.fromkeys(o.task for o in outputs))
        self.threads = threads
        self._vm = relax.VirtualMachine(self.library, tvm.cpu())
        if tensors:
            self._vm[LOAD](*tensors)
        self._main = self._vm["main"]
        self._buffers = [tvm.runtime.empty(i.shape, i.dtype) for i in self.inputs]
        views = [np.from_dlpack(buffer) for buffer in self._buffers]
        self._slots = [(i.name, i.shape, np.dtype(i.dtype), view) for i, view in zip(self.inputs, views, strict=True)]
        self._lock = threading.Lock()
        _runners.add(self)
        self._fields = [(n, *place) for n, place in enumerate(places(outputs))]
        # The first call's outputs until the second call, and then per output whether every call makes it anew.
        self._first: list[np.ndarray] = []
        self._fresh: list[bool] = []
        # Without states, outputs are the caller's if every call makes all of them anew.
        self._all_fresh = False
        self._numbers = range(len(self._fields))
        self._states = self.first_states()

    def stream(self) -> Stream:
        """Return a stream of calls with states of its own, zeros at first."""
        return Stream(self)

    def reset(self) -> None:
        """Begin anew: the states of `run` become zeros."""
        self._states = self.first_states()

    def first_states(self) -> list[tvm.runtime.Tensor]:
        """Return the states before the first call: zeros."""
        return [_tensor(np.zeros(s.shape, s.dtype)) for s in self.states]

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
        """Run all tasks once; what a call leaves is what the next one begins with.

        Parameters
        ----------
        inputs : mapping of str to numpy.ndarray
            One array per input, of exactly the input's shape and dtype.

        Returns
        -------
        dict
            Per task its output array; a dict of output name to array where a task has several outputs.

        Raises
        ------
        InputError
            If a name, a shape or a dtype isn't the network's.
        """
        return self.named(self.call(inputs, self._states))

    def named(self, arrays: Sequence[np.ndarray]) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
        """Return outputs in order as `run` does."""
        result: dict = {}
        for n, task, name in self._fields:
            array = arrays[n]
            if name is None:
                result[task] = array
            else:
                result.setdefault(task, {})[name] = array
        return result

    def call(self, inputs: Mapping[str, np.ndarray], states: list[tvm.runtime.Tensor]) -> list[np.ndarray]:
        """Run once; return the outputs in order, and put the next states in the place of those given."""
        with self._lock:
            self.set_inputs(inputs)
            return self._call(states)

    def set_inputs(self, inputs: Mapping[str, np.ndarray]) -> None:
        """Check the inputs and copy them into the network's buffers."""
        if not isinstance(inputs, dict) or len(inputs) != len(self._slots):
            self._complain(inputs)
        for name, shape, dtype, view in self._slots:
            array = inputs.get(name)
            if isinstance(array, np.ndarray) and array.shape == shape and array.dtype == dtype:
                view[...] = array
            elif isinstance(array, np.ndarray) and not shape and array.shape == (1,) and array.dtype == dtype:
                # NumPy's ascontiguousarray makes this of a single number.
                view[...] = array[0]
            else:
                self._complain(inputs)

    def invoke(self, states: Sequence[tvm.runtime.Tensor] = ()) -> Sequence[tvm.runtime.Tensor]:
        """Run on the inputs set last; the tensors returned are owned by the network, the states' next values last."""
        if threads.configured() != self.threads:
            if threads.lost():
                return threads.elsewhere(partial(self.invoke, states))
            threads.use_threads(self.threads)
        return self._main(*self._buffers, *states)

    def _call(self, states: list[tvm.runtime.Tensor]) -> list[np.ndarray]:
        """Return one call's outputs, copied unless the call made them: inputs and constants can be outputs, too."""
        fields = self.invoke(states)
        if self._all_fresh:
            return [np.from_dlpack(_item(fields, n)) for n in self._numbers]
        count = len(self._fields)
        arrays = [np.from_dlpack(_item(fields, n)) for n in range(count)]
        following = [_item(fields, count + n) for n in range(len(states))] if states else []
        if self._fresh:
            if states:
                own = zip(following, self._fresh[count:], strict=True)
                states[:] = [tensor if fresh else _copy(tensor) for tensor, fresh in own]
            return [array if fresh else array.copy() for array, fresh in zip(arrays, self._fresh, strict=False)]
        both = [*arrays, *map(np.from_dlpack, following)]
        if self._first:
            # What two calls have at one address while both are alive, or two outputs of one call, is nobody's own.
            addresses = [array.ctypes.data for array in both]
            pairs = zip(addresses, self._first, strict=True)
            self._fresh = [now != first.ctypes.data and addresses.count(now) == 1 for now, first in pairs]
            self._all_fresh = all(self._fresh) and not states
        self._first = [] if self._first else both
        states[:] = map(_copy, following)
        return [array.copy() for array in arrays]

    def _complain(self, inputs: Mapping[str, np.ndarray]) -> None:
        wanted = ", ".join(i.name for i in self.inputs)
        if not isinstance(inputs, Mapping):
            example = f"{{{self.inputs[0].name!r}: array}}" if self.inputs else "{}"
            raise InputError(f"inputs: a {type(inputs).__name__}; give arrays by name: {example}")
        for name in inputs:
            if all(name != i.name for i in self.inputs):
                raise InputError(f"input {name!r}: the network has no such input; it takes {wanted}")
        for i in self.inputs:
            if i.name not in inputs:
                raise InputError(f"input {i.name!r}: missing; the network takes {wanted}")
            array = inputs[i.name]
            if not isinstance(array, np.ndarray):
                raise InputError(f"input {i.name!r}: a {type(array).__name__}; give a numpy array")
            if array.shape != i.shape:
                raise InputError(f"input {i.name!r}: shape {list(array.shape)}; the network takes {list(i.shape)}")
            if array.dtype != np.dtype(i.dtype):
                raise InputError(f"input {i.name!r}: dtype {array.dtype}; the network takes {i.dtype}")


class Stream:
    """Calls of a network that follow each other: each begins with what the one before left.

    Parameters
    ----------
    runner : Runner
        The network. Streams of one network take turns; they know nothing of each other.
    """

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self._states = runner.first_states()

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
        """Run all tasks once; see `Runner.run`."""
        return self._runner.named(self._runner.call(inputs, self._states))

    def step(self, inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Run all tasks once and return the outputs in order."""
        return self._runner.call(inputs, self._states)

    def reset(self) -> None:
        """Begin anew, with zeros."""
        self._states = self._runner.first_states()


def _tensor(array: np.ndarray) -> tvm.runtime.Tensor:
    # Numbers without axes stay such.
    tensor = tvm.runtime.empty(array.shape, str(array.dtype))
    np.from_dlpack(tensor)[...] = array
    return tensor


def _copy(tensor: tvm.runtime.Tensor) -> tvm.runtime.Tensor:
    return _tensor(np.from_dlpack(tensor))


def sample_batches(
    arrays: Mapping[str, np.ndarray], inputs: Sequence[Input], what: str = "evaluation data"
) -> list[dict[str, np.ndarray]]:
    """Return samples, ``[N, …]`` (``[N]`` of numbers) or by inference, cut into the network's batches.

    What fills no batch is left out. Errors call the arrays ``what``.

    Raises
    ------
    InputError
        If an input is missing, or shape or dtype don't fit, or there is not one full batch.
    """
    counts = {}
    arrays = {**arrays, **{i.name: in_a_row(arrays[i.name], i.shape) for i in inputs if i.name in arrays}}
    for i in inputs:
        if i.name not in arrays:
            raise InputError(f"{what}: no array for input {i.name!r}; it has {', '.join(arrays) or 'none'}")
        array = arrays[i.name]
        if array.dtype != np.dtype(i.dtype):
            raise InputError(f"{what}: {i.name!r} is {array.dtype}; the network takes {i.dtype}")
        if array.ndim != max(len(i.shape), 1) or array.shape[1:] != i.shape[1:]:
            wanted = ", ".join(["N", *map(str, i.shape[1:])])
            raise InputError(f"{what}: {i.name!r} has shape {list(array.shape)}; use [{wanted}]")
        counts[i.name] = len(array) // _batch(i)
    if min(counts.values()) < 1 or len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {len(arrays[name])}" for name in counts)
        raise InputError(f"{what}: inputs need equally many samples, at least one batch ({found})")
    return [
        {
            i.name: np.array(arrays[i.name][n * _batch(i) : (n + 1) * _batch(i)], order="C").reshape(i.shape)
            for i in inputs
        }
        for n in range(next(iter(counts.values())))
    ]


def _batch(one: Input) -> int:
    """Return how many samples one call takes: one of an input that is a number."""
    return one.shape[0] if one.shape else 1
