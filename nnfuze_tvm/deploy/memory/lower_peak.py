"""The pass that fuses kernels band by band where a network needs most memory at once."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import tvm
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.graph import Graph
from nnfuze_tvm.deploy.memory.order import best_order
from nnfuze_tvm.deploy.memory.work import Step, Work
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.ir import small_weights
from nnfuze_tvm.schedules.bands import model
from nnfuze_tvm.schedules.bands.progress import Bands, course
from nnfuze_tvm.schedules.bands.weave import Group, lines
from nnfuze_tvm.schedules.fuse_bands import MOST_KERNELS, Call, calls_of, fused, group_of, uses
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS

# A group is made if it leaves less than this part of what was needed.
_WORTH = 0.98
# What bands cost at most, as a part of the work: the model is careful, measured it is next to nothing.
_PAID = {False: 0.5, True: 4.0}
# Bands have so many of the last stage's tiles: more of them begin fewer loops, and take as many lines or more.
_TILES = (4, 2, 1)


@dataclass(frozen=True)
class _Choice:
    """The calls from ``begin`` to before ``end`` as one."""

    begin: int
    end: int
    group: Group
    bands: Bands
    scratch: int


@module_pass(opt_level=0, name="LowerPeak")
class LowerPeak:
    """Fuse scheduled kernels into ones that compute them band by band, so that less memory is needed at once.

    As MCUNetV2 does by patches (Lin et al., NeurIPS 2021), but row by row with the rows that are needed again kept, so
    that nothing is computed twice on one thread. Groups are made where most memory is needed, as long as that lowers
    it; where memory does not come first (`ir.small_weights`), until what is needed stays in L2.

    Parameters
    ----------
    target : tvm.target.Target
        The CPU.
    """

    def __init__(self, target: Target) -> None:
        self.target = target
        self.hw = Hardware.of(target)

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with groups of kernels fused; where no group helps, as it is."""
        calls = calls_of(mod, self.target)
        graph = Graph(mod["main"], kernels.as_loops(mod, self.target))
        steps = {binding.var: n for n, binding in enumerate(graph.calls)}
        # Results of the network have memory of their own all the time.
        sizes = [0 if buffer in graph.work.kept else size for buffer, size in enumerate(graph.work.sizes)]
        work = replace(graph.work, sizes=sizes)
        numbers = [steps.get(call.binding.var) for call in calls]
        search = _Search(work, calls, numbers, uses(mod["main"]), self.hw, small_weights(mod))
        chosen = search.run()
        if not chosen or best_order(search.work(chosen)).peak >= best_order(work).peak:
            return mod
        return fused(mod, calls, [(one.begin, one.group, one.bands) for one in chosen])


