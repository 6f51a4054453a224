"""How far each stage of a group must be when its last one has made so many rows.

Rows are the places along the second axis of what a stage writes. A stage makes ``tile`` of them per iteration, and
reads some rows of what stages before it wrote. Nothing here knows of code: the same sums are done with numbers, to see
what a band costs, and with expressions, which the woven kernel computes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Reach:
    """Iteration ``t`` reads the rows from ``step · t + low`` to ``step · t + high``, as far as there are such."""

    step: int
    low: int
    high: int


@dataclass(frozen=True)
class Step:
    """One stage.

    Attributes
    ----------
    rows : int
        Rows of what it writes.
    tile : int
        Rows per iteration; the last one may have fewer.
    reads : dict of int to Reach
        What it reads of earlier stages, by their number.
    """

    rows: int
    tile: int
    reads: Mapping[int, Reach]


@dataclass(frozen=True)
class Maths:
    """Minimum and maximum of numbers or of expressions, and what gives a name to a result."""

    least: Callable[[Any, Any], Any] = np.minimum
    most: Callable[[Any, Any], Any] = np.maximum
    named: Callable[[Any], Any] = lambda value: value


NUMBERS = Maths()


@dataclass(frozen=True)
class Bands:
    """The last stage's rows in bands of ``height`` rows, and these in ``parts`` that know nothing of each other.

    ``exact`` buffers between stages have no more rows than are needed, others a power of two.
    """

    height: int
    parts: int
    exact: bool = False

    def count(self, rows: int) -> int:
        """Return the number of bands."""
        return -(-rows // self.height)

    def longest(self, rows: int) -> int:
        """Return the rows of the longest part, at most."""
        return -(-self.count(rows) // self.parts) * self.height

    def first(self, part: Any, count: int) -> Any:
        """Return the first band of a part; of the one behind the last part, the number of bands."""
        return part * count // self.parts


def ends(steps: Sequence[Step], rows: Any, maths: Maths = NUMBERS) -> list[Any]:
    """Return the iterations of each stage that must be done when the last one has ``rows`` rows."""
    found: list[Any] = [None] * len(steps)
    for number in range(len(steps) - 1, -1, -1):
        own = steps[number]
        wanted = rows if number == len(steps) - 1 else None
        for reader, reach in _readers(steps, number):
            last = (found[reader] - 1) * reach.step + (reach.high + 1)
            wanted = last if wanted is None else maths.most(wanted, last)
        wanted = maths.most(maths.least(wanted, own.rows), 0)
        found[number] = maths.named((wanted + (own.tile - 1)) // own.tile)
    return found


def starts(steps: Sequence[Step], row: Any, maths: Maths = NUMBERS) -> list[Any]:
    """Return the first iteration of each stage that is needed by rows of the last one from ``row`` on."""
    found: list[Any] = [None] * len(steps)
    for number in range(len(steps) - 1, -1, -1):
        own = steps[number]
        wanted = row if number == len(steps) - 1 else None
        for reader, reach in _readers(steps, number):
            first = found[reader] * reach.step + reach.low
            wanted = first if wanted is None else maths.least(wanted, first)
        wanted = maths.most(maths.least(wanted, own.rows), 0)
        found[number] = maths.named(wanted // own.tile)
    return found


def _readers(steps: Sequence[Step], number: int) -> list[tuple[int, Reach]]:
    return [(reader, step.reads[number]) for reader, step in enumerate(steps) if number in step.reads]


@dataclass(frozen=True)
class Course:
    """What happens to each stage in all bands: rows that must be kept at once, and iterations, repeated ones too."""

    lines: tuple[int, ...]
    iterations: tuple[int, ...]


def course(steps: Sequence[Step], bands: Bands) -> Course:
    """Follow a group through its bands, those of one part all at once."""
    rows = steps[-1].rows
    count = bands.count(rows)
    lines, iterations = [0] * len(steps), [0] * len(steps)
    for part in range(bands.parts):
        each = np.arange(bands.first(part, count), bands.first(part + 1, count))
        begun = starts(steps, each[:1] * bands.height)
        done = ends(steps, np.minimum((each + 1) * bands.height, rows))
        before = [np.maximum(start, np.append(start, end[:-1])) for start, end in zip(begun, done, strict=True)]
        for number, step in enumerate(steps):
            iterations[number] += int(np.maximum(0, done[number] - before[number]).sum())
            readers = _readers(steps, number)
            if readers:
                oldest = np.minimum.reduce([before[reader] * reach.step + reach.low for reader, reach in readers])
                live = np.minimum(done[number] * step.tile, step.rows) - np.maximum(0, oldest)
                lines[number] = max(lines[number], int(live.max()))
    return Course(tuple(lines), tuple(iterations))
