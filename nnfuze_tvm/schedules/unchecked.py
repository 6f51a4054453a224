"""TVM's schedule without its own check of every argument's type, which takes a seventh of a network's lowering.

The compiled part of TVM checks what it is handed once more.
"""

from __future__ import annotations

import inspect
from typing import Any

from tvm import s_tir


def _bare(name: str) -> Any:
    return inspect.unwrap(getattr(s_tir.Schedule, name))


_CHECKED = [name for name, value in vars(s_tir.Schedule).items() if inspect.isfunction(value)]

Schedule: Any = type("Schedule", (s_tir.Schedule,), {name: _bare(name) for name in _CHECKED})
