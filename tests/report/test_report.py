"""The report's views, made from a record without compiling anything."""

from __future__ import annotations

import io
import math
import re
import xml.etree.ElementTree as ElementTree

import pytest
from rich.console import Console

from nnfuze_tvm.report import (
    Budget,
    KernelTime,
    LayerUse,
    Report,
    Stage,
    TaskQuality,
    figures,
    render_html,
    render_kernels,
    render_table,
    text,
)

TASKS = ["keyword", "speaker", "<third>"]


def stage(name: str, latency: float | None = 1e-3, **fields: object) -> Stage:
    tasks = {task: TaskQuality(accuracy=0.9, labelled=10, agreement=0.95) for task in TASKS}
    values = {"macs": 1000, "parameters": 10, "bytes": 2000, "peak_memory": 64, "sparsity": 0.25, **fields}
    return Stage.model_validate({"name": name, "latency": latency, "tasks": tasks, **values})


@pytest.fixture
def report() -> Report:
    layers = [("trunk", TASKS, 0), ("pair", [TASKS[0], TASKS[2]], 1), ("own", [TASKS[1]], 1)]
    return Report(
        tasks=TASKS,
        target="host",
        measured_on="a machine",
        stages=[stage("other", 4e-3, reference=True), stage("separate", 2e-3), stage("int8", 5e-4)],
        kernels=[KernelTime(name=f"kernel<{n}>", calls=1, seconds=1e-6 * n, tasks=TASKS[:1]) for n in range(1, 20)],
        layers=[
            LayerUse(name=n, op="matmul", macs=100, parameters=5, integer=n != "own", tasks=tasks, depth=depth)
            for n, tasks, depth in layers
        ],
        versions={"nnfuze-tvm": "1"},
    )


def shown(renderable: object) -> str:
    console = Console(width=120, record=True, file=io.StringIO())
    console.print(renderable)
    return console.export_text()


def test_json_round_trip(report: Report) -> None:
    again = Report.model_validate_json(report.to_json())
    assert again == report
    assert again.final.name == "int8"
    assert again.float_layers == ["own"]
    assert again.final.throughput == pytest.approx(2000)


def test_table(report: Report) -> None:
    table = shown(render_table(report))
    for expected in ("separate", "int8", "500 µs", "2000/s", "2 KB", "25.0 %", "90.0 %", "95.0 %"):
        assert expected in table
    bare = Report(tasks=["a"], target="aarch64", stages=[Stage(name="merged", macs=10)])
    table = shown(render_table(bare))
    assert "MACs" in table
    assert "latency" not in table


def test_kernels_by_time(report: Report) -> None:
    lines = shown(render_kernels(report.kernels)).splitlines()
    names = [line for line in lines if "kernel<" in line]
    assert "kernel<19>" in names[0]
    assert "kernel<1>" in names[-1]


def test_page_needs_nothing_but_itself(report: Report) -> None:
    page = render_html(report)
    assert not re.search(r"https?:|url\(|@import|<script|<link|<img|\bsrc=", page)
    assert "&lt;third&gt;" in page
    assert "<third>" not in page
    assert "kernel<" not in page
    for heading in ("Stages", "Latency against accuracy", "Which layers serve", "Where the time goes"):
        assert heading in page
    assert "1 of 3 layers: <code>own</code>" in page
    assert "8.00×" in page


def test_figures_are_well_formed(report: Report) -> None:
    for figure in (figures.scatter(report), figures.lanes(report), figures.latency_bars(report)):
        ElementTree.fromstring(f"<div>{figure}</div>")


def test_lanes_of_tasks_that_are_no_neighbours(report: Report) -> None:
    drawing = ElementTree.fromstring(figures.lanes(report))
    blocks = [rect for rect in drawing.iter("rect") if rect.find("title") is not None]
    # the trunk spans three lanes at once; the pair's lanes are apart, so it is drawn in both
    assert [str(block.findtext("title")).partition(":")[0] for block in blocks].count("pair") == 2
    assert len(blocks) == 4


def test_page_of_a_build_that_was_not_measured() -> None:
    bare = Report(tasks=["a"], target="aarch64", stages=[Stage(name="merged", macs=10, bytes=5)])
    page = render_html(bare)
    assert "10" in page
    assert "Latency against accuracy" not in page
    assert "Where the time goes" not in page


