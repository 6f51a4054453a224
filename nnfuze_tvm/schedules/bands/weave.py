"""One kernel out of several: the stages of all of them, band by band, with buffers of few rows between them.

The kernels' code is taken as it is, but for the loop over rows, which runs over those that a band needs, and for the
buffers between stages, which hold the rows that are still needed and find row ``y`` in place ``y mod lines``. So every
row is computed by the same instructions as in a kernel of its own, and once; only where the image is cut in parts, for
several threads, each part computes for itself what it needs from beyond its edges.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm import tirx
from tvm.ir import TensorLoad

from nnfuze_tvm.schedules.bands.progress import Bands, Course, Maths, Reach, Step, course, ends, starts
from nnfuze_tvm.schedules.bands.stages import ROWS, Kernel, Stage, renewed
from nnfuze_tvm.schedules.loops import MIDDLE, USUAL


@dataclass(frozen=True)
class Group:
    """Kernels that are called one after the other.

    Attributes
    ----------
    kernels : tuple of Kernel
        In order.
    arguments : tuple of tuple of int
        For each parameter of each kernel, results last, which value of the group it is.
    result : int
        The value that the group is called for. All others that its kernels make are not needed elsewhere.
    """

    kernels: tuple[Kernel, ...]
    arguments: tuple[tuple[int, ...], ...]
    result: int

    @property
    def inner(self) -> list[int]:
        """The values that live in the group only."""
        return [numbers[-1] for numbers in self.arguments if numbers[-1] != self.result]

    @property
    def given(self) -> list[int]:
        """The values that it is called with, in the order of their first use."""
        inner = {*self.inner, self.result}
        return [n for n in dict.fromkeys(n for numbers in self.arguments for n in numbers) if n not in inner]

    def stages(self) -> list[tuple[Stage, dict[Any, Any]]]:
        """Return all stages, each with what its kernel's buffers are in the group: values, or (kernel, place)."""
        found = []
        for number, (kernel, values) in enumerate(zip(self.kernels, self.arguments, strict=True)):
            names: dict[Any, Any] = dict(zip(kernel.params, values, strict=True))
            names.update({buffer: (number, place) for place, buffer in enumerate(kernel.buffers)})
            found += [(stage, names) for stage in kernel.stages]
        return found

    def steps(self) -> list[Step]:
        """Return what `progress` must know."""
        steps: list[Step] = []
        made: dict[Any, int] = {}
        for number, (stage, names) in enumerate(self.stages()):
            reads: dict[int, Reach] = {}
            for buffer, reach in stage.reads.items():
                if names[buffer] in made:
                    reads[made[names[buffer]]] = _both(reads.get(made[names[buffer]]), reach)
            steps.append(Step(int(stage.writes.shape[ROWS]), stage.tile, reads))
            made[names[stage.writes]] = number
        return steps


def _both(known: Reach | None, more: Reach) -> Reach:
    """Return what two reads reach, of a value that a kernel takes twice; those of different steps stand still."""
    if known is None:
        return more
    step = known.step if known.step == more.step else 0
    return Reach(step, min(known.low, more.low), max(known.high, more.high))


def lines(found: Course, steps: Sequence[Step], bands: Bands) -> list[int]:
    """Return the rows of each stage's buffer: a power of two, so that finding a row takes one instruction, or exact."""
    rows = [max(1, live) if bands.exact else 1 << max(0, live - 1).bit_length() for live in found.lines]
    return [min(step.rows, own) for own, step in zip(rows, steps, strict=True)]


