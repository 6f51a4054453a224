"""What a schedule rule is."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware


@dataclass(frozen=True)
class Rule:
    """How the kernels of one operator family become loops.

    Attributes
    ----------
    name : str
        What reports, manifests and tuning records call it.
    apply : callable
        ``apply(sch, hw, tunable)`` schedules the PrimFunc ``main`` of ``sch`` in place for the machine ``hw`` and
        returns True, or returns False before it has changed anything. Default knobs come from the hardware model;
        with ``tunable`` the same knobs are sampled, so a tuning space is the template itself.
    order : int
        Rules are asked from the smallest to the largest. By default before those that take what is left over.
    """

    name: str
    apply: Callable[[s_tir.Schedule, Hardware, bool], bool]
    order: int = 50
