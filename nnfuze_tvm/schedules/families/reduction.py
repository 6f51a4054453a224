"""Rows that are reduced along their last axes, in one stage or several: softmax, normalization, argmax; also all of a
tensor at once.

All stages of a row run before the next row's first one, so that what lies between them stays in L1. Sums and
maxima over a row are split into one partial result per lane, and the lanes are combined at the end, in two steps.
"""

from __future__ import annotations

from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import (
    blocks,
    extents,
    has_one_output,
    inline_spatial,
    is_reduction,
    iter_kinds,
    uses,
)
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, vectorize_inner
from nnfuze_tvm.schedules.rewrites import peel
from nnfuze_tvm.schedules.rule import Rule

# Partial results that are combined one by one at the end.
_LAST_LANES = 4


def _rows(sch: s_tir.Schedule) -> list[int] | None:
    """Return the extents of the row axes that all blocks share, none of a whole tensor; None for another form."""
    everything = blocks(sch)
    rows: list[int] | None = None
    for block in everything:
        kinds = iter_kinds(sch, block)
        # What makes one number has an iterator, but no loop.
        if "O" in kinds or (len(sch.get_loops(block)) < len(kinds) and prod(extents(sch, block)) > 1):
            return None
        if "R" in kinds:
            spatial = kinds.rstrip("R")
            if "R" in spatial or not _is_contiguous(sch, block):
                return None
            shape = extents(sch, block)[: len(spatial)]
            # keepdims leaves unit axes behind; the rows are what comes before them.
            if rows is not None and (_trim(shape) != _trim(rows) or not spatial):
                return None
            rows = shape if rows is None or len(shape) < len(rows) else rows
    if rows is None or not has_one_output(sch):
        return None
    last = extents(sch, everything[-1])
    trimmed = _trim(rows)
    if last[: len(trimmed)] != trimmed:
        return None
    return trimmed


