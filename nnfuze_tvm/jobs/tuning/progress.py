"""What a tuning job shows while it runs."""

from __future__ import annotations

from collections.abc import Sequence

from rich import progress

from nnfuze_tvm.jobs.tuning.kernels import TunableKernel
from nnfuze_tvm.report.names import short_names

# With more kernels than this the terminal shows only those that are being tuned.
_SHOWN = 16


class Progress:
    """What a job tells a display; this one shows nothing."""

    def start(self, kernels: Sequence[TunableKernel], totals: Sequence[int], done: Sequence[int]) -> None:
        """Begin; ``totals`` and ``done`` are trials per kernel."""

    def trial(self, kernel: TunableKernel, best: float | None) -> None:
        """Count one trial of ``kernel``, whose best time is now ``best`` seconds."""

    def total(self, kernel: TunableKernel, total: int) -> None:
        """Correct the number of trials of ``kernel``: its space is smaller than thought."""

    def say(self, text: str) -> None:
        """Show a line about the devices."""

    def stop(self) -> None:
        """End."""


class Bars(Progress):
    """A bar for the job, with the time left, and one for each kernel, with its best time so far."""

    def __init__(self) -> None:
        self._bars = progress.Progress(
            progress.TextColumn("{task.description}", markup=False),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TextColumn("{task.fields[best]}"),
            progress.TimeRemainingColumn(elapsed_when_finished=True),
            # Each drawing takes some milliseconds of a CPU that compiles or measures.
            refresh_per_second=2,
        )
        self._tasks: dict[str, progress.TaskID] = {}
        self._totals: dict[str, int] = {}

    def start(self, kernels: Sequence[TunableKernel], totals: Sequence[int], done: Sequence[int]) -> None:
        """Show the bars; ``totals`` and ``done`` are trials per kernel."""
        self._all = self._bars.add_task("all kernels", total=sum(totals), completed=sum(done), best="")
        short = short_names(kernel.name for kernel in kernels)
        for kernel, total, before in zip(kernels, totals, done, strict=True):
            label = f"{short[kernel.name]} x{kernel.weight}"
            self._tasks[kernel.id] = self._bars.add_task(
                label, total=total, completed=before, best="", visible=len(kernels) <= _SHOWN
            )
            self._totals[kernel.id] = total
        self._bars.start()

    def trial(self, kernel: TunableKernel, best: float | None) -> None:
        """Count one trial of ``kernel``, whose best time is now ``best`` seconds."""
        if len(self._tasks) > _SHOWN:
            for id_, task in self._tasks.items():
                self._bars.update(task, visible=id_ == kernel.id)
        text = "" if best is None else f"{best * 1e6:,.1f} us"
        self._bars.update(self._tasks[kernel.id], advance=1, best=text)
        self._bars.update(self._all, advance=1)

    def total(self, kernel: TunableKernel, total: int) -> None:
        """Correct the number of trials of ``kernel``: its space is smaller than thought."""
        self._totals[kernel.id] = total
        self._bars.update(self._tasks[kernel.id], total=total)
        self._bars.update(self._all, total=sum(self._totals.values()))

    def say(self, text: str) -> None:
        """Print a line above the bars."""
        self._bars.console.print(text, markup=False, highlight=False)

    def stop(self) -> None:
        """Leave the bars as they are."""
        self._bars.stop()
