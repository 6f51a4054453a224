"""A report as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nnfuze_tvm.report import figures, text
from nnfuze_tvm.report.names import short_names
from nnfuze_tvm.report.record import Report, Stage, TaskQuality

_STYLE = """
:root{color-scheme:light}
*{box-sizing:border-box}
body{margin:0;background:#f1f5f9;color:#0f172a;
  font:15px/1.5 system-ui,-apple-system,"Segoe UI",Roboto,"DejaVu Sans",sans-serif}
main{max-width:1040px;margin:0 auto;padding:32px 20px 60px}
h1{font-size:26px;margin:0 0 4px}
h2{font-size:17px;margin:0 0 4px}
.sub{color:#64748b;margin:0 0 20px}
section p.sub{font-size:13px;margin-bottom:14px}
section{background:#fff;border:1px solid #e2e8f0;border-radius:12px;padding:20px 22px;margin:16px 0}
.cards{display:grid;grid-template-columns:repeat(auto-fit,minmax(165px,1fr));gap:12px}
.card{background:#fff;border:1px solid #e2e8f0;border-radius:12px;padding:14px 16px}
.card b{display:block;font-size:25px;line-height:1.25}
.card span{color:#64748b;font-size:13px}
.scroll{overflow-x:auto}
table{border-collapse:collapse;width:100%;font-variant-numeric:tabular-nums}
th{font-size:12px;font-weight:600;color:#64748b;text-align:right;padding:6px 8px;border-bottom:1px solid #cbd5e1}
td{text-align:right;padding:7px 8px;border-bottom:1px solid #f1f5f9;white-space:nowrap}
td small{display:block;color:#64748b;font-size:11.5px}
th:first-child,td:first-child{text-align:left;white-space:normal}
tr.final td{background:#eff6ff;font-weight:600}
tr.final small{font-weight:400}
tr.reference td{color:#64748b}
.bars .row{display:grid;grid-template-columns:minmax(80px,24%) minmax(60px,1fr) 70px 56px;
  gap:12px;align-items:center;margin:7px 0}
.bars.kernels .row{grid-template-columns:minmax(80px,31%) minmax(60px,1fr) 70px 56px;margin:4px 0}
.name{overflow:hidden;text-overflow:ellipsis;white-space:nowrap;font-size:14px}
.kernels .name{font:12.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace}
.track{background:#f1f5f9;border-radius:5px;height:22px;display:block}
.kernels .track{height:15px}
.track i{display:block;height:100%;border-radius:5px;background:#93c5fd;min-width:2px}
.reference .track i{background:#cbd5e1}
.final .track i{background:#2563eb}
.final .name{font-weight:600}
.value,.note{text-align:right;font-variant-numeric:tabular-nums}
.note{color:#64748b;font-size:13px}
.final .note{color:#1d4ed8;font-weight:600}
.panels{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(420px,100%),1fr));gap:10px}
svg{width:100%;height:auto;display:block}
svg text{font-family:inherit}
.title{font-size:15px;font-weight:600}
.tick{font-size:11.5px;fill:#64748b}
.end{text-anchor:end}
.middle{text-anchor:middle}
.grid{stroke:#e2e8f0}
.axis{stroke:#94a3b8}
.path{stroke-width:2;stroke-opacity:.35}
.mark{font-size:11.5px;font-weight:700;fill:#fff;text-anchor:middle}
.lane{fill:#f8fafc}
.lanename{font-size:14px;font-weight:600;text-anchor:end}
.legend{display:flex;flex-wrap:wrap;gap:6px 18px;color:#334155;font-size:13px;margin:12px 0 0}
.legend i{display:inline-block;width:11px;height:11px;border-radius:3px;margin-right:6px}
.legend b{display:inline-block;min-width:17px;padding:0 4px;border-radius:9px;background:#e2e8f0;text-align:center;
  font-size:11.5px}
code{font:12.5px ui-monospace,Menlo,Consolas,"DejaVu Sans Mono",monospace;overflow-wrap:anywhere}
footer{color:#94a3b8;font-size:12.5px;margin-top:24px}
"""


def render_html(report: Report) -> str:
    """Return the report as an HTML page without any external resource."""
    title = " + ".join(report.tasks)
    facts = [f"target {report.target}", text.threads(report.threads)]
    if report.measured_on:
        facts.append(f"measured on {report.measured_on}")
    if report.check is not None:
        facts.append(f"check: {report.check.text}")
    sections = [
        section("Stages", "Each row adds one step to the row above it.", _stages(report)),
        section("Latency", "One inference of all tasks, median.", figures.latency_bars(report)),
        section(
            "Latency against accuracy",
            f"Top left is best. {report.data}".strip(),
            figures.scatter(report),
        ),
        section("Which layers serve which tasks", _sharing_text(report), _sharing(report)),
        section(
            "Where the time goes",
            f"Kernels of the final stage ({report.final.name}), each timed alone on warm caches.",
            figures.kernel_bars(report) and figures.kernel_bars(report) + figures.legend(report),
        ),
        section("What stayed in floating point", text.within_budget(report), _float_layers(report) + _budget(report)),
    ]
    versions = ", ".join(f"{name} {version}" for name, version in report.versions.items())
    return page(title, facts, _cards(report) + "".join(sections), versions)


def page(title: str, facts: Sequence[str], body: str, versions: str) -> str:
    """Return a page that needs nothing but itself; ``body`` is HTML, the rest is text."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f"<title>{escape(title)} – nnfuze</title><style>{_STYLE}</style></head><body><main>"
        f'<h1>{escape(title)}</h1><p class="sub">{escape(" · ".join(facts))}</p>'
        f"{body}<footer>nnfuze · {escape(versions)}</footer></main></body></html>\n"
    )


def section(title: str, subtitle: str, body: str) -> str:
    """Return a part of a page, nothing where there is nothing to show."""
    if not body:
        return ""
    sub = f'<p class="sub">{escape(subtitle)}</p>' if subtitle else ""
    return f"<section><h2>{escape(title)}</h2>{sub}{body}</section>"


def _cards(report: Report) -> str:
    final = report.final
    first = next((stage for stage in report.stages if stage.latency), final)
    cards = []
    if final.latency:
        cards.append((text.seconds(final.latency), f"per inference, {text.rate(final.throughput)}"))
        if first is not final and first.latency:
            cards.append((text.ratio(first.latency / final.latency), f"as fast as {first.name}"))
    start = report.own[0]
    for value, before, show, what in (
        (final.bytes, start.bytes, text.size, "on disk"),
        (final.macs, start.macs, text.count, "MACs"),
        (final.peak_memory, start.peak_memory, text.size, "peak activations"),
    ):
        if value is not None:
            was = f", from {show(before)}" if before and before != value else ""
            cards.append((show(value), what + was))
    return (
        '<div class="cards">'
        + "".join(f'<div class="card"><b>{b}</b><span>{escape(s)}</span></div>' for b, s in cards)
        + "</div>"
    )


def _stages(report: Report) -> str:
    outputs = list(dict.fromkeys(name for stage in report.stages for name in stage.tasks))
    heads = ["stage", "latency", "MACs", "parameters", "on disk", "weights in memory", "peak memory", "zero weights"]
    rows = []
    for stage in report.stages:
        kind = "reference" if stage.reference else "final" if stage is report.final else ""
        cells = [*_cells(stage), *(_quality(stage.tasks.get(name)) for name in outputs)]
        rows.append(f'<tr class="{kind}">' + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{escape(name)}</th>" for name in [*heads, *outputs])
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(rows)}</table></div>'


def _cells(stage: Stage) -> list[str]:
    p95 = f"p95 {text.seconds(stage.latency_p95)}, " if stage.latency_p95 else ""
    spread = f"<small>{p95}{text.rate(stage.throughput)}</small>" if stage.latency else ""
    stored = f"<small>{text.size(stage.parameter_bytes)}</small>" if stage.parameter_bytes else ""
    return [
        escape(stage.name),
        text.seconds(stage.latency) + spread,
        text.count(stage.macs),
        text.count(stage.parameters) + stored,
        text.size(stage.bytes),
        text.size(stage.weight_memory),
        text.size(stage.peak_memory),
        text.percent(stage.sparsity),
    ]


def _quality(value: TaskQuality | None) -> str:
    if value is None:
        return text.NOTHING
    notes = []
    if value.accuracy is not None and value.agreement is not None:
        notes.append(f"{text.percent(value.agreement)} agree")
    return escape(text.quality(value)) + "".join(f"<small>{escape(note)}</small>" for note in notes)


def _sharing_text(report: Report) -> str:
    total = sum(layer.macs for layer in report.layers)
    if not total or len(report.tasks) == 1:
        return "A block per layer, the darker the more work; dashed: floating point."
    shared = [layer for layer in report.layers if len(layer.tasks) > 1]
    share = sum(layer.macs for layer in shared) / total
    return (
        f"{len(shared)} of {len(report.layers)} layers serve several tasks: {text.percent(share)} of the MACs. "
        "A block per layer, the darker the more work; dashed: floating point."
    )


def _sharing(report: Report) -> str:
    drawing = figures.lanes(report)
    return drawing and drawing + figures.legend(report)


def _float_layers(report: Report) -> str:
    names = report.float_layers
    if not report.layers or len(names) == len(report.layers):
        return ""
    if not names:
        return "<p>Nothing: every layer computes on integers.</p>"
    short = short_names(layer.name for layer in report.layers)
    listed = ", ".join(escape(name) if short[name] == name else _abbreviated(name, short[name]) for name in names)
    return f"<p>{len(names)} of {len(report.layers)} layers: <code>{listed}</code></p>"


def _budget(report: Report) -> str:
    """Return the errors of the outputs, and of the layers that stay float for them."""
    budget = report.budget
    if budget is None:
        return ""
    rows = [(name, f"{budget.before[name]:.2g}", f"{budget.after[name]:.2g}") for name in budget.before]
    rows += [(name, f"{error:.2g}", text.NOTHING) for name, error in budget.layers.items()]
    cells = "".join(f"<tr><td>{escape(n)}</td><td>{before}</td><td>{after}</td></tr>" for n, before, after in rows)
    head = "<tr><th>output, or layer alone</th><th>error in 8 bits</th><th>as built</th></tr>"
    return f'<div class="scroll"><table>{head}{cells}</table></div>'


def _abbreviated(name: str, short: str) -> str:
    return f'<span title="{escape(name)}">{escape(short)}</span>'
