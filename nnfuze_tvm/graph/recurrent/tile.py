"""What the loops of a recurrent layer compute at once, and where."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Tile:
    """What is computed at once.

    Attributes
    ----------
    lanes : int
        Hidden units in one vector.
    vectors : int
        Vectors of each gate.
    rows : int
        Sequences; a divisor of the batch.
    unroll : int
        Products per sum in one iteration.
    """

    lanes: int = 1
    vectors: int = 1
    rows: int = 1
    unroll: int = 1

    @property
    def units(self) -> int:
        """Hidden units."""
        return self.lanes * self.vectors


Place = Callable[[int, int, Any], Any]
"""``(gate, vector, step of the reduction) ->`` the vector of weights there."""
Held = tuple[Any, list[Any]]
"""A buffer of states and its indices in front of sequence and unit."""


@dataclass(frozen=True)
class Spot:
    """Where a tile is: its direction, its first sequence, its number and its first unit."""

    direction: int
    first: Any
    block: Any
    unit: Any
