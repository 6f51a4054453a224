"""How a job says what it is doing."""

from __future__ import annotations

import os
from collections.abc import Callable

Announce = Callable[[str], None]
"""Is told what is being done, in a few words."""


NOTE = "note: "
"""What begins a line that is to stay where it can be read."""


def silent(_: str) -> None:
    """Tell nobody."""


def note_threads(threads: int, announce: Announce) -> None:
    """Say so if there are more threads than this machine has cores to run them."""
    cores = os.cpu_count() or 1
    if threads > cores:
        announce(f"{NOTE}{threads} threads wait for each other on the {cores} cores of this machine")
