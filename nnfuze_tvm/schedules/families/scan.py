"""Loops whose steps wait for each other come as they are to be run: LLVM makes vectors of what lies side by side."""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.rule import Rule

# As `passes.lower.scans` names it.
_ATTRIBUTE = "nnfuze.scan"


def apply(sch: s_tir.Schedule, _hw: Hardware, tunable: bool) -> bool:
    """Leave such a kernel alone; see `Rule` for the contract. There is nothing to sample."""
    return _ATTRIBUTE in sch.mod["main"].attrs


RULE = Rule("scan", apply)
