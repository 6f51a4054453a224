"""A report as tables for a terminal."""

from __future__ import annotations

from rich.table import Table

from nnfuze_tvm.report import text
from nnfuze_tvm.report.record import Report, Stage


def render_table(report: Report) -> Table:
    """Return the stages as a table, a row each, without columns that nothing was measured for."""
    outputs = list(dict.fromkeys(name for stage in report.stages for name in stage.tasks))
    columns = {
        "latency": lambda s: text.seconds(s.latency),
        "p95": lambda s: text.seconds(s.latency_p95),
        "throughput": lambda s: text.rate(s.throughput),
        "MACs": lambda s: text.count(s.macs),
        "parameters": lambda s: text.count(s.parameters),
        "on disk": lambda s: text.size(s.bytes),
        "peak memory": lambda s: text.size(s.peak_memory),
        "sparsity": lambda s: text.percent(s.sparsity),
        **{name: (lambda s, name=name: text.quality(s.tasks.get(name))) for name in outputs},
    }
    table = Table(title=_title(report), title_justify="left", header_style="bold")
    table.add_column("stage")
    used = {
        name: cell for name, cell in columns.items() if any(cell(s) != text.NOTHING for s in report.stages)
    }
    for name in used:
        table.add_column(name, justify="right")
    for stage in report.stages:
        table.add_row(stage.name, *(cell(stage) for cell in used.values()), style=_style(report, stage))
    return table


def render_kernels(report: Report) -> Table:
    """Return the kernels of the final stage, the slowest first."""
    total = sum(kernel.seconds for kernel in report.kernels) or 1.0
    table = Table(title=f"kernels, {text.seconds(total)} in all", title_justify="left", header_style="bold")
    table.add_column("kernel")
    for name in ("calls", "time", "share"):
        table.add_column(name, justify="right")
    table.add_column("tasks")
    for kernel in sorted(report.kernels, key=lambda k: -k.seconds):
        table.add_row(
            kernel.name,
            str(kernel.calls),
            text.seconds(kernel.seconds),
            text.percent(kernel.seconds / total),
            ", ".join(kernel.tasks),
        )
    return table


def _title(report: Report) -> str:
    threads = f"{report.threads} thread" + "s" * (report.threads > 1)
    return f"{', '.join(report.tasks)} · {report.target} · {threads}"


def _style(report: Report, stage: Stage) -> str:
    if stage.reference:
        return "dim"
    return "bold" if stage is report.final else ""