def _is_contiguous(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether a reduction's last iterator runs along the last axis of all data that it reduces."""
    body = sch.get(block)
    reduced = body.iter_vars[-1].var
    reads = [r.region for r in body.reads if any(uses(axis.min, reduced) for axis in r.region)]
    return bool(reads) and all(region[-1].min.same_as(reduced) for region in reads)


def _is_one_run(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether what a reduction reads along its iterators lies side by side."""
    body = sch.get(block)
    reduced = [it for it in body.iter_vars if it.iter_type == it.CommReduce]
    for region in body.reads:
        own = region.region[-len(reduced) :]
        shape = [int(extent) for extent in region.source.shape][-len(reduced) :]
        if len(own) < len(reduced) or shape != [int(it.dom.extent) for it in reduced]:
            return False
        if not all(axis.min.same_as(it.var) for axis, it in zip(own, reduced, strict=True)):
            return False
    return True


def _trim(shape: list[int]) -> list[int]:
    shape = list(shape)
    while len(shape) > 1 and shape[-1] == 1:
        shape.pop()
    return shape


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule stages that share their row axes; see `Rule` for the contract."""
    rows = _rows(sch)
    if rows is None:
        return False
    work = sum(prod(extents(sch, block)) for block in blocks(sch))
    vectors = choose(sch, [2, 1, 4] if rows else [4, 2, 1], tunable, "vectors")
    out = blocks(sch)[-1]
    # Inlining what several stages read would compute it several times.
    inline_spatial(sch, keep=[out, *(block for block in blocks(sch) if len(sch.get_consumers(block)) > 1)])
    partials = [
        partial
        for block in blocks(sch)
        if is_reduction(sch, block)
        for partial in _split_lanes(sch, block, hw, vectors)
    ]
    if rows:
        _stage_by_rows(sch, out, len(rows), hw.cores > 1 and work >= PARALLEL_MIN_OPS and prod(rows) > 1, hw)
    for partial, rest in partials:
        count = iter_kinds(sch, partial).count("R")
        loops = sch.get_loops(partial)
        lane, chunks = (loops[1], loops[-count:]) if rows else (loops[-1], loops[:-1])
        sch.reorder(*chunks, lane)
        sch.vectorize(lane)
        if rest:
            # Behind it are axes of one number, of rows that lie side by side.
            several = next(loop for loop in reversed(chunks) if int(sch.get(loop).extent) > 1)
            peel.mark(sch, several, "row", [lane], rest, keeps=True)
        init = sch.decompose_reduction(partial, chunks[0])
        sch.vectorize(sch.get_loops(init)[-1])
    return True


def _stage_by_rows(sch: s_tir.Schedule, out: SBlockRV, axes: int, parallel: bool, hw: Hardware) -> None:
    """Compute all stages of a row, the first ``axes`` of the last block's, before the next row's."""
    if is_reduction(sch, out):
        out = sch.cache_write(out, 0, "global")
    loops = sch.get_loops(out)[:axes]
    row = sch.fuse(*loops) if len(loops) > 1 else loops[0]
    stages = [block for block in blocks(sch) if sch.get(block).name_hint != sch.get(out).name_hint]
    for stage in reversed(stages):
        sch.compute_at(stage, row, preserve_unit_loops=True)
    if parallel:
        sch.parallel(row)
    for stage in (*stages, out):
        inner = sch.get_loops(stage)[1:]
        if inner and not is_reduction(sch, stage):
            _vectorize_row(sch, inner[-1], str(sch.get(stage).writes[0].source.dtype), hw)


def _vectorize_row(sch: s_tir.Schedule, loop: LoopRV, dtype: str, hw: Hardware) -> None:
    """Make a row vectors, the last of which may be shorter."""
    extent, lanes = int(sch.get(loop).extent), hw.lanes(dtype)
    if extent <= lanes or extent % max(lanes // 2, 1) == 0:
        vectorize_inner(sch, loop, dtype, hw)
        return
    chunk, lane = sch.split(loop, [None, lanes], disable_predication=True)
    sch.vectorize(lane)
    peel.mark(sch, chunk, "row", [lane], extent % lanes, keeps=True)


def _split_lanes(sch: s_tir.Schedule, block: SBlockRV, hw: Hardware, vectors: int) -> list[tuple[SBlockRV, int]]:
    """Give each lane of ``vectors`` registers its own partial result, and combine those in two steps.

    Lanes that are combined one by one wait for each other: first they are added up in vectors, down to
    ``_LAST_LANES``. Returns the blocks that compute partial results, each with how many lanes the last numbers of a
    row fill if they don't fill all. Rows that are short, and reductions of pairs (argmax), stay as they are.
    """
    body = sch.get(block)
    if len(body.writes) != 1:
        return []
    reduced = sch.get_loops(block)[-iter_kinds(sch, block).count("R") :]
    sizes = [int(sch.get(loop).extent) for loop in reduced]
    one_run = len(reduced) > 1 and _is_one_run(sch, block)
    extent = prod(sizes) if one_run else sizes[-1]
    lanes = hw.lanes(str(body.writes[0].source.dtype))
    widths = [w for w in (lanes * vectors, lanes, lanes // 2) if w >= min(lanes, _LAST_LANES)]
    width = next((w for w in widths if extent % w == 0 and prod(sizes) >= 2 * w), None)
    width = width or next((w for w in widths if extent >= 2 * w), None)
    if width is None:
        return []
    last = sch.fuse(*reduced) if one_run else reduced[-1]
    axis = len(body.writes[0].region)
    _, lane = sch.split(last, [None, width])
    partials = [(sch.rfactor(lane, factor_axis=axis), extent % width)]
    if width > _LAST_LANES:
        _, lane = sch.split(sch.get_loops(block)[-1], [None, _LAST_LANES])
        partials.append((sch.rfactor(lane, factor_axis=axis), 0))
    return partials


RULE = Rule("reduction", apply, order=60)
