"""Places in one piece of memory for buffers that live at known times.

Buffers are placed one by one, each in the tightest gap between those placed before that live at the same time. The
order that they are placed in decides; several are tried, and the buffer that ends highest is then moved to the front of
the best one as long as that helps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

ALIGNMENT = 64
"""Where kernels expect that a buffer begins."""

_ROUNDS = 64


class Places(NamedTuple):
    """Where buffers are: the first byte of each, and how many bytes there are in all."""

    offsets: list[int]
    total: int


class Span(NamedTuple):
    """The bytes of a buffer, and the first and the last step that it is needed in."""

    size: int
    first: int
    last: int


def aligned(size: int) -> int:
    """Return a size as it counts in memory."""
    return -(-size // ALIGNMENT) * ALIGNMENT


def place(spans: Sequence[Span]) -> Places:
    """Return places such that buffers that live at the same time don't overlap."""
    numbers = range(len(spans))
    least = most_live(spans)
    orders = [
        sorted(numbers, key=lambda n: (-spans[n].size, spans[n].first, n)),
        sorted(numbers, key=lambda n: (spans[n].first, -spans[n].size, n)),
        sorted(numbers, key=lambda n: (-spans[n].size * (spans[n].last - spans[n].first + 1), n)),
        sorted(numbers, key=lambda n: (spans[n].first - spans[n].last, -spans[n].size, n)),
    ]
    best, order = min(((_placed(spans, order), order) for order in orders), key=lambda found: found[0].total)
    for _ in range(_ROUNDS):
        if best.total <= least:
            break
        highest = max(numbers, key=lambda n: best.offsets[n] + aligned(spans[n].size))
        order = [highest, *(n for n in order if n != highest)]
        found = _placed(spans, order)
        best = found if found.total < best.total else best
    return best


def most_live(spans: Sequence[Span]) -> int:
    """Return the bytes of all buffers that live at once, at the worst time."""
    return max((sum(aligned(o.size) for o in spans if o.first <= s.first <= o.last) for s in spans), default=0)


def _placed(spans: Sequence[Span], order: Sequence[int]) -> Places:
    offsets = [0] * len(spans)
    done: list[int] = []
    for n in order:
        own = spans[n]
        others = [o for o in done if spans[o].first <= own.last and own.first <= spans[o].last]
        offsets[n] = _tightest(aligned(own.size), sorted((offsets[o], aligned(spans[o].size)) for o in others))
        done.append(n)
    return Places(offsets, max((offsets[n] + aligned(spans[n].size) for n in order), default=0))


def _tightest(size: int, taken: Sequence[tuple[int, int]]) -> int:
    """Return the beginning of the smallest gap that is large enough, else the end of what is taken."""
    gaps, end = [], 0
    for offset, length in taken:
        if offset - end >= size:
            gaps.append((offset - end, end))
        end = max(end, offset + length)
    return min(gaps, default=(0, end))[1]