class _Search:
    """What to fuse of the calls of a network.

    Parameters
    ----------
    work : Work
        What the calls need.
    calls : sequence of Call
        The bindings.
    steps : sequence of int or None
        The step of the work that each of them is.
    used : dict
        How often each value is read.
    hw : Hardware
        The CPU.
    small : bool
        Groups may run on one thread, which needs less memory than if each has rows of its own, and may cost time.
    """

    def __init__(
        self, work: Work, calls: Sequence[Call], steps: Sequence[int | None], used: dict, hw: Hardware, small: bool
    ) -> None:
        self._work, self._calls, self._steps, self._used, self._hw, self._small = work, calls, steps, used, hw, small
        self._enough = 0 if small else hw.l2_bytes // 2
        self._known: dict[tuple[int, int], _Choice | None] = {}

    def run(self) -> list[_Choice]:
        """Return groups that lower what is needed at once, in order."""
        chosen: list[_Choice] = []
        while True:
            work = self.work(chosen)
            needed = work.profile()
            most = max(needed, default=0)
            if most <= self._enough:
                return chosen
            options = []
            for new in self._around(self._call(chosen, needed.index(most))):
                rest = [one for one in chosen if one.end <= new.begin or one.begin >= new.end]
                if all(new.begin <= one.begin and one.end <= new.end for one in chosen if one not in rest):
                    both = sorted([*rest, new], key=lambda one: one.begin)
                    options.append((self._needed(both, new), new.end - new.begin, both))
            lowest = min(options, key=lambda one: one[:2], default=None)
            if lowest is None or lowest[0] >= _WORTH * most:
                return chosen
            chosen = lowest[2]

    def work(self, chosen: Sequence[_Choice]) -> Work:
        """Return what the calls need when those of each group are one."""
        steps: list[Step] = []
        groups = {self._steps[one.begin]: one for one in chosen}
        inside = {self._steps[n] for one in chosen for n in range(one.begin + 1, one.end)}
        for n, step in enumerate(self._work.steps):
            if n in groups:
                steps.append(self._step(groups[n]))
            elif n not in inside:
                steps.append(step)
        return replace(self._work, steps=steps)

    def _step(self, choice: _Choice) -> Step:
        first, last = self._steps[choice.begin], self._steps[choice.end - 1]
        assert first is not None and last is not None
        own = self._work.steps[first : last + 1]
        made = {buffer for step in own for buffer in step.makes}
        takes = dict.fromkeys(buffer for step in own for buffer in step.takes if buffer not in made)
        return Step(tuple(takes), own[-1].makes, choice.scratch)

    def _call(self, chosen: Sequence[_Choice], place: int) -> int:
        """Return the call that is a step of the work of some groups."""
        inside = {n for one in chosen for n in range(one.begin + 1, one.end)}
        return [n for n, step in enumerate(self._steps) if step is not None and n not in inside][place]

    def _needed(self, chosen: Sequence[_Choice], new: _Choice) -> int:
        """Return what is needed while a new group runs."""
        calls = [n for n, step in enumerate(self._steps) if step is not None]
        inside = {n for one in chosen for n in range(one.begin + 1, one.end)}
        return self.work(chosen).profile()[[n for n in calls if n not in inside].index(new.begin)]

    def _around(self, call: int) -> list[_Choice]:
        """Return the groups that a call can be in."""
        found = []
        for begin in range(call, max(-1, call - MOST_KERNELS), -1):
            if self._calls[begin].kernel is None:
                break
            for end in range(begin + 1, min(len(self._calls), begin + MOST_KERNELS) + 1):
                if self._calls[end - 1].kernel is None:
                    break
                choice = self._choice(begin, end) if end > call else None
                found += [choice] if choice is not None else []
        return found

    def _choice(self, begin: int, end: int) -> _Choice | None:
        if (begin, end) not in self._known:
            group = group_of(self._calls[begin:end], self._used)
            found = _bands(group, self._hw, self._small) if group is not None else None
            self._known[begin, end] = _Choice(begin, end, group, *found) if group is not None and found else None
        return self._known[begin, end]


def _bands(group: Group, hw: Hardware, small: bool) -> tuple[Bands, int] | None:
    """Return the bands of a group that need least, and the bytes between its stages; None if it can't be one."""
    steps = group.steps()
    if len(steps) < 2 or not model.fits(steps):
        return None
    stages = [stage for stage, _ in group.stages()]
    work = sum(stage.work for stage in stages)
    cores = hw.cores if work >= PARALLEL_MIN_OPS else 1
    found: list[tuple[Bands, int]] = []
    for parts in {1, cores} if small else {cores}:
        for tiles in _TILES:
            bands = Bands(tiles * steps[-1].tile, parts, exact=True)
            if bands.count(steps[-1].rows) < 2 * parts:
                continue
            path = course(steps, bands)
            if model.paid(group, hw, bands, path) <= _PAID[small] * work:
                found.append((bands, parts * model.scratch(stages, lines(path, steps, bands))))
    return min(found, key=lambda one: one[1], default=None)
