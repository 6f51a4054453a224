"""The report's figures as inline HTML and SVG: no scripts, no fonts, nothing fetched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from html import escape

from nnfuze_tvm.report import text
from nnfuze_tvm.report.names import short_names
from nnfuze_tvm.report.record import KernelTime, LayerUse, Report, Stage

TASK_COLOURS = ("#2563eb", "#db2777", "#059669", "#d97706", "#7c3aed", "#0891b2", "#65a30d", "#b91c1c")
SHARED_COLOUR = "#475569"
MOST_KERNELS = 14


def colour(tasks: Sequence[str], all_tasks: Sequence[str]) -> str:
    """Return the colour of what belongs to ``tasks``: the task's own, or the shared one."""
    if len(tasks) != 1 or len(all_tasks) == 1:
        return SHARED_COLOUR if len(all_tasks) > 1 else TASK_COLOURS[0]
    return TASK_COLOURS[list(all_tasks).index(tasks[0]) % len(TASK_COLOURS)]


def legend(report: Report) -> str:
    """Return the legend of the tasks' colours."""
    if len(report.tasks) == 1:
        return ""
    entries = [("shared", SHARED_COLOUR), *((t, colour([t], report.tasks)) for t in report.tasks)]
    return (
        '<p class="legend">'
        + "".join(f'<span><i style="background:{c}"></i>{escape(name)}</span>' for name, c in entries)
        + "</p>"
    )


def latency_bars(report: Report) -> str:
    """Return a bar per stage, with the speed-up over the first row."""
    timed = [stage for stage in report.stages if stage.latency]
    if not timed:
        return ""
    longest = max(stage.latency or 0.0 for stage in timed)
    first = timed[0].latency or 1.0
    rows = []
    for stage in timed:
        latency = stage.latency or 0.0
        kind = "reference" if stage.reference else "final" if stage is report.final else "stage"
        gain = "" if stage is timed[0] else text.ratio(first / latency)
        rows.append(_bar(stage.name, latency / longest, text.seconds(latency), gain, kind))
    return f'<div class="bars">{"".join(rows)}</div>'


def kernel_bars(report: Report) -> str:
    """Return a bar per kernel, the slowest first; the many small ones are summed up."""
    if not report.kernels:
        return ""
    total = sum(kernel.seconds for kernel in report.kernels) or 1.0
    ordered = sorted(report.kernels, key=lambda kernel: -kernel.seconds)
    shown, rest = ordered[:MOST_KERNELS], ordered[MOST_KERNELS:]
    longest = max(shown[0].seconds, sum(kernel.seconds for kernel in rest))
    short = short_names(name for kernel in report.kernels for name in kernel.layers or [kernel.name])
    rows = [_kernel_bar(kernel, longest, total, report, short) for kernel in shown]
    if rest:
        seconds = sum(kernel.seconds for kernel in rest)
        share = text.percent(seconds / total)
        rows.append(_bar(f"{len(rest)} others", seconds / longest, text.seconds(seconds), share, "reference"))
    return f'<div class="bars kernels">{"".join(rows)}</div>'


def _kernel_bar(kernel: KernelTime, longest: float, total: float, report: Report, short: Mapping[str, str]) -> str:
    names = kernel.layers or [kernel.name]
    times = "" if kernel.calls == 1 else f" ×{kernel.calls}"
    return _bar(
        ", ".join(short[name] for name in names) + times,
        kernel.seconds / longest,
        text.seconds(kernel.seconds),
        text.percent(kernel.seconds / total),
        "stage",
        colour(kernel.tasks, report.tasks),
        ", ".join(names) + times,
    )


def _bar(name: str, share: float, value: str, note: str, kind: str, fill: str = "", title: str = "") -> str:
    style = f"width:{max(share * 100, 0.3):.2f}%" + (f";background:{fill}" if fill else "")
    return (
        f'<div class="row {kind}"><span class="name" title="{escape(title or name)}">{escape(name)}</span>'
        f'<span class="track"><i style="{style}"></i></span>'
        f'<span class="value">{value}</span><span class="note">{note}</span></div>'
    )


def scatter(report: Report) -> str:
    """Return one panel per output: latency against accuracy (or agreement), a numbered point per stage."""
    outputs = list(dict.fromkeys(name for stage in report.stages for name in stage.tasks))
    numbers = {stage.name: n for n, stage in enumerate(report.stages, 1)}
    panels = []
    for output in outputs:
        measure = "accuracy"
        points = _points(report.stages, output, measure)
        if not points:
            measure = "agreement"
            points = _points(report.stages, output, measure)
        if len(points) > 1:
            panels.append(_panel(output, measure, points, numbers, report))
    if not panels:
        return ""
    key = "".join(f"<span><b>{number}</b> {escape(name)}</span>" for name, number in numbers.items())
    return f'<div class="panels">{"".join(panels)}</div><p class="legend">{key}</p>'


def _points(stages: Sequence[Stage], output: str, measure: str) -> list[tuple[Stage, float, float]]:
    found = []
    for stage in stages:
        value = getattr(stage.tasks.get(output), measure, None)
        if stage.latency and value is not None:
            found.append((stage, stage.latency, value))
    return found


