"""Depthwise convolution over one axis, channels first: a vector is neighbours in a row, a tap is a shifted load.

The loop nest is ``n, c_block, (the padded rows), c, w_outer, (taps, vectors; unrolled), lane``. A weight is the same
for a whole row. The rows of a block of channels are copied with their padding first, for no load to have a condition.
"""

from __future__ import annotations

from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import extents, inline_around, is_padding, iter_kinds, uses
from nnfuze_tvm.schedules.intrinsics import words
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, divisors, unroll_tile
from nnfuze_tvm.schedules.rewrites import overlap

# Rows that are copied together: a buffer for each alone would cost an allocation each.
_ROWS = 8
# What it takes to have a weight in all lanes, in products.
_WEIGHT = 1.5
# A window of more taps than this stays a loop.
_UNROLLED_TAPS = 8


def schedule(sch: s_tir.Schedule, conv: SBlockRV, hw: Hardware, tunable: bool) -> bool:
    """Schedule it, or return False and change nothing; see `Rule`."""
    if not _is_rows(sch, conv):
        return False
    batch, channels, width, _, taps = extents(sch, conv)
    sums = str(sch.get(conv).writes[0].source.dtype)
    # Bytes are loaded and widened by two vectors of sums at once.
    bytes_on_arm = hw.isa == "arm" and "neon" in hw.features and str(sch.get(conv).reads[1].source.dtype) == "int8"
    joined = 2 if bytes_on_arm else 1
    lanes = min(hw.lanes(sums) * joined, 1 << (width.bit_length() - 1))
    vectors = choose(sch, _vectors(width, lanes, hw.registers // 2 // joined)[:8], tunable, "vectors")
    rows = choose(sch, divisors(channels, _ROWS)[:2], tunable, "rows")

    pads = [block for block in sch.get_producers(conv) if is_padding(sch, block)]
    out = inline_around(sch, conv, keep=pads)
    image, channel, column = sch.get_loops(out)
    block, channel = sch.split(channel, [None, rows])
    sch.reorder(image, block, channel, column)
    sch.compute_at(conv, block, preserve_unit_loops=True)
    for pad in pads:
        sch.compute_at(pad, block, preserve_unit_loops=True)
        # Without conditions between the rims, LLVM copies whole vectors.
        sch.annotate(sch.get_loops(pad)[-1], "pragma_loop_partition_hint", 1)
    size = vectors * lanes
    outer, inside = sch.split(column, [None, size], disable_predication=True)
    if width % size:
        overlap.mark(sch, outer, width)
    sch.compute_at(conv, outer, preserve_unit_loops=True)
    *_, acc, depth, tap = sch.get_loops(conv)
    acc_vector, acc_lane = sch.split(acc, [None, lanes])
    sch.reorder(depth, tap, acc_vector, acc_lane)
    vector, lane = sch.split(inside, [None, lanes])
    for loop in (vector, acc_vector, *((tap,) if taps <= _UNROLLED_TAPS else ())):
        sch.unroll(loop)
    for loop in (lane, acc_lane):
        sch.vectorize(loop)
    if hw.cores > 1 and prod((batch, channels, width, taps)) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(image, block))
    init = sch.decompose_reduction(conv, depth)
    if bytes_on_arm:
        words.mark(sch, conv)
    unroll_tile(sch, sch.get_loops(init)[-2:])
    return True


def _vectors(width: int, lanes: int, most: int) -> list[int]:
    """Return numbers of vectors in a tile, best first: whole tiles cover the row, and each loads every weight."""
    fitting = range(1, min(most, width // lanes) + 1)
    return sorted(fitting, key=lambda n: -(-width // (n * lanes)) * (n + _WEIGHT))


def _is_rows(sch: s_tir.Schedule, conv: SBlockRV) -> bool:
    """Tell whether a block is a depthwise convolution of rows, of stride 1."""
    if iter_kinds(sch, conv) != "SSSRR":
        return False
    body = sch.get(conv)
    if len(body.reads) != 2 or any(len(region.region) != 3 for region in body.reads):
        return False
    _, channel, column, _, tap = (each.var for each in body.iter_vars)
    data, weights = (region.region for region in body.reads)
    return (
        extents(sch, conv)[3] == 1
        and weights[0].min.same_as(channel)
        and uses(data[1].min, channel)
        and all(uses(data[2].min, each) for each in (column, tap))
    )
