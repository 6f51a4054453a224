"""A report as tables for a terminal."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from nnfuze_tvm.report import text
from nnfuze_tvm.report.names import short_names
from nnfuze_tvm.report.record import KernelTime, Report, Stage, TaskQuality

if TYPE_CHECKING:
    from nnfuze_tvm.jobs.fleet import Usage


def render_table(report: Report) -> Table:
    """Return the stages as a table, a column each, without rows that nothing was measured for."""
    outputs = list(dict.fromkeys(name for stage in report.stages for name in stage.tasks))
    first = report.stages[0].latency if len(report.stages) > 1 else None
    rows: dict[str, Callable[[Stage], str]] = {
        "latency": lambda s: text.seconds(s.latency),
        "speed-up": lambda s: f"{first / s.latency:.2f}×" if first and s.latency else text.NOTHING,
        "p95": lambda s: text.seconds(s.latency_p95),
        "throughput": lambda s: text.rate(s.throughput),
        "MACs": lambda s: text.count(s.macs),
        "parameters": lambda s: text.count(s.parameters),
        "on disk": lambda s: text.size(s.bytes),
        "weights in memory": lambda s: text.size(s.weight_memory),
        "peak memory": lambda s: text.size(s.peak_memory),
        "zero weights": lambda s: text.percent(s.sparsity),
    }
    for name in outputs:
        rows[f"{name}, accuracy"] = lambda s, name=name: text.accuracy(s.tasks.get(name))  # type: ignore[misc]
        rows[f"{name}, agreement"] = lambda s, name=name: text.agreement(s.tasks.get(name))  # type: ignore[misc]
    table = Table(title=_title(report), title_justify="left", header_style="bold")
    table.add_column("")
    for stage in report.stages:
        table.add_column(stage.name.replace(", ", ",\n"), justify="right", style=_style(report, stage))
    for name, cell in rows.items():
        cells = [cell(stage) for stage in report.stages]
        if any(value != text.NOTHING for value in cells):
            table.add_row(name, *cells)
    return table


def render_kernels(kernels: Sequence[KernelTime]) -> Table:
    """Return kernels with their times, the slowest first."""
    total = sum(kernel.seconds for kernel in kernels) or 1.0
    table = Table(title=f"kernels, {text.seconds(total)} in all", title_justify="left", header_style="bold")
    table.add_column("layers", overflow="fold")
    for name in ("calls", "time", "share"):
        table.add_column(name, justify="right")
    table.add_column("kernel")
    table.add_column("tasks")
    short = short_names(layer for kernel in kernels for layer in kernel.layers)
    own = short_names(kernel.name for kernel in kernels)
    for kernel in sorted(kernels, key=lambda k: -k.seconds):
        table.add_row(
            "\n".join(short[layer] for layer in kernel.layers),
            str(kernel.calls),
            text.seconds(kernel.seconds),
            text.percent(kernel.seconds / total),
            own[kernel.name],
            ", ".join(kernel.tasks),
        )
    return table


def render_devices(devices: Sequence[Usage]) -> Table:
    """Return what each device did for a tuning job."""
    table = Table(title="devices", title_justify="left", header_style="bold")
    table.add_column("device")
    for name in ("trials", "failed", "lost"):
        table.add_column(name, justify="right")
    for one in devices:
        table.add_row(one.device, str(one.trials), str(one.failed), str(one.lost))
    return table


def render_manifest(fields: Mapping[str, Any], *, kernels: bool) -> list[Table]:
    """Return what a bundle says about itself (`bundles.inspect`) as tables."""
    metrics, target, quantized = fields["metrics"], fields["target"], fields["quantization"]
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_column(style="bold")
    facts.add_column()
    facts.add_row("tasks", ", ".join(fields["tasks"]))
    for record in fields["inputs"]:
        facts.add_row("input", f"{record['name']} {record['shape']} {record['dtype']}")
    for record in fields["outputs"]:
        classes = f", {record['classes']} classes" if record["classes"] else ""
        facts.add_row("output", f"{record['task']}: {record['name']} {record['shape']} {record['dtype']}{classes}")
    for record in fields["states"]:
        facts.add_row("state", f"{record['name']} {record['shape']} {record['dtype']}")
    facts.add_row("target", f"{target['triple']} {target['cpu']} ({', '.join(target['features'])})")
    facts.add_row("threads", str(fields["threads"]))
    facts.add_row("on disk", f"{text.size(fields['bytes'])} with the manifest")
    facts.add_row("MACs", text.count(metrics.get("macs")))
    facts.add_row("parameters", text.count(metrics.get("parameters")))
    facts.add_row("in memory", text.size(metrics.get("weight_memory")))
    facts.add_row("peak memory", text.size(metrics.get("peak_memory")))
    facts.add_row("latency", text.seconds(metrics.get("latency")))
    for name, value in metrics.get("tasks", {}).items():
        facts.add_row(f"{name}", text.quality(TaskQuality(**value)))
    if "integer_layers" in quantized:
        floats = len(quantized["float_layers"])
        facts.add_row("layers", f"{quantized['integer_layers']} int8, {floats} float32")
    facts.add_row("made by", ", ".join(f"{name} {version}" for name, version in fields["versions"].items()))
    if not kernels:
        return [facts]
    if hardware := fields["hardware"]:
        registers = f"{hardware['registers']} registers of {hardware['vector_bytes']} bytes"
        caches = f"L1 {hardware['l1_bytes'] >> 10} KiB, L2 {hardware['l2_bytes'] >> 10} KiB"
        memory = f"{hardware['far_macs']:.3g} multiply-adds per byte from memory"
        facts.add_row(
            "hardware model", f"{hardware['isa']}, {registers}, {caches}, {memory}, {hardware['cores']} cores"
        )
    table = Table(title="kernels", title_justify="left", header_style="bold")
    table.add_column("kernel and its layers", overflow="fold", min_width=24)
    for name in ("calls", "rule", "knobs", "arguments"):
        table.add_column(name, overflow="fold")
    short = short_names(name for kernel in fields["kernels"] for name in [kernel["name"], *kernel["layers"]])
    for kernel in fields["kernels"]:
        knobs = [f"{name} {value}" for name, value in kernel["knobs"].items()]
        table.add_row(
            "\n".join(short[name] for name in [kernel["name"], *kernel["layers"]]),
            str(kernel["calls"]),
            kernel["rule"],
            ", ".join([*knobs, "parallel"] if kernel["parallel"] else knobs),
            " ".join(f"{dtype}{shape}".replace(" ", "") for shape, dtype in kernel["arguments"]),
        )
    return [facts, table]


def _title(report: Report) -> str:
    return f"{', '.join(report.tasks)} · {report.target} · {text.threads(report.threads)}"


def _style(report: Report, stage: Stage) -> str:
    if stage.reference:
        return "dim"
    return "bold" if stage is report.final else ""
