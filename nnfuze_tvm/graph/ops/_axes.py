"""Axes as attributes name them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any


def axes_of(value: Any, rank: int) -> list[int]:
    """Return what an attribute that names axes means: one, several, or all for None."""
    if value is None:
        return list(range(rank))
    axes = value if isinstance(value, Iterable) else [value]
    return [int(axis) % rank for axis in axes]
