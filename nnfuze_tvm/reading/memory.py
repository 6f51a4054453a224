"""How much memory there is, for what is known to need more before it begins."""

from __future__ import annotations

from pathlib import Path

import psutil

# Version 2 of control groups, then version 1: what is used, what is allowed.
_GROUPS = (
    ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory.max"),
    ("/sys/fs/cgroup/memory/memory.usage_in_bytes", "/sys/fs/cgroup/memory/memory.limit_in_bytes"),
)
# Asking takes a moment, and so much there always is.
_SMALL = 16 << 20


def available() -> int:
    """Return how many bytes this process may still ask for: of the machine's, and of those it is confined to."""
    free = [int(psutil.virtual_memory().available + psutil.swap_memory().free)]
    for used, allowed in _GROUPS:
        try:
            # What is cached of files counts as used, though it is given back: at least a half of the limit is left.
            limit = int(Path(allowed).read_text())
            free.append(max(limit - int(Path(used).read_text()), limit // 2))
        except (OSError, ValueError):
            continue
    return min(free)


def too_large(size: int) -> str:
    """Return why so many bytes can't be held; an empty string if they can."""
    if size < _SMALL or size <= (free := available()):
        return ""
    return f"takes {readable(size)} of memory; {readable(free)} are left here"


def readable(size: int) -> str:
    """Return a number of bytes as B, KB, MB (powers of 1000, as disks and links are sold)."""
    for unit in ("B", "KB", "MB", "GB"):
        # What three digits would round to a thousand is one of the next unit.
        if size < 999.5:
            return f"{size:.3g} {unit}"
        size /= 1000  # type: ignore[assignment]
    return f"{size:.3g} TB" if size < 1000 else "more than 1000 TB"
