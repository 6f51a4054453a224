"""Boards as tables for a terminal: the catalogue, what a tracker knows, and what a check found."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from nnfuze_tvm.devices.boards import BOARDS, CATALOGUE
from nnfuze_tvm.report import text

if TYPE_CHECKING:
    from nnfuze_tvm.analysis.device_check import DeviceCheck
    from nnfuze_tvm.devices.remote.tracker import Boards


def render_catalogue() -> list[Table | str]:
    """Return a row per board, and how to read it."""
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=0, show_edge=False)
    table.add_column("--target", no_wrap=True)
    table.add_column("board", min_width=17)
    table.add_column("features", min_width=9)
    for name in ("cores", "L1", "L2", "fp32", "int8"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("QEMU", no_wrap=True)
    for board in CATALOGUE:
        table.add_row(
            board.name,
            board.title,
            " ".join(board.features),
            str(board.cores),
            *map(_kib, (board.l1, board.l2)),
            *(f"{rate:.3g}" if rate else text.NOTHING for rate in (board.fp32, board.int8)),
            board.emulated or text.NOTHING,
        )
    return [
        table,
        "fp32, int8: multiply-adds per cycle and core at most. QEMU: the CPU model for nnfuze devices emulate.",
    ]


def render_boards(boards: Mapping[str, Boards]) -> Table:
    """Return a row per key of a tracker."""
    table = Table(header_style="bold")
    table.add_column("key")
    for name in ("registered", "free", "in use", "clients waiting"):
        table.add_column(name, justify="right")
    table.add_column("addresses", overflow="fold")
    table.add_column("catalogue")
    for key, found in boards.items():
        counts = (len(found.addresses), found.free, found.in_use, found.waiting)
        title = BOARDS[key].title if key in BOARDS else text.NOTHING
        table.add_row(key, *map(str, counts), ", ".join(found.addresses), title)
    return table


def render_check(check: DeviceCheck) -> Table:
    """Return what was found beside what was expected."""
    table = Table("", "found", title=f"{check.address} as {check.target}", header_style="bold")
    table.add_row("CPU", check.machine or "unknown: the board runs TVM's own server")
    if check.machine:
        table.add_row("features", " ".join(check.features) or text.NOTHING)
        table.add_row("of them not used", " ".join(check.unused) or text.NOTHING)
    for name, kernel in check.kernels.items():
        most = f" of at most {text.count(kernel.expected, 'OP/s')}" if kernel.expected else ""
        exact = "exact" if kernel.error == 0 else f"relative error {kernel.error:.1e}"
        table.add_row(f"{name}, one core", f"{exact}, {text.count(kernel.rate, 'OP/s')}{most}")
    return table


def _kib(size: int) -> str:
    return f"{size >> 10}M" if size >= 1024 else f"{size}K"
