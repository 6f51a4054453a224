"""What a merge of networks that were trained apart achieved: as a record, as JSON, and as tables."""

from __future__ import annotations

from pydantic import Field
from rich.table import Table

from nnfuze_tvm.report import text
from nnfuze_tvm.report.names import short_names
from nnfuze_tvm.report.record import LayerUse, Record


class TaskScore(Record):
    """How a task is answered: agreement with the original on samples that were held back, accuracy, both in percent."""

    agreement: float
    accuracy: float | None = None

    @property
    def text(self) -> str:
        """Both, as people read them."""
        agreed = f"{self.agreement:.2f} % agree"
        return agreed if self.accuracy is None else f"{self.accuracy:.2f} % right, {agreed}"


class CurvePoint(Record):
    """After how many steps, the mean loss since the point before, and the points lost by task."""

    step: int
    loss: float
    lost: dict[str, float]


class Attempt(Record):
    """One task's rest behind another's beginning.

    Attributes
    ----------
    donor, task : str
        Whose beginning and whose rest.
    behind, instead_of : str
        The last layers in front of both cuts.
    saved : float
        The part of the task's own multiply-accumulates that is in front of its cut.
    macs : int
        What all tasks together compute then, with what was shared before.
    fit : float
        How much of the features that are replaced a stitch explained before anything was learnt (R²).
    before, after : dict
        By task, with the stitch alone and when learning ended.
    kept : bool
        It was within the budget.
    steps : int
        How many there were to be; the curve ends before where it was given up.
    curve : list of CurvePoint
        How it learnt.
    """

    donor: str
    task: str
    behind: str
    instead_of: str
    saved: float
    macs: int
    fit: float
    before: dict[str, TaskScore]
    after: dict[str, TaskScore]
    kept: bool
    steps: int
    curve: list[CurvePoint] = Field(default_factory=list)

    @property
    def verdict(self) -> str:
        """What became of it, in a word or two."""
        if self.kept:
            return "kept"
        return "given up" if self.curve and self.curve[-1].step < self.steps else "too much lost"


class MergeReport(Record):
    """What a merge achieved.

    Attributes
    ----------
    tasks : list of str
        The tasks.
    budget : float
        How many points a task might lose: of accuracy where there were labels, else of agreement.
    samples : int
        How many there were, a tenth of which was held back.
    epochs, seed, threads : int
        How it was learnt.
    seconds : float
        For how long.
    macs_before, macs : int
        Multiply-accumulates of all tasks, as given and as they are now.
    originals, scores : dict
        By task, as given and as they are now.
    attempts : list of Attempt
        What was tried.
    layers : list of LayerUse
        What the merged network computes for whom.
    """

    tasks: list[str]
    budget: float
    samples: int
    epochs: int
    seed: int
    threads: int
    seconds: float
    macs_before: int
    macs: int
    originals: dict[str, TaskScore]
    scores: dict[str, TaskScore]
    attempts: list[Attempt]
    layers: list[LayerUse]

    @property
    def shared(self) -> float:
        """The part of the merged network's work that serves several tasks."""
        total = sum(layer.macs for layer in self.layers) or 1
        return sum(layer.macs for layer in self.layers if len(layer.tasks) > 1) / total

    def to_json(self) -> str:
        """Return the report as JSON text."""
        return self.model_dump_json(indent=1) + "\n"


def render_merge(report: MergeReport) -> list[Table | str]:
    """Return what was tried and what came of it."""
    tried = Table(title="tried", title_justify="left", header_style="bold")
    for name in ("task", "goes on behind", "instead of"):
        tried.add_column(name, overflow="fold")
    for name in ("MACs", "fit", *(f"{task} lost" for task in report.tasks), "steps"):
        tried.add_column(name, justify="right")
    tried.add_column("")
    short = short_names(name for one in report.attempts for name in (one.behind, one.instead_of))
    for one in report.attempts:
        tried.add_row(
            one.task,
            short[one.behind],
            short[one.instead_of],
            text.count(one.macs),
            f"{one.fit:.2f}",
            *(_lost(report, one, task) for task in report.tasks),
            f"{one.curve[-1].step if one.curve else 0} of {one.steps}",
            one.verdict,
            style="bold" if one.kept else "",
        )
    tasks = Table(title="tasks", title_justify="left", header_style="bold")
    for name in ("task", "as given", "merged"):
        tasks.add_column(name)
    for task in report.tasks:
        tasks.add_row(task, report.originals[task].text, report.scores[task].text)
    line = (
        f"{text.count(report.macs)} MACs of {text.count(report.macs_before)}; {text.percent(report.shared)} of them "
        f"serve several tasks; learnt for {text.duration(report.seconds)} from {report.samples} samples"
    )
    return [*([tried] if report.attempts else []), tasks, line]


def _lost(report: MergeReport, one: Attempt, task: str) -> str:
    return text.NOTHING if task not in one.after else f"{points_lost(report, one, task):.2f}"


def worst(report: MergeReport, one: Attempt) -> float:
    """Return how many points the task lost that lost most."""
    return max(points_lost(report, one, task) for task in one.after)


def points_lost(report: MergeReport, one: Attempt, task: str) -> float:
    """Return how many points a task lost in an attempt, of accuracy where there are labels."""
    before, after = report.originals[task], one.after[task]
    if before.accuracy is not None and after.accuracy is not None:
        return before.accuracy - after.accuracy
    return before.agreement - after.agreement
