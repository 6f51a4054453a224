"""Figures of the benchmarks, by matplotlib."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.engines.base import INSTALL
from nnfuze_tvm.errors import InputError

FORMATS = (".png", ".svg", ".pdf")

# Figures by series, and by label within a series.
Series = Mapping[str, Mapping[str, float]]


def check(path: Path) -> None:
    """Say now, not after an hour of measuring, that a figure can't be drawn.

    Raises
    ------
    InputError
        If matplotlib is missing, or the file's ending is not one of `FORMATS`.
    """
    if path.suffix.lower() not in FORMATS:
        raise InputError(f"--plot {path}: use a file name that ends in {', '.join(FORMATS)}")
    if find_spec("matplotlib") is None:
        raise InputError(f"--plot {path}: needs matplotlib; {INSTALL}")


def bars(path: Path, title: str, ratios: Mapping[str, Series], latencies: Mapping[str, Series]) -> None:
    """Draw, per precision, how many times as fast as the best peer we are, and below it everybody's latency.

    Parameters
    ----------
    path : Path
        Where to.
    title : str
        Of the figure.
    ratios, latencies : mapping
        Per precision: factors, and seconds, by engine and network.
    """
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(name for s in latencies.values() for values in s.values() for name in values))
    figure = Figure(figsize=(max(8.0, 1.3 * len(labels)) * len(latencies), 8.0), layout="constrained")
    figure.suptitle(title)
    axes = figure.subplots(2, len(latencies), squeeze=False)
    for column, precision in enumerate(latencies):
        above, below = axes[0][column], axes[1][column]
        _grouped(above, labels, ratios.get(precision, {}))
        above.axhline(1.0, color="black", linewidth=0.8)
        above.set_title(precision)
        above.set_ylabel("best peer's latency / ours")
        _grouped(below, labels, {k: {n: v * 1e3 for n, v in s.items()} for k, s in latencies[precision].items()})
        below.set_yscale("log")
        below.set_ylabel("latency, ms")
    figure.savefig(path, dpi=120)


def rates(path: Path, title: str, label: str, panels: Mapping[str, Series]) -> None:
    """Draw figures by engine and network, one panel below the other; more is better."""
    from matplotlib.figure import Figure

    labels = list(dict.fromkeys(name for s in panels.values() for values in s.values() for name in values))
    figure = Figure(figsize=(max(8.0, 1.3 * len(labels)), 3.0 * len(panels)), layout="constrained")
    figure.suptitle(title)
    for axis, (name, series) in zip(figure.subplots(len(panels), squeeze=False)[:, 0], panels.items(), strict=True):
        _grouped(axis, labels, series)
        axis.set_title(name)
        axis.set_ylabel(label)
    figure.savefig(path, dpi=120)


def curves(path: Path, title: str, series: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw seconds over trials per kernel, one falling staircase per tuner."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8.0, 5.0), layout="constrained")
    axis = figure.subplots()
    for name, points in series.items():
        axis.step([n for n, _ in points], [1e3 * seconds for _, seconds in points], where="post", label=name)
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xlabel("trials per kernel")
    axis.set_ylabel("sum over the kernels, ms")
    axis.set_title(title)
    axis.grid(True, which="both", linewidth=0.3)
    axis.legend()
    figure.savefig(path, dpi=120)


def _grouped(axis: Any, labels: Sequence[str], series: Series) -> None:
    width = 0.8 / max(1, len(series))
    for n, (name, values) in enumerate(series.items()):
        places = [place + (n - (len(series) - 1) / 2) * width for place, label in enumerate(labels) if label in values]
        axis.bar(places, [values[label] for label in labels if label in values], width, label=name)
    axis.set_xticks(range(len(labels)), labels, rotation=30, ha="right")
    axis.grid(True, axis="y", linewidth=0.3)
    axis.set_axisbelow(True)
    if series:
        axis.legend()
