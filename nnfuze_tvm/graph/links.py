"""From what is said of chains and states to how the networks hang together."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

import tvm
from tvm import relax
from tvm_ffi import structural_equal

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.views import View, forms, shape_of, text_of, views_of, without_ones
from nnfuze_tvm.graph.wiring import Result, Source, State, Window, Wiring

_PRODUCER = re.compile(r"(?P<task>[^:]+):(?P<output>.+?)(\[(?P<window>[0-9]{1,9})\])?")


def wire(
    mod: tvm.IRModule,
    shared: Sequence[str] | None = None,
    chains: Sequence[str] = (),
    states: Sequence[str] = (),
) -> Wiring:
    """Return how the networks of a module hang together.

    Parameters
    ----------
    mod : tvm.IRModule
        One function per task.
    shared : sequence of str, optional
        Names of inputs that are one and the same in all tasks that have them; by default all of equal name, shape and
        dtype are. ``input=task.input,other.input``: inputs of several names and forms, see `views_of`.
    chains : sequence of str
        ``input=task:output``: the input, of all other tasks that have one of this name (or of one: ``task.input``), is
        what another task gives; the output by name or by number. ``input=task:output[16]``: it is the last 16 results,
        one after the other, and zeros before there were as many; as many rows of them as the input takes.
    states : sequence of str
        ``input=output`` or ``task.input=output``: the input is what the task's output was at the call before, and
        zeros at first. Those that files state (`ir.own_states`) come behind them.

    Raises
    ------
    InputError
        If there is no such task, input or output, shapes or dtypes don't fit, an input is fed twice, or tasks need
        each other's results.
    """
    return _Wirer(mod, shared).wire(chains, [*states, *ir.own_states(mod)])


class _Wirer:
    def __init__(self, mod: tvm.IRModule, shared: Sequence[str] | None) -> None:
        said = forms(shared or ())
        self.shared = None if shared is None else [text for text in shared if text not in said]
        self.tasks = ir.tasks(mod)
        self.outputs: dict[str, list[str]] = {task: [] for task in self.tasks}
        for output in ir.task_outputs(mod):
            self.outputs[output.task].append(output.name)
        self.types = {(task, param.name): param.ty for task in self.tasks for param in mod[task].params}
        self.views = self._views(said)
        self.results = {task: [field.ty for field in dataflow.output_fields(mod[task])] for task in self.tasks}
        self.sources: dict[tuple[str, str], Source] = {}
        self.states: list[State] = []
        self.taken: set[str] = set()
        # What feeds others leaves the merged network no more.
        self.inner: set[Result] = set()

    def wire(self, chains: Sequence[str], states: Sequence[str]) -> Wiring:
        fed = [(link, place, False) for link in chains for place in self._consumers(link)]
        fed += [(link, place, True) for link in states for place in self._keepers(link)]
        for link, place, _ in fed:
            if sum(other == place for _, other, _ in fed) > 1:
                raise InputError(f"{link}: input {place[1]!r} of task {place[0]!r} is fed twice; leave one of them out")
        inputs = self._inputs({place for _, place, _ in fed})
        for link, place, kept in fed:
            if kept:
                self._keep(link, place)
            else:
                self._chain(link, place)
        order = self._order(chains)
        results = [Result(task, n) for task in self.tasks for n in range(len(self.outputs[task]))]
        outputs = tuple(result for result in results if result not in self.inner)
        if not outputs:
            raise InputError("all outputs are fed back or feed others; at least one has to leave the network")
        sources = {place: self.sources[place] for place in self.types}
        shapes = {place: shape_of(ty) for place, ty in self.types.items()}
        return Wiring(tuple(self.tasks), order, inputs, tuple(self.states), sources, shapes, outputs)

    def _views(self, said: Sequence[str]) -> dict[tuple[str, str], tuple[str, View | None]]:
        """Return which inputs are forms of which, and what forms."""
        found: dict[tuple[str, str], tuple[str, View | None]] = {}
        named: list[str] = []
        for text in said:
            name, places = views_of(text, self.types)
            if name in named or {*places} & {*found}:
                raise InputError(f"shared input {text}: it or one of its inputs is said to be another one, too")
            named.append(name)
            found |= {place: (name, view) for place, view in places.items()}
        return found

    def _inputs(self, fed: set[tuple[str, str]]) -> dict[str, Any]:
        """Name the inputs that a caller gives: equal ones once."""
        for name in self.shared or ():
            if all(other != name for _, other in self.types):
                known = ", ".join(dict.fromkeys(other for _, other in self.types))
                raise InputError(f"shared input {name!r}: no task has it (there are: {known})")
        inputs: dict[str, Any] = {}
        groups = self._groups(fed)
        names = {self.views[group[0]][0] for group in groups if group[0] in self.views}
        owners: dict[str, list[list[tuple[str, str]]]] = {}
        for group in groups:
            owners.setdefault(group[0][1], []).append(group)
        for group in groups:
            task, name = group[0]
            if group[0] in self.views:
                called = self._unique(self.views[group[0]][0])
                self.sources |= {place: view or called for place in group for _, view in [self.views[place]]}
            else:
                same = owners[name]
                several = [other for other in same if len(other) > 1]
                alone = (len(same) == 1 or several == [group]) and name not in names
                called = self._unique(name if alone else f"{task}.{name}")
                self.sources |= dict.fromkeys(group, called)
            inputs[called] = self.types[group[0]]
        return inputs

    def _groups(self, fed: set[tuple[str, str]]) -> list[list[tuple[str, str]]]:
        """Return the inputs that nothing feeds, those together that are one."""
        groups: list[list[tuple[str, str]]] = []
        for place, ty in self.types.items():
            if place in self.views:
                if place in fed:
                    raise InputError(f"input {place[1]!r} of task {place[0]!r} is fed twice; leave one of them out")
                # The first that was named says what the input is like, and stands first.
                own = [other for other, (name, _) in self.views.items() if name == self.views[place][0]]
                if own not in groups:
                    groups.append(own)
                continue
            if place in fed:
                continue
            name = place[1]
            if self.shared is None:
                found = [g for g in groups if g[0][1] == name and structural_equal(self.types[g[0]], ty)]
            else:
                found = [g for g in groups if g[0][1] == name] if name in self.shared else []
            found = [g for g in found if g[0] not in self.views]
            if not found:
                groups.append([place])
                continue
            (group,) = found
            if not structural_equal(self.types[group[0]], ty):
                text = ", ".join(f"{self.types[p]} in {p[0]}" for p in (group[0], place))
                raise InputError(f"shared input {name!r} differs: {text}")
            group.append(place)
        return groups

    def _unique(self, name: str) -> str:
        called, count = name, 0
        while called in self.taken:
            count += 1
            called = f"{name}_{count}"
        self.taken.add(called)
        return called

    def _consumers(self, link: str) -> list[tuple[str, str]]:
        name, found, producer = link.partition("=")
        match = _PRODUCER.fullmatch(producer)
        if not found or not name or match is None:
            raise InputError(f"chain {link!r}: write it as input=task:output, or input=task:output[16]")
        if match["task"] not in self.tasks:
            raise InputError(f"chain {link}: there is no task {match['task']!r}; there are {', '.join(self.tasks)}")
        task, others = match["task"], [task for task in self.tasks if task != match["task"]]
        if not self._named(name, others) and self._named(name, [task]):
            raise InputError(
                f"chain {link}: {name!r} is an input of {task} itself, and a chain leads to another network; what its "
                f"output was at the call before is --state {name}={match['output']}"
            )
        return self._places(f"chain {link}", name, others)

    def _keepers(self, link: str) -> list[tuple[str, str]]:
        name, found, output = link.partition("=")
        if not found or not name or not output:
            raise InputError(f"state {link!r}: write it as input=output, or task.input=output")
        return self._places(f"state {link}", name, self.tasks)

    def _places(self, link: str, name: str, tasks: Sequence[str]) -> list[tuple[str, str]]:
        """Return the inputs of some tasks that a name means."""
        if found := self._named(name, tasks):
            return found
        known = ", ".join(f"{task}.{other}" for task, other in self.types if task in tasks)
        raise InputError(f"{link}: there is no input {name!r}; there are {known or 'none'}")

    def _named(self, name: str, tasks: Sequence[str]) -> list[tuple[str, str]]:
        places = [place for place in self.types if place[0] in tasks]
        full = [place for place in places if name in (f"{place[0]}.{place[1]}", f"{place[0]}:{place[1]}")]
        return [place for place in places if place[1] == name] or full

    def _result(self, link: str, task: str, name: str) -> Result:
        names = self.outputs[task]
        if name in names:
            return Result(task, names.index(name))
        if name in (numbers := [str(n) for n in range(len(names))]):
            return Result(task, numbers.index(name))
        raise InputError(f"{link}: task {task!r} has no output {name!r}; it has {', '.join(names)}")

    def _chain(self, link: str, place: tuple[str, str]) -> None:
        match = _PRODUCER.fullmatch(link.partition("=")[2])
        assert match is not None
        result = self._result(f"chain {link}", match["task"], match["output"])
        given, wanted = self.results[result.task][result.place], self.types[place]
        have, want = shape_of(given), shape_of(wanted)
        texts = f"the output is {text_of(given)}, the input {text_of(wanted)}"
        if str(given.dtype) != str(wanted.dtype):
            raise InputError(f"chain {link}: {texts}; they must be of one type")
        self.inner.add(result)
        count = int(match["window"]) if match["window"] else 1
        if count == 1:
            if without_ones(have) != without_ones(want):
                hint = f"; to read the last results write {link}[{n}]" if (n := _results(have, want)) else ""
                raise InputError(f"chain {link}: {texts}; they don't fit" + hint)
            self.sources[place] = result
            return
        found = _window(have, want)
        if found is None or count != _results(have, want):
            hint = f"; it takes {n} of them" if (n := _results(have, want)) else ""
            raise InputError(f"chain {link}: {texts}; the last {count} results don't fit" + hint)
        self.sources[place] = self._windowed(result, *found, str(given.dtype))

    def _windowed(self, result: Result, view: tuple[int, ...], axis: int, length: int, dtype: str) -> Window:
        """Return a window; those that look alike have one state."""
        for state in self.states:
            other = state.following
            if isinstance(other, Window) and (other.result, other.view, other.axis, other.length) == (
                result, view, axis, length,
            ):  # fmt: skip
                return other
        output = self.outputs[result.task][result.place]
        name = self._unique(f"{result.task}.{output}.last")
        window = Window(result, view, axis, length, name)
        ty = relax.TensorType(window.kept, dtype)
        self.states.append(State(name, ty, result.task, name, window))
        return window

    def _keep(self, link: str, place: tuple[str, str]) -> None:
        task, name = place
        output = link.partition("=")[2]
        result = self._result(f"state {link}", task, output)
        given, wanted = self.results[task][result.place], self.types[place]
        if not structural_equal(given, wanted):
            raise InputError(
                f"state {link}: the output is {text_of(given)}, the input {text_of(wanted)}; they must be alike"
            )
        alone = sum(other == name for _, other in self.types) == 1
        called = self._unique(name if alone else f"{task}.{name}")
        self.inner.add(result)
        self.sources[place] = called
        self.states.append(State(called, wanted, task, self.outputs[task][result.place], result))

    def _order(self, chains: Sequence[str]) -> tuple[str, ...]:
        needs: dict[str, set[str]] = {task: set() for task in self.tasks}
        for (task, _), source in self.sources.items():
            if isinstance(source, Result | Window):
                needs[task].add((source if isinstance(source, Result) else source.result).task)
        order: list[str] = []
        while len(order) < len(self.tasks):
            ready = [task for task in self.tasks if task not in order and needs[task] <= {*order}]
            if not ready:
                rest = ", ".join(task for task in self.tasks if task not in order)
                raise InputError(f"chain {', '.join(chains)}: the tasks {rest} need each other's results")
            order.append(ready[0])
        return tuple(order)


def _window(have: tuple[int, ...], want: tuple[int, ...]) -> tuple[tuple[int, ...], int, int] | None:
    """Return how results of one shape are laid side by side to another: their view, its axis, the rows of all."""
    if len(have) == len(want):
        longer = [axis for axis, (a, b) in enumerate(zip(have, want, strict=True)) if a != b]
        if len(longer) == 1 and want[longer[0]] > have[longer[0]]:
            return have, longer[0], want[longer[0]]
    small, large = without_ones(have), without_ones(want)
    for axis, length in enumerate(large):
        if (*large[:axis], *large[axis + 1 :]) == small:
            return (*small[:axis], 1, *small[axis:]), axis, length
    if len(small) == len(large):
        longer = [axis for axis, (a, b) in enumerate(zip(small, large, strict=True)) if a != b]
        if len(longer) == 1 and large[longer[0]] > small[longer[0]]:
            return small, longer[0], large[longer[0]]
    return None


def _results(have: tuple[int, ...], want: tuple[int, ...]) -> int:
    """Return how many results make a window, 0 if none do."""
    found = _window(have, want)
    if found is None:
        return 0
    view, axis, length = found
    return -(-length // view[axis])
