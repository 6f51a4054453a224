"""Numbers as people read them."""

from __future__ import annotations

from nnfuze_tvm.reading.memory import readable
from nnfuze_tvm.report.record import Report, TaskQuality

NOTHING = "–"
# So many layers are named per reason; the JSON has them all.
_NAMED = 3
# So much do two measurements of one network differ.
_NOISE = 0.02


def duration(seconds: float) -> str:
    """Return how long something takes, in seconds or minutes."""
    return f"{seconds:.0f} s" if seconds < 90 else f"{seconds / 60:.0f} min"


def seconds(value: float | None) -> str:
    """Return a duration with a fitting unit."""
    if value is None:
        return NOTHING
    if value >= 1:
        return f"{value:.2f} s"
    return f"{value * 1e3:.3g} ms" if value >= 1e-3 else f"{value * 1e6:.3g} µs"


def count(value: float | None, unit: str = "") -> str:
    """Return a count with k, M or G."""
    if value is None:
        return NOTHING
    for factor, prefix in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if value >= 0.9995 * factor:
            return f"{value / factor:.3g} {prefix}{unit}".strip()
    return f"{value:.0f} {unit}".strip()


def size(value: int | None) -> str:
    """Return bytes with a fitting unit."""
    return NOTHING if value is None else readable(value)


def rate(value: float | None) -> str:
    """Return inferences per second."""
    return NOTHING if value is None else f"{value:.0f}/s" if value >= 10 else f"{value:.2g}/s"


def percent(value: float | None, digits: int = 1) -> str:
    """Return a fraction as a percentage."""
    return NOTHING if value is None else f"{value:.{digits}%}".replace("%", " %")


def ratio(value: float) -> str:
    """Return a factor."""
    return f"{value:.2f}×" if value < 10 else f"{value:.1f}×"


def threads(value: int) -> str:
    """Return a number of threads."""
    return f"{value} thread" + "s" * (value > 1)


def accuracy(value: TaskQuality | None) -> str:
    """Return the accuracy on the labelled samples."""
    return NOTHING if value is None else percent(value.accuracy)


def agreement(value: TaskQuality | None) -> str:
    """Return the agreement with the original; the relative error where there are no classes."""
    if value is None:
        return NOTHING
    if value.agreement is not None:
        return percent(value.agreement)
    return NOTHING if value.error is None else f"error {value.error:.1g}"


def quality(value: TaskQuality | None) -> str:
    """Return the most telling figure of a quality: accuracy, else agreement, else the relative error."""
    if value is None:
        return NOTHING
    if value.accuracy is not None:
        return percent(value.accuracy)
    return agreement(value) + (" agree" if value.agreement is not None else "")


def left_in_float(report: Report) -> str:
    """Return one line about layers that should have been quantized and were not; empty if there are none."""
    by_reason: dict[str, list[str]] = {}
    told = {} if report.budget is None else report.budget.layers
    for layer in report.layers:
        if layer.reason and layer.name not in told:
            by_reason.setdefault(layer.reason, []).append(layer.name)
    groups = []
    for reason, names in sorted(by_reason.items(), key=lambda item: -len(item[1])):
        more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
        groups.append(f"{', '.join(names[:_NAMED])}{more} ({reason})")
    left = sum(map(len, by_reason.values()))
    return f"{left} of {len(report.layers)} layers stay in float32: {'; '.join(groups)}" if groups else ""


def no_gain(report: Report) -> str:
    """Return one line about tuning that made nothing faster that can be told; empty if it did or nothing is known."""
    *_, before, after = [None, None, *report.own]
    if after is None or after.name != "tuned" or before is None or not before.latency or not after.latency:
        return ""
    if after.latency < (1 - _NOISE) * before.latency:
        return ""
    change = after.latency / before.latency - 1
    return (
        f"tuning gained nothing that can be told from noise ({seconds(after.latency)}, {seconds(before.latency)} "
        f"before it: {change:+.0%}); each kernel has the settings that were fastest, perhaps those it had"
    )


def within_budget(report: Report) -> str:
    """Return one line about the layers that stay float for a budget of accuracy; empty if there is none."""
    budget = report.budget
    if budget is None:
        return ""
    before, after = (max(errors.values(), default=0.0) for errors in (budget.before, budget.after))
    allowed, missed = f"{budget.max_error:g} allowed", "no choice is within it" if after > budget.max_error else ""
    if not budget.layers:
        return f"auto: error {before:.2g}, {allowed}: {missed or 'no layer has to stay in float32 for it'}"
    names = sorted(budget.layers, key=lambda name: -budget.layers[name])
    listed = ", ".join(f"{name} ({budget.layers[name]:.2g} alone)" for name in names[:_NAMED])
    more = f" and {len(names) - _NAMED} more" if len(names) > _NAMED else ""
    return (
        f"auto: error {after:.2g} instead of {before:.2g}, {allowed}: {missed}{'; ' * bool(missed)}"
        f"{len(names)} of {len(report.layers)} layers stay in float32: {listed}{more}"
    )