def weave(group: Group, bands: Bands) -> tirx.PrimFunc:
    """Return the kernel of a group: its parameters are what it is given, then its result."""
    steps = group.steps()
    stages = group.stages()
    kept = lines(course(steps, bands), steps, bands)
    buffers: dict[Any, Any] = {}
    for kernel, values in zip(group.kernels, group.arguments, strict=True):
        for param, value in zip(kernel.params, values, strict=True):
            buffers.setdefault(value, tirx.Var(param.name, param.ty))
    rings: dict[Any, int] = {}
    scratch: list[Any] = []
    for (stage, names), rows in zip(stages[:-1], kept[:-1], strict=True):
        shape = [int(extent) for extent in stage.writes.shape]
        own = tirx.decl_buffer([*shape[:ROWS], rows, *shape[ROWS + 1 :]], str(stage.writes.dtype), stage.writes.name)
        buffers[names[stage.writes]] = own
        scratch.append(own)
        if rows < shape[ROWS]:
            rings[own] = rows
    count = bands.count(steps[-1].rows)
    band = tirx.Var("band", tvm.ir.PrimType("int64"))
    # Outside of any loop, what lies between the stages has a place in the memory that is planned for all kernels.
    part = tirx.Var("part", tvm.ir.PrimType("int64")) if bands.parts > 1 else _number(0)
    first, last = bands.first(part, count), bands.first(part + 1, count)
    # In memory, so that the simplifier does not carry sums over all stages into every index.
    begun, done = (_Table(len(steps), name) for name in ("begun", "done"))
    begin = _stores(begun, lambda maths: starts(steps, first * bands.height, maths))
    body = _band(stages, steps, bands, band, (begun, done), buffers)
    usual = {USUAL: -(-count // bands.parts)}
    body = tirx.For(band, first, last - first, tirx.ForKind.SERIAL, tirx.SeqStmt(body), annotations=usual)
    body = tirx.SeqStmt([*begin, body])
    scratch += [begun.buffer, done.buffer]
    body = tirx.SeqStmt([*(tirx.AllocBuffer(each) for each in scratch), _in_rings(body, rings)])
    if bands.parts > 1:
        body = tirx.For(part, _number(0), _number(bands.parts), tirx.ForKind.PARALLEL, body)
    params = [buffers[value] for value in (*group.given, group.result)]
    return tirx.PrimFunc(params, body).with_attr({"tirx.noalias": True, "s_tir": True, "tirx.is_scheduled": True})


class _Table:
    """Numbers of the stages, in memory."""

    def __init__(self, size: int, name: str) -> None:
        self.size = size
        self.buffer = tirx.decl_buffer([_number(size)], "int64", name)

    def of(self, stage: int) -> Any:
        """Return the number of a stage."""
        return tirx.BufferLoad(self.buffer, [_number(stage)])

    def store(self, stage: int, value: Any) -> Any:
        """Return the statement that changes the number of a stage."""
        return tirx.BufferStore(self.buffer, _number(value), [_number(stage)])


def _band(
    stages: Sequence[tuple[Stage, dict[Any, Any]]],
    steps: Sequence[Step],
    bands: Bands,
    band: Any,
    tables: tuple[_Table, _Table],
    buffers: dict[Any, Any],
) -> list[Any]:
    """Return the statements of one band: how far the stages must get, and each stage's loops over its next rows."""
    begun, done = tables
    rows = steps[-1].rows
    statements = _stores(done, lambda maths: ends(steps, _least((band + 1) * bands.height, rows), maths))
    for number, (stage, names) in enumerate(stages):
        begin, end = begun.of(number), _most(begun.of(number), done.of(number))
        usual = {USUAL: -(-stage.iterations // bands.count(rows)), MIDDLE: stage.iterations // 2}
        nest = tirx.For(stage.row, begin, end - begin, tirx.ForKind.SERIAL, stage.body, annotations=usual)
        for var, extent in reversed(stage.blocks):
            nest = tirx.For(var, _number(0), _number(extent), tirx.ForKind.SERIAL, nest)
        statements.append(renewed(nest, {buffer: buffers[value] for buffer, value in names.items()}))
    return [*statements, *(begun.store(n, _most(begun.of(n), done.of(n))) for n in range(len(steps)))]


def _stores(table: _Table, numbers: Callable[[Maths], list[Any]]) -> list[Any]:
    """Return statements that fill a table with numbers that follow from each other, those of the last stage first."""
    statements: list[Any] = []

    def named(value: Any) -> Any:
        number = table.size - 1 - len(statements)
        statements.append(table.store(number, value))
        return table.of(number)

    numbers(Maths(_least, _most, named))
    return statements


def _in_rings(body: Any, rings: dict[Any, int]) -> Any:
    """Return a statement in which the rows of some buffers are taken modulo their number."""

    def place(buffer: Any, indices: Any) -> list[Any]:
        indices = list(indices)
        indices[ROWS] = tirx.floormod(indices[ROWS], _number(rings[buffer]))
        return indices

    def load(node: Any) -> Any:
        return tirx.BufferLoad(node.source, place(node.source, node.indices)) if node.source in rings else node

    def store(node: Any) -> Any:
        if node.buffer not in rings:
            return node
        return tirx.BufferStore(node.buffer, node.value, place(node.buffer, node.indices))

    body = tvm_ffi.structural_map(body, (TensorLoad, load))
    return tvm_ffi.structural_map(body, (tirx.BufferStore, store))


def _number(value: Any) -> Any:
    return tirx.IntImm("int64", value) if isinstance(value, int) else value


def _least(one: Any, other: Any) -> Any:
    return tirx.Min(_number(one), _number(other))


def _most(one: Any, other: Any) -> Any:
    return tirx.Max(_number(one), _number(other))
