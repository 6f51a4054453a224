"""Steps that take and make buffers: what a network is to its memory."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, reduce
from operator import or_


@dataclass(frozen=True)
class Step:
    """One step.

    Attributes
    ----------
    takes, makes : tuple of int
        The buffers that it reads and those that it writes, none of them twice.
    scratch : int
        Bytes that it needs beside them while it runs.
    over : tuple of (int, int)
        What it makes and what it takes, of one size: the one may lie where the other is if that is of no use later.
    """

    takes: tuple[int, ...]
    makes: tuple[int, ...]
    scratch: int = 0
    over: tuple[tuple[int, int], ...] = ()


@dataclass(frozen=True)
class Work:
    """Steps in an order in which they can run.

    Attributes
    ----------
    sizes : sequence of int
        Bytes per buffer. A buffer that no step makes is there from the beginning and is not counted.
    steps : sequence of Step
        The steps; each buffer is made by one at most.
    kept : frozenset of int
        Buffers that are needed after the last step.
    """

    sizes: Sequence[int]
    steps: Sequence[Step]
    kept: frozenset[int] = field(default_factory=frozenset)

    @cached_property
    def readers(self) -> list[int]:
        """Per buffer the steps that take it, as bits."""
        found = [0] * len(self.sizes)
        for n, step in enumerate(self.steps):
            for buffer in step.takes:
                found[buffer] |= 1 << n
        return found

    @cached_property
    def needs(self) -> list[int]:
        """Per step the steps that make what it takes, as bits."""
        maker = {buffer: n for n, step in enumerate(self.steps) for buffer in step.makes}
        return [sum(1 << n for n in {maker[b] for b in step.takes if b in maker}) for step in self.steps]

    @cached_property
    def followers(self) -> list[int]:
        """Per step the steps that take what it makes, as bits."""
        return [reduce(or_, (self.readers[buffer] for buffer in step.makes), 0) for step in self.steps]

    @cached_property
    def made(self) -> frozenset[int]:
        """The buffers that steps make."""
        return frozenset(buffer for step in self.steps for buffer in step.makes)

    def dies(self, buffer: int, done: int) -> bool:
        """Tell whether a buffer is of no use any more once these steps (bits) are done."""
        return buffer in self.made and buffer not in self.kept and not self.readers[buffer] & ~done

    def overlaid(self, n: int, done: int) -> list[tuple[int, int]]:
        """Return what step ``n``, done with those before it (bits), can make where something dies."""
        found: list[tuple[int, int]] = []
        for new, old in self.steps[n].over:
            if all(new != a and old != b for a, b in found) and new not in self.kept and self.dies(old, done):
                found.append((new, old))
        return found

    def effect(self, n: int, done: int) -> tuple[int, int]:
        """Return by how many bytes memory grows while step ``n`` runs, and by how many with it done.

        ``done`` are the steps that are done then, as bits: this one and those before it.
        """
        step = self.steps[n]
        grows = sum(self.sizes[b] for b in step.makes)
        spared = sum(self.sizes[new] for new, _ in self.overlaid(n, done))
        freed = sum(self.sizes[b] for b in (*step.takes, *step.makes) if self.dies(b, done))
        return grows - spared + step.scratch, grows - freed

    def peak(self, order: Sequence[int]) -> int:
        """Return the most bytes that are in use at once if the steps run in this order."""
        return max(self.profile(order), default=0)

    def profile(self, order: Sequence[int] | None = None) -> list[int]:
        """Return the bytes that are in use while each step runs, in this order; by default in the given one."""
        live = done = 0
        found = []
        for n in range(len(self.steps)) if order is None else order:
            done |= 1 << n
            grows, stays = self.effect(n, done)
            found.append(live + grows)
            live += stays
        return found

    def least(self) -> int:
        """Return bytes that no order can do without: what the largest step needs on its own."""
        least = 0
        for step in self.steps:
            both = sum(self.sizes[b] for b in {*step.takes, *step.makes} if b in self.made)
            pairs: list[tuple[int, int]] = []
            for new, old in step.over:
                if all(new != a and old != b for a, b in pairs) and new not in self.kept:
                    pairs.append((new, old))
            least = max(least, both + step.scratch - sum(self.sizes[new] for new, _ in pairs))
        return least
