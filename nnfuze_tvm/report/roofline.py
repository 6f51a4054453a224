"""An analysis of kernels against the machine's limits, as a table for a terminal."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from rich import box
from rich.table import Table

from nnfuze_tvm.report import text
from nnfuze_tvm.report.names import short_names

if TYPE_CHECKING:
    from nnfuze_tvm.analysis.kernels import Analysis, KernelUse
    from nnfuze_tvm.analysis.roofline import Machine


def render_analysis(analysis: Analysis) -> list[Table | str]:
    """Return the machine's figures, a row per kernel in the network's order, and what they come to.

    Without measured times, the columns that need them make room for the least times by each limit.
    """
    measured = analysis.seconds is not None
    columns = ["time", "rate", "of peak", "of roofline"] if measured else [*analysis.bounds, "least time"]
    table = Table(header_style="bold", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column("layers, or kernel", overflow="fold", min_width=16)
    for name in ("calls", "ops", "bytes", "ops/byte", *columns):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    short = short_names(name for kernel in analysis.kernels for name in kernel.layers or (kernel.name,))
    for kernel in analysis.kernels:
        table.add_row(
            _label(kernel, short),
            str(kernel.calls),
            text.count(kernel.operations * kernel.calls),
            text.size(kernel.bytes * kernel.calls),
            f"{kernel.intensity:.3g}",
            *(_measured(kernel, kernel.calls, _unit(kernel)) if measured else _least(kernel, kernel.calls)),
            kernel.bound,
        )
    table.add_section()
    table.add_row(
        "total",
        str(sum(k.calls for k in analysis.kernels)),
        text.count(analysis.operations),
        text.size(sum(k.bytes * k.calls for k in analysis.kernels)),
        "",
        *(_measured(analysis) if measured else _least(analysis)),
        "",
    )
    parts: list[Table | str] = [_figures(analysis.machine), table]
    if analysis.catalogue is not None:
        parts.insert(1, _figures(analysis.catalogue))
    if any(kernel.winograd for kernel in analysis.kernels):
        parts.append(
            "Winograd convolutions: ops and rate are the layers'; compute and of peak count what is multiplied"
        )
    if analysis.convolutions is not None:
        parts.append(f"convolutions together: {text.percent(analysis.convolutions, 0)} of the peak")
    return parts


def _figures(machine: Machine) -> str:
    levels = ", ".join(f"{level.name} {text.count(level.bandwidth, 'B/s')}" for level in machine.caches)
    return (
        f"{machine.source}, {text.threads(machine.threads)}: {text.count(machine.fp32, 'FLOP/s')} float32, "
        f"{text.count(machine.int8, 'OP/s')} int8, {levels}, DRAM {text.count(machine.dram, 'B/s')}"
    )


def _measured(found: KernelUse | Analysis, calls: int = 1, unit: str = "") -> list[str]:
    assert found.seconds is not None
    rate = found.operations / found.seconds
    shares = (text.percent(share, 0) for share in (found.of_peak, found.of_roofline))
    return [text.seconds(found.seconds * calls), text.count(rate, unit), *shares]


def _least(found: KernelUse | Analysis, calls: int = 1) -> list[str]:
    return [text.seconds(seconds * calls) for seconds in (*found.bounds.values(), found.least)]


def _unit(kernel: KernelUse) -> str:
    return "OP/s" if kernel.integer else "FLOP/s"


def _label(kernel: KernelUse, short: Mapping[str, str]) -> str:
    if not kernel.layers:
        return short[kernel.name]
    more = len(kernel.layers) - 1
    first = short[kernel.layers[0]]
    return f"{first} and {more} more" if more else first
