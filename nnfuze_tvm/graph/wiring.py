"""How networks hang together: results that are inputs of others, and what is kept from one call to the next."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np

from nnfuze_tvm.graph.views import View

Run = Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]]
"""One network: from its inputs by name to its outputs in order."""


@dataclass(frozen=True)
class Result:
    """An output of a task, by its place."""

    task: str
    place: int


@dataclass(frozen=True)
class Window:
    """The last rows of a result, those of earlier calls included.

    Attributes
    ----------
    result : Result
        What is looked at.
    view : tuple of int
        The shape that a result is brought into.
    axis : int
        Along which axis of it new rows follow older ones.
    length : int
        How many rows a window has.
    state : str
        The input of the merged network that holds the older ones.
    """

    result: Result
    view: tuple[int, ...]
    axis: int
    length: int
    state: str

    @property
    def kept(self) -> tuple[int, ...]:
        """The shape of the older rows."""
        rows = self.length - self.view[self.axis]
        return (*self.view[: self.axis], rows, *self.view[self.axis + 1 :])


Source: TypeAlias = str | View | Result | Window
"""Where an input comes from: an input of the merged network as it is or in another form, a result of this call, or
several calls' results."""


@dataclass(frozen=True)
class State:
    """What one call leaves to the next.

    Attributes
    ----------
    name : str
        The input of the merged network.
    type : tvm.relax.TensorType
        Its type.
    task, output : str
        Whose it is, and what it is called as an output.
    following : Result or Window
        The value for the next call.
    """

    name: str
    type: Any
    task: str
    output: str
    following: Result | Window


@dataclass(frozen=True)
class Wiring:
    """How the networks of a module become one.

    Attributes
    ----------
    tasks : tuple of str
        The tasks, as they were given.
    order : tuple of str
        The same, each after those whose results it reads.
    inputs : dict of str to tvm.relax.TensorType
        The inputs of the merged network that a caller gives, in order.
    states : tuple of State
        Its other inputs, which follow.
    sources : dict
        (task, input) → where it comes from.
    shapes : dict
        (task, input) → shape.
    outputs : tuple of Result
        What the merged network returns, in order; the states' next values follow.
    """

    tasks: tuple[str, ...]
    order: tuple[str, ...]
    inputs: Mapping[str, Any]
    states: tuple[State, ...]
    sources: Mapping[tuple[str, str], Source]
    shapes: Mapping[tuple[str, str], tuple[int, ...]]
    outputs: tuple[Result, ...]

    @property
    def connected(self) -> bool:
        """Whether there is more to it than inputs that are shared or not."""
        return bool(self.states) or any(isinstance(source, Result) for source in self.sources.values())

    def trace(
        self, runs: Mapping[str, Run], given: Mapping[str, np.ndarray]
    ) -> tuple[list[np.ndarray], dict[str, dict[str, np.ndarray]]]:
        """Run the networks one after the other, as they would be without being merged.

        Parameters
        ----------
        runs : mapping
            Every task's network.
        given : mapping of str to numpy.ndarray
            The inputs and the states.

        Returns
        -------
        list, dict
            What the merged network returns, and the inputs of every task.
        """
        results: dict[str, Sequence[np.ndarray]] = {}
        wholes: dict[str, np.ndarray] = {}

        def read(source: Source) -> np.ndarray:
            if isinstance(source, str):
                return given[source]
            if isinstance(source, View):
                return source.of(given[source.name])
            if isinstance(source, Result):
                return np.asarray(results[source.task][source.place])
            if source.state not in wholes:
                newest = read(source.result).reshape(source.view)
                wholes[source.state] = np.concatenate([given[source.state], newest], source.axis)
            return wholes[source.state]

        taken: dict[str, dict[str, np.ndarray]] = {}
        for task in self.order:
            names = [name for owner, name in self.sources if owner == task]
            taken[task] = {name: read(self.sources[task, name]).reshape(self.shapes[task, name]) for name in names}
            results[task] = runs[task](taken[task])
        following = [
            read(state.following)
            if isinstance(state.following, Result)
            else np.take(read(state.following), _last(state.following), state.following.axis)
            for state in self.states
        ]
        return [*map(read, self.outputs), *following], taken

    def taken(self, task: str, given: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the inputs of a task that callers give, without those that are states or other tasks' results."""
        found = {}
        for (owner, name), source in self.sources.items():
            if owner == task and isinstance(source, str) and source in given:
                found[name] = given[source]
            elif owner == task and isinstance(source, View):
                found[name] = source.of(given[source.name])
        return found

    def step(self, runs: Mapping[str, Run], given: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        """Return what the merged network returns; see `trace`."""
        return self.trace(runs, given)[0]

    def zeros(self) -> dict[str, np.ndarray]:
        """Return the states before the first call."""
        return {s.name: np.zeros([int(dim) for dim in s.type.shape], str(s.type.dtype)) for s in self.states}

    def stepper(self, runs: Mapping[str, Run]) -> Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]:
        """Return a function from a call's inputs to its outputs, which keeps the states."""
        states = self.zeros()

        def step(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
            nonlocal states
            values = self.step(runs, {**inputs, **states})
            states = dict(zip(states, values[len(self.outputs) :], strict=True))
            return values[: len(self.outputs)]

        return step


def _last(window: Window) -> range:
    return range(window.view[window.axis], window.length)


def stream(
    states: Mapping[str, np.ndarray],
    step: Callable[[Mapping[str, np.ndarray]], Sequence[np.ndarray]],
    calls: Iterable[Mapping[str, np.ndarray]],
) -> Iterator[tuple[dict[str, np.ndarray], list[np.ndarray]]]:
    """Call a network again and again, with what every call leaves to the next.

    Parameters
    ----------
    states : mapping of str to numpy.ndarray
        The states before the first call, by input.
    step : callable
        The network: from inputs and states to outputs and, behind them, the states' next values.
    calls : iterable of mapping
        The inputs of each call.

    Yields
    ------
    dict, list
        Of each call: inputs and states, and the outputs.
    """
    for inputs in calls:
        given = {**inputs, **states}
        values = list(step(given))
        count = len(values) - len(states)
        states = dict(zip(states, values[count:], strict=True))
        yield given, values[:count]