def test_stages_of_one_figure() -> None:
    same = Report(tasks=TASKS, target="host", stages=[stage("separate"), stage("merged")])
    ElementTree.fromstring(f"<div>{figures.scatter(same)}</div>")


def test_numbers_as_people_read_them() -> None:
    assert text.seconds(1.5) == "1.50 s"
    assert text.seconds(0.0123) == "12.3 ms"
    assert text.seconds(4.2e-5) == "42 µs"
    assert text.count(19_520_000) == "19.5 M"
    assert text.size(149_344) == "149 KB"
    assert text.size(12) == "12 B"
    assert (text.size(999_700), text.count(999_700), text.count(999)) == ("1 MB", "1 M", "999")
    assert text.percent(0.9581) == "95.8 %"
    assert text.ratio(4.687) == "4.69×"
    assert text.quality(TaskQuality(error=0.01)) == "error 0.01"
    assert text.quality(TaskQuality(agreement=1.0)) == "100.0 % agree"
    assert text.quality(None) == text.seconds(None) == text.count(None) == "–"


def test_what_stayed_in_float_is_one_line() -> None:
    def layer(name: str, reason: str = "") -> LayerUse:
        return LayerUse(
            name=name, op="matmul", macs=1, parameters=1, integer=not reason, tasks=["a"], depth=1, reason=reason
        )

    report = Report(tasks=["a"], target="host", layers=[layer("fine")])
    assert text.left_in_float(report) == ""
    report.layers += [layer("odd", "it is odd"), *(layer(f"m{n}", "its weights are not constant") for n in range(5))]
    assert text.left_in_float(report) == (
        "6 of 7 layers stay in float32: m0, m1, m2 and 2 more (its weights are not constant); odd (it is odd)"
    )


@pytest.mark.parametrize(("before", "after", "said"), [(1e-3, 9e-4, ""), (1e-3, 9.9e-4, "-1%"), (1e-3, 1.2e-3, "+20%")])
def test_tuning_that_gained_nothing_is_said(before: float, after: float, said: str) -> None:
    stages = [Stage(name="ONNX Runtime", reference=True), Stage(name="int8", latency=before)]
    tuned = Report(tasks=["a"], target="host", stages=[*stages, Stage(name="tuned", latency=after)])
    line = text.no_gain(tuned)
    assert said in line and bool(line) == bool(said)
    assert text.no_gain(Report(tasks=["a"], target="host", stages=stages)) == ""
    assert text.no_gain(Report(tasks=["a"], target="host", stages=[Stage(name="tuned", latency=after)])) == ""


def budget(**fields: object) -> Budget:
    values = {"before": {"a:y": 0.3, "a:z": 0.01}, "after": {"a:y": 0.04, "a:z": 0.01}, "layers": {}, "policy": {}}
    return Budget.model_validate({"max_error": 0.05, "samples": 8, **values, **fields})


def test_what_a_budget_took_is_one_line() -> None:
    def layer(name: str, reason: str = "") -> LayerUse:
        return LayerUse(
            name=name, op="matmul", macs=1, parameters=1, integer=not reason, tasks=["a"], depth=1, reason=reason
        )

    report = Report(tasks=["a"], target="host", stages=[stage("int8")])
    report.layers = [layer("fine"), layer("<bad>", "8 bits"), layer("odd", "it is odd")]
    assert text.within_budget(report) == ""
    report.budget = budget(layers={"<bad>": 0.29})
    line = "auto: error 0.04 instead of 0.3, 0.05 allowed: 1 of 3 layers stay in float32: <bad> (0.29 alone)"
    assert text.within_budget(report) == line
    assert text.left_in_float(report) == "1 of 3 layers stay in float32: odd (it is odd)"
    page = render_html(report)
    assert "&lt;bad&gt;</td><td>0.29</td>" in page and "a:y</td><td>0.3</td><td>0.04</td>" in page
    report.budget = budget(layers={"<bad>": 0.29}, after={"a:y": 0.2, "a:z": 0.01})
    assert "0.05 allowed: no choice is within it; 1 of 3 layers" in text.within_budget(report)
    report.budget = budget(before={"a:y": math.inf}, after={"a:y": math.inf})
    assert text.within_budget(report) == "auto: error inf, 0.05 allowed: no choice is within it"
    assert Report.model_validate_json(report.to_json()) == report
    report.budget = budget(before={"a:y": 0.02}, after={"a:y": 0.02})
    assert text.within_budget(report) == "auto: error 0.02, 0.05 allowed: no layer has to stay in float32 for it"
