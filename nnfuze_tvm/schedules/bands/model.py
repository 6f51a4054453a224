"""Which kernels are worth fusing into bands, and how high a band is: costs in the time of float32 multiply-adds.

What is saved: a buffer between two kernels that does not stay in L2 is written to memory and read back; in bands its
rows stay near. What it costs: what parts of an image compute for themselves of their neighbours' rows, weights that
come from L2 again in every band, and the loops around the stages.
"""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction
from math import prod
from typing import Any

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.ir import nbytes
from nnfuze_tvm.schedules.bands.progress import Bands, Course, Step, course
from nnfuze_tvm.schedules.bands.stages import ROWS, Kernel, Stage
from nnfuze_tvm.schedules.bands.weave import Group, lines
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS

# Multiply-adds in the time in which a byte comes from L2, and in which the loops around one stage's rows begin.
_NEAR_MACS = 0.5
_STAGE_MACS = 1000.0
# A group must save this part of its work: what the model does not know is as much.
_LEAST_GAIN = 0.02
# Bands have so many of the last stage's tiles.
_TILES = (1, 2, 4, 8)


def is_far(kernel: Kernel, hw: Hardware) -> bool:
    """Tell whether a kernel's result does not stay in L2 until the next kernel reads it."""
    return size(kernel.params[-1]) > hw.l2_bytes // 2


def best(group: Group, hw: Hardware) -> tuple[float, Bands] | None:
    """Return what a group saves, and its bands; None if that is too little."""
    steps = group.steps()
    if not fits(steps):
        return None
    stages = [stage for stage, _ in group.stages()]
    work = sum(stage.work for stage in stages)
    far = {numbers[-1]: kernel for numbers, kernel in zip(group.arguments, group.kernels, strict=True)}
    moved = sum(2 * size(far[value].params[-1]) for value in group.inner if is_far(far[value], hw))
    if not moved:
        return None
    weights = standing(group)
    parts = hw.cores if work >= PARALLEL_MIN_OPS else 1
    room, most = _room(hw)
    found: list[tuple[float, Bands]] = []
    rows = steps[-1].rows
    for tiles in _TILES:
        bands = Bands(tiles * steps[-1].tile, parts)
        if bands.count(rows) < max(2, parts):
            break
        if bands.longest(rows) > Bands(steps[-1].tile, parts).longest(rows):
            continue  # some cores would wait longer for others than they must
        path = course(steps, bands)
        between = scratch(stages, lines(path, steps, bands))
        if between > room or between + weights > most:
            break
        found.append((moved * hw.far_macs - paid(group, hw, bands, path), bands))
    if not found:
        return None
    gain, bands = max(found, key=lambda pair: pair[0])
    return (gain, bands) if gain > _LEAST_GAIN * work else None


def paid(group: Group, hw: Hardware, bands: Bands, path: Course) -> float:
    """Return what bands cost: rows computed twice, weights that are read again in every band, and loops that begin."""
    stages = [stage for stage, _ in group.stages()]
    again = sum(
        stage.work * max(0, count - stage.iterations) / stage.iterations
        for stage, count in zip(stages, path.iterations, strict=True)
    )
    weights = standing(group)
    per_byte = _NEAR_MACS if weights <= hw.l2_bytes // 2 else hw.far_macs
    per_band = weights * per_byte + _STAGE_MACS * sum(prod(extent for _, extent in s.blocks) for s in stages)
    return again + bands.count(int(stages[-1].writes.shape[ROWS])) * per_band


def _room(hw: Hardware) -> tuple[int, int]:
    """Return how many bytes of L2 buffers may take, and buffers and weights; what passes through takes the rest.

    Of x86, only classes of CPUs are known, whose caches are not all alike; of boards the catalogue knows them.
    """
    if hw.isa == "x86":
        return hw.l2_bytes // 4, hw.l2_bytes // 2
    return hw.l2_bytes * 3 // 4, hw.l2_bytes * 3 // 4


def standing(group: Group) -> int:
    """Return the bytes that every band reads again: weights, and all else that no band moves through."""
    return sum(
        size(buffer)
        for kernel, values in zip(group.kernels, group.arguments, strict=True)
        for buffer, value in zip(kernel.params, values, strict=True)
        if value in group.given and not any(buffer in s.reads and s.reads[buffer].step for s in kernel.stages)
    )


def near(group: Group, bands: Bands) -> int:
    """Return the bytes that L2 delivers, at least: what stages read of each other, and in each band the weights."""
    stages = [stage for stage, _ in group.stages()]
    between = scratch(stages, [int(stage.writes.shape[ROWS]) for stage in stages])
    return between + standing(group) * bands.count(int(stages[-1].writes.shape[ROWS]))


def fits(steps: Sequence[Step]) -> bool:
    """Tell whether a group's stages go hand in hand: each is read by a later one, and all move evenly."""
    pace = [Fraction(0)] * len(steps)
    pace[-1] = Fraction(1)
    for number in range(len(steps) - 2, -1, -1):
        rates = {pace[n] / step.tile * step.reads[number].step for n, step in enumerate(steps) if number in step.reads}
        if len(rates) != 1 or min(rates) <= 0:
            return False
        pace[number] = rates.pop()
    return True


def scratch(stages: Sequence[Stage], rows: Sequence[int]) -> int:
    """Return the bytes of the buffers between stages, if they have so many rows."""
    return sum(
        size(stage.writes) // int(stage.writes.shape[ROWS]) * count
        for stage, count in zip(stages[:-1], rows[:-1], strict=True)
    )


def size(buffer: Any) -> int:
    """Return the bytes of a buffer."""
    return nbytes([int(extent) for extent in buffer.shape], str(buffer.dtype))
