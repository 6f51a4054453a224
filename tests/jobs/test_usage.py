"""What the devices of a job did, from its journal."""

from __future__ import annotations

from nnfuze_tvm.jobs.fleet import Usage, usage
from nnfuze_tvm.jobs.tuning import Trial


def trial(device: str | None, ran: bool, lost: tuple[str, ...] = ()) -> Trial:
    return Trial("k", (0,), [1.0] if ran else None, None if ran else "why", device, "r", "c", 1.0, 2.0, [], lost)


def test_results_failures_and_losses_are_counted() -> None:
    trials = [
        trial("a", True),
        trial("b", False),
        trial("a", True, ("b",)),
        trial(None, False),
        trial("b", False, ("c", "b")),
    ]
    assert usage(trials) == [Usage("a", 2, 0, 0), Usage("b", 2, 2, 2), Usage("c", 0, 0, 1)]