def _panel(
    output: str,
    measure: str,
    points: Sequence[tuple[Stage, float, float]],
    numbers: dict[str, int],
    report: Report,
) -> str:
    width, height, left, right, top, bottom = 470, 300, 62, 18, 34, 46
    slowest = max(x for _, x, _ in points) * 1.08
    low, high = min(y for *_, y in points), max(y for *_, y in points)
    margin = max((high - low) * 0.25, 0.004)
    low, high = max(0.0, low - margin), min(1.0, high + margin)
    if high - low < 0.02:
        low = max(0.0, high - 0.02)

    def place(x: float, y: float) -> tuple[float, float]:
        return (
            left + x / slowest * (width - left - right),
            top + (high - y) / (high - low) * (height - top - bottom),
        )

    parts = [f'<text x="{left}" y="18" class="title">{escape(output)}</text>']
    for tick in ticks(low, high):
        _, y = place(0, tick)
        parts.append(f'<path d="M{left} {y:.1f}H{width - right}" class="grid"/>')
        digits = 1 if high - low < 0.1 else 0
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" class="tick end">{text.percent(tick, digits)}</text>')
    for tick in ticks(0, slowest):
        x, _ = place(tick, low)
        label = "0" if tick == 0 else text.seconds(tick)
        parts.append(f'<text x="{x:.1f}" y="{height - bottom + 18}" class="tick middle">{escape(label)}</text>')
    parts.append(f'<path d="M{left} {height - bottom}H{width - right}" class="axis"/>')
    parts.append(f'<text x="{width - right}" y="{height - 8}" class="tick end">latency of all tasks →</text>')
    parts.append(f'<text x="{width - right}" y="18" class="tick end">{measure}</text>')
    own = [place(x, y) for stage, x, y in points if not stage.reference]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in own)
    task_colour = colour([output.partition(":")[0]], report.tasks)
    parts.append(f'<polyline points="{line}" fill="none" stroke="{task_colour}" class="path"/>')
    for stage, latency, value in points:
        x, y = place(latency, value)
        fill = "#94a3b8" if stage.reference else task_colour
        hint = f"{stage.name}: {text.seconds(latency)}, {measure} {text.percent(value)}"
        parts.append(
            f'<g><title>{escape(hint)}</title><circle cx="{x:.1f}" cy="{y:.1f}" r="10" fill="{fill}" stroke="#fff"/>'
            f'<text x="{x:.1f}" y="{y + 4:.1f}" class="mark">{numbers[stage.name]}</text></g>'
        )
    return f'<svg style="max-width:{width}px" viewBox="0 0 {width} {height}" role="img">{"".join(parts)}</svg>'


def ticks(low: float, high: float) -> list[float]:
    """Return round numbers between two, so many as an axis has."""
    step = 10 ** math.floor(math.log10((high - low) / 3))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= 5)
    first = math.ceil(low / step - 1e-9)
    return [n * step for n in range(first, math.floor(high / step + 1e-9) + 1)]


def lanes(report: Report) -> str:
    """Return the network as lanes, one per task; a layer that several tasks share spans their lanes."""
    if not report.layers:
        return ""
    tasks = report.tasks
    columns = sorted({layer.depth for layer in report.layers})
    left, lane, gap, top = 130, 58, 10, 8
    cell = max(6.0, min(64.0, 830 / len(columns)))
    width, height = left + cell * len(columns) + 10, top + (lane + gap) * len(tasks) + 26
    parts = []
    for row, task in enumerate(tasks):
        y = top + row * (lane + gap)
        parts.append(f'<rect x="{left}" y="{y}" width="{cell * len(columns):.1f}" height="{lane}" class="lane"/>')
        fill = colour([task], tasks)
        parts.append(
            f'<text x="{left - 12}" y="{y + lane / 2 + 4}" class="lanename" fill="{fill}">{escape(task)}</text>'
        )
    heaviest = max((layer.macs for layer in report.layers), default=0) or 1
    for first, last in _runs(report.tasks):
        for column, depth in enumerate(columns):
            here = [x for x in report.layers if x.depth == depth and _runs_of(x, tasks, first, last)]
            y = top + first * (lane + gap)
            full = (last - first) * (lane + gap) + lane
            for n, layer in enumerate(here):
                part = full / len(here)
                parts.append(
                    _layer(layer, left + column * cell + 1.5, y + n * part + 1, cell - 3, part - 2, heaviest, tasks)
                )
    parts.append(f'<text x="{left}" y="{height - 8}" class="tick">input</text>')
    parts.append(f'<text x="{width - 10:.0f}" y="{height - 8}" class="tick end">output</text>')
    return f'<svg style="max-width:{width:.0f}px" viewBox="0 0 {width:.0f} {height}" role="img">{"".join(parts)}</svg>'


def _runs(tasks: Sequence[str]) -> list[tuple[int, int]]:
    """Return all spans of neighbouring lanes."""
    return [(first, last) for first in range(len(tasks)) for last in range(first, len(tasks))]


def _runs_of(layer: LayerUse, tasks: Sequence[str], first: int, last: int) -> bool:
    """Return whether lanes ``first`` to ``last`` are a whole run of neighbours that use the layer."""
    used = [task in layer.tasks for task in tasks]
    return (
        all(used[first : last + 1])
        and (first == 0 or not used[first - 1])
        and (last + 1 == len(tasks) or not used[last + 1])
    )


def _layer(
    layer: LayerUse, x: float, y: float, width: float, height: float, heaviest: int, tasks: Sequence[str]
) -> str:
    fill = colour(layer.tasks, tasks)
    # Darker: more work. Never so light that a layer looks absent.
    opacity = 0.35 + 0.65 * math.sqrt(layer.macs / heaviest)
    kind = "int8" if layer.integer else "float"
    made = bool(layer.origins) and layer.name not in layer.origins
    name = f"{layer.name} (of {', '.join(layer.origins)})" if made else layer.name
    hint = f"{name}: {layer.op}, {text.count(layer.macs)} MACs, {kind}, for {', '.join(layer.tasks)}"
    dashes = "" if layer.integer else ' stroke-dasharray="3 2" stroke="#0f172a" stroke-opacity=".55"'
    return (
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}" rx="3" fill="{fill}" '
        f'fill-opacity="{opacity:.2f}"{dashes}><title>{escape(hint)}</title></rect>'
    )
