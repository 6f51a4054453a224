"""An analysis of kernels against the machine's limits, as a table for a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table

from nnfuze_tvm.report import text

if TYPE_CHECKING:
    from nnfuze_tvm.analyze import Analysis, KernelUse


def render_analysis(analysis: Analysis) -> list[Table | str]:
    """Return the machine's figures, a row per kernel in the network's order, and what they come to."""
    machine = analysis.machine
    levels = ", ".join(f"{level.name} {text.count(level.bandwidth, 'B/s')}" for level in machine.caches)
    title = (
        f"{machine.source}, {text.threads(machine.threads)}: {text.count(machine.fp32, 'FLOP/s')} float32, "
        f"{text.count(machine.int8, 'OP/s')} int8, {levels}, DRAM {text.count(machine.dram, 'B/s')}"
    )
    table = Table(header_style="bold")
    table.add_column("layers, or kernel", overflow="fold", min_width=16)
    for name in ("calls", "ops", "bytes", "ops/byte", "time", "rate", "of peak", "of roofline"):
        table.add_column(name, justify="right")
    table.add_column("bound by")
    for kernel in analysis.kernels:
        table.add_row(
            _label(kernel),
            str(kernel.calls),
            text.count(kernel.operations * kernel.calls),
            text.size(kernel.bytes * kernel.calls),
            f"{kernel.intensity:.3g}",
            text.seconds(kernel.seconds * kernel.calls),
            _rate(kernel),
            text.percent(kernel.of_peak, 0),
            text.percent(kernel.of_roofline, 0),
            kernel.bound,
        )
    table.add_section()
    table.add_row(
        "total",
        str(sum(k.calls for k in analysis.kernels)),
        text.count(analysis.operations),
        text.size(sum(k.bytes * k.calls for k in analysis.kernels)),
        "",
        text.seconds(analysis.seconds),
        text.count(analysis.operations / analysis.seconds if analysis.seconds else 0.0),
        text.percent(analysis.of_peak, 0),
        text.percent(analysis.of_roofline, 0),
        "",
    )
    parts: list[Table | str] = [title, table]
    if analysis.convolutions is not None:
        parts.append(f"convolutions together: {text.percent(analysis.convolutions, 0)} of the peak")
    return parts


def _rate(kernel: KernelUse) -> str:
    return text.count(kernel.rate, "OP/s" if kernel.integer else "FLOP/s")


def _label(kernel: KernelUse) -> str:
    if not kernel.layers:
        return kernel.name
    more = len(kernel.layers) - 1
    return f"{kernel.layers[0]} and {more} more" if more else kernel.layers[0]
