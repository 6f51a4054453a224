"""What each device did for a tuning job."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from nnfuze_tvm.jobs.tuning.journal import Trial


@dataclass
class Usage:
    """The work of one device.

    Attributes
    ----------
    device : str
        ``host:port``.
    trials : int
        Candidates that it gave a result for, failures included.
    failed : int
        Those among them that did not run.
    lost : int
        Times that it went away with a candidate, which was then measured again.
    """

    device: str
    trials: int = 0
    failed: int = 0
    lost: int = 0


def usage(trials: Iterable[Trial]) -> list[Usage]:
    """Return what every device did, in the order of its first trial; candidates that didn't compile had none."""
    found: dict[str, Usage] = {}
    for trial in trials:
        for device in trial.lost:
            found.setdefault(device, Usage(device)).lost += 1
        if trial.device is not None:
            one = found.setdefault(trial.device, Usage(trial.device))
            one.trials += 1
            one.failed += trial.seconds is None
    return list(found.values())
