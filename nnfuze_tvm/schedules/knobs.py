"""Knobs: how a rule's decisions are made, and where a kernel keeps what was decided."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

from tvm import s_tir, tirx

from nnfuze_tvm.schedules.blocks import root

Choice = TypeVar("Choice")

_PREFIX = "nnfuze."


def choose(sch: s_tir.Schedule, candidates: Sequence[Choice], tunable: bool, name: str = "knob") -> Choice:
    """Return the first candidate, or a sampled one that is recorded in the schedule's trace.

    Candidates are ordered by the hardware model, best first. Rules compute with the chosen value in
    Python, so another decision means running the rule again, not replaying a mutated trace. What was chosen
    is recorded under ``name``, or under the names of its fields if it is a dataclass.
    """
    chosen = candidates[0]
    if tunable and len(candidates) > 1:
        probability = 1.0 / len(candidates)
        index = sch.sample_categorical(list(range(len(candidates))), [probability] * len(candidates))
        chosen = candidates[int(sch.get(index))]
    if dataclasses.is_dataclass(chosen) and not isinstance(chosen, type):
        record_knobs(sch, **dataclasses.asdict(chosen))
    else:
        record_knobs(sch, **{name: chosen})
    return chosen


def record_knobs(sch: s_tir.Schedule, **facts: object) -> None:
    """Record how ``main`` is scheduled, in its outermost block: so tuning records keep it, too."""
    outermost = root(sch)
    if outermost is not None:
        for name, value in facts.items():
            sch.annotate(outermost, f"{_PREFIX}{name}", value if isinstance(value, int) else str(value))


def take_knobs(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, dict[str, int | str]]:
    """Return a scheduled kernel without what was recorded in it, and that, in the order in which it was."""
    body = func.body
    if not isinstance(body, s_tir.SBlockRealize):
        return func, {}
    block = body.block
    found = {str(key): value for key, value in block.annotations.items()}
    knobs = {
        key.removeprefix(_PREFIX): str(value) if isinstance(value, str) else int(value)
        for key, value in found.items()
        if key.startswith(_PREFIX)
    }
    rest = {key: value for key, value in found.items() if not key.startswith(_PREFIX)}
    parts = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init)
    bare = s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, rest)
    return func.with_body(s_tir.SBlockRealize(body.iter_values, body.predicate, bare)), knobs
