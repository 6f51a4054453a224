"""The operators as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

if TYPE_CHECKING:
    from nnfuze_tvm.analysis.operators import OperatorRecord

_PRECISIONS = ("float32", "int8", "float16")


def render_operators(records: Sequence[OperatorRecord]) -> list[Table | str]:
    """Return a row per operator, and how to read it."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("operator", no_wrap=True)
    for name in ("family", "fp32", "int8", "fp16", "channels", "branches", "rules"):
        table.add_column(name)
    family = ""
    for record in records:
        table.add_row(
            record.name,
            record.family.replace("_", " ") if record.family != family else "",
            *("yes" if precision in record.precisions else "" for precision in _PRECISIONS),
            record.prunes,
            "merge" if record.merges else "",
            " ".join(record.rules),
        )
        family = record.family
    return [
        table,
        "int8, fp16: computed in it; what is not, stays in float32 between conversions.",
        "channels: those that pruning can remove are its own, or follow those of its operands, or all stay (whole).",
        "branches: equal calls of several tasks merge into one. rules: what schedules its kernels.",
    ]
