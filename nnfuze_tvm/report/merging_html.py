"""The report of a merge as one page that needs nothing but itself."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from nnfuze_tvm.report import figures, text
from nnfuze_tvm.report.html import page, section
from nnfuze_tvm.report.merging import MergeReport, worst
from nnfuze_tvm.report.record import Report

_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 320, 62, 18, 26, 44
_LOST = "points lost by the task that lost most"
# What is lost at the beginning is mostly everything: curves are drawn from here down.
_MOST_LOST = 50.0

Points = Sequence[tuple[float, float]]


def render_merge_html(report: MergeReport) -> str:
    """Return the report as an HTML page without any external resource."""
    facts = [f"budget {report.budget:g} points", f"{report.samples} samples", f"{report.epochs} epochs"]
    network = Report(tasks=report.tasks, target="", layers=report.layers)
    drawing = figures.lanes(network)
    numbers = "Numbers are those of the table."
    body = [
        section("Tasks", "As given, and on the trunk that they share.", _tasks(report)),
        section("Tried", "From deep to shallow, until what is lost is within the budget.", _attempts(report)),
        section("Work against what is lost", f"Bottom left is best. {numbers}", _frontier(report)),
        section(
            "How it learnt", f"Of each that was tried, {_LOST}, on samples that are not learnt from.", _curves(report)
        ),
        section(
            "Which layers serve which tasks",
            f"{text.percent(report.shared)} of the multiply-accumulates serve several. The darker the more work.",
            drawing and drawing + figures.legend(network),
        ),
    ]
    return page(" + ".join(report.tasks), facts, "".join(body), f"learnt for {text.duration(report.seconds)}")


def _table(heads: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    head = "".join(f"<th>{escape(name)}</th>" for name in heads)
    lines = (f'<tr class="{kind}">' + "".join(f"<td>{escape(c)}</td>" for c in cells) + "</tr>" for kind, cells in rows)
    return f'<div class="scroll"><table><tr>{head}</tr>{"".join(lines)}</table></div>'


def _tasks(report: MergeReport) -> str:
    rows = [("", [task, report.originals[task].text, report.scores[task].text]) for task in report.tasks]
    total = [f"{text.count(macs)} MACs" for macs in (report.macs_before, report.macs)]
    return _table(["task", "as given", "merged"], [*rows, ("final", ["all together", *total])])


def _attempts(report: MergeReport) -> str:
    rows = []
    for number, one in enumerate(report.attempts, start=1):
        behind = f"{number}: {one.task} behind {one.behind}, instead of {one.instead_of}"
        cells = [behind, text.percent(one.saved), text.count(one.macs), f"{one.fit:.2f}", f"{worst(report, one):.2f}"]
        rows.append(("final" if one.kept else "", [*cells, one.verdict]))
    heads = ["what", "of the task saved", "MACs of all", "fit", "points lost", ""]
    return _table(heads, rows) if rows else "<p>Nothing fits together.</p>"


def _frontier(report: MergeReport) -> str:
    points = [(one.macs / report.macs_before, worst(report, one)) for one in report.attempts]
    if not points:
        return ""
    chart = _Chart(1.0, max([report.budget, *(y for _, y in points)]), "work, of that of the tasks apart")
    chart.level(report.budget, "budget")
    for number, ((x, y), one) in enumerate(zip(points, report.attempts, strict=True), start=1):
        chart.mark(x, y, str(number), "#2563eb" if one.kept else "#94a3b8", f"{one.task} behind {one.behind}")
    return chart.drawn()


def _curves(report: MergeReport) -> str:
    learnt = [(number, one) for number, one in enumerate(report.attempts, start=1) if one.curve]
    if not learnt:
        return ""
    lines = {n: [(p.step / one.steps, max(p.lost.values())) for p in one.curve] for n, one in learnt}
    most = min(_MOST_LOST, max([report.budget, *(y for line in lines.values() for _, y in line)]))
    chart = _Chart(1.0, most, "of the steps made")
    chart.level(report.budget, "budget")
    for number, one in learnt:
        line = [(x, min(y, most)) for x, y in lines[number]]
        fill = "#2563eb" if one.kept else "#94a3b8"
        chart.line(line, fill)
        chart.mark(*line[-1], str(number), fill, f"{one.task} behind {one.behind}")
    return chart.drawn()


class _Chart:
    """Axes from zero on, x in percent, y in points."""

    def __init__(self, right: float, top: float, label: str) -> None:
        self._right, self._high = right, top * 1.1 or 1.0
        self._parts: list[str] = []
        for tick in figures.ticks(0, self._high):
            y = self._place(0, tick)[1]
            self._parts.append(f'<path d="M{_LEFT} {y:.1f}H{_WIDTH - _RIGHT}" class="grid"/>')
            self._parts.append(f'<text x="{_LEFT - 8}" y="{y + 4:.1f}" class="tick end">{tick:g}</text>')
        for tick in figures.ticks(0, right):
            x = self._place(tick, 0)[0]
            name = text.percent(tick, 0)
            self._parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - _BOTTOM + 18}" class="tick middle">{name}</text>')
        base = _HEIGHT - _BOTTOM
        self._parts.append(f'<path d="M{_LEFT} {base}H{_WIDTH - _RIGHT}" class="axis"/>')
        self._parts.append(f'<text x="{_WIDTH - _RIGHT}" y="{_HEIGHT - 8}" class="tick end">{label} →</text>')
        self._parts.append(f'<text x="{_LEFT}" y="14" class="tick">{_LOST}</text>')

    def _place(self, x: float, y: float) -> tuple[float, float]:
        across = _LEFT + x / self._right * (_WIDTH - _LEFT - _RIGHT)
        return across, _TOP + (self._high - max(y, 0.0)) / self._high * (_HEIGHT - _TOP - _BOTTOM)

    def level(self, y: float, name: str) -> None:
        """Draw a line across."""
        at = self._place(0, y)[1]
        dashes = 'stroke="#db2777" stroke-dasharray="4 3"'
        self._parts.append(f'<path d="M{_LEFT} {at:.1f}H{_WIDTH - _RIGHT}" {dashes}><title>{name}</title></path>')

    def line(self, points: Points, fill: str) -> None:
        """Draw a line through points."""
        where = " ".join("{:.1f},{:.1f}".format(*self._place(*point)) for point in points)
        self._parts.append(f'<polyline points="{where}" fill="none" stroke="{fill}" class="path"/>')

    def mark(self, x: float, y: float, name: str, fill: str, hint: str) -> None:
        """Draw a point with a name in it."""
        across, down = self._place(x, y)
        circle = f'<circle cx="{across:.1f}" cy="{down:.1f}" r="10" fill="{fill}" stroke="#fff"/>'
        label = f'<text x="{across:.1f}" y="{down + 4:.1f}" class="mark">{name}</text>'
        self._parts.append(f"<g><title>{escape(hint)}</title>{circle}{label}</g>")

    def drawn(self) -> str:
        """Return the drawing."""
        box = f'style="max-width:{_WIDTH}px" viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img"'
        return f"<svg {box}>{''.join(self._parts)}</svg>"
