"""Reductions that leave the channels alone: max and average pooling, global averages, sums over outer axes.

The loop nest is ``outputs, c_block, window, vector (unrolled), lane``: the accumulators of a block of channels stay
in registers over the window, and the division or requantization runs on them before they are stored. Padding is a
condition on the load, the same for all lanes.
"""

from __future__ import annotations

from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import extents, inline_around, iter_kinds, single_anchor, uses
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, divisors
from nnfuze_tvm.schedules.rewrites import overlap
from nnfuze_tvm.schedules.rule import Rule

_UNROLLED_TAPS = 9


def _keeps_channels(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether the last spatial iterator, and it alone, runs along the last axis of the data."""
    body = sch.get(block)
    kinds = iter_kinds(sch, block)
    spatial = kinds.count("S")
    if kinds != "S" * spatial + "R" * (len(kinds) - spatial) or spatial == 0 or len(body.reads) != 1:
        return False
    written, read = body.writes[0].region, body.reads[0].region
    channel = body.iter_vars[spatial - 1].var
    return (
        len(written) > 0
        and len(read) > 0
        and read[-1].min.same_as(channel)
        and written[-1].min.same_as(channel)
        and not any(uses(r.min, channel) for r in read[:-1])
    )


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a reduction over other axes than the last; see `Rule` for the contract."""
    pool = single_anchor(sch)
    if pool is None or not _keeps_channels(sch, pool):
        return False
    shape = extents(sch, pool)
    rank = iter_kinds(sch, pool).count("S")
    channels, taps = shape[rank - 1], prod(shape[rank:])
    most = hw.lanes(str(sch.get(pool).writes[0].source.dtype))
    lanes = divisors(channels, most)[0]
    # Where few lanes are whole, the last vectors lie over the ones before.
    overlaps = channels > most > 2 * lanes
    lanes = most if overlaps else lanes
    # The more channels at once, the fewer times the padding's condition is asked, and the longer the run of
    # consecutive bytes that a pixel is read in.
    blocks = [n for n in (4, 2, 1) if n * lanes <= channels] if overlaps else divisors(channels // lanes, _most(hw))[:4]
    vectors = choose(sch, blocks, tunable, "vectors")

    out = inline_around(sch, pool)
    *outer, loop_c = sch.get_loops(out)
    block, vector, lane = sch.split(loop_c, [None, vectors, lanes], disable_predication=overlaps)
    sch.compute_at(pool, block, preserve_unit_loops=True)
    loops = sch.get_loops(pool)
    window = loops[len(loops) - len(shape) + rank :]
    acc_c = loops[len(loops) - len(shape) + rank - 1]
    acc_vector, acc_lane = sch.split(acc_c, [None, lanes])
    sch.reorder(*window, acc_vector, acc_lane)
    for loop in (*(window if taps <= _UNROLLED_TAPS else ()), vector, acc_vector):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.vectorize(acc_lane)
    # Where blocks overlap, their loop must stay one of its own.
    parallel = outer if overlaps else [*outer, block]
    if hw.cores > 1 and prod(shape) >= PARALLEL_MIN_OPS and parallel:
        sch.parallel(sch.fuse(*parallel) if len(parallel) > 1 else parallel[0])
    if overlaps:
        overlap.mark(sch, block, channels)
    init = sch.decompose_reduction(pool, window[0])
    *_, init_vector, init_lane = sch.get_loops(init)
    sch.unroll(init_vector)
    sch.vectorize(init_lane)
    return True


def _most(hw: Hardware) -> int:
    """Return how many vectors of channels a block may have."""
    return min(8, hw.registers // 2)


RULE = Rule("pooling", apply)
