"""How a job says what it is doing."""

from __future__ import annotations

from collections.abc import Callable

Announce = Callable[[str], None]
"""Is told what is being done, in a few words."""


def silent(_: str) -> None:
    """Tell nobody."""
