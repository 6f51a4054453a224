"""Depthwise NHWC convolution of any rank: a register tile of output columns × channels, padding without a copy.

The loop nest is ``n, oh, ow_outer, c_block, (kh, kw, ow_inner, vector; all unrolled), lane``. The accumulators of a
tile stay in registers; the weights, packed to ``[kh][kw][c]`` at compile time, are loaded once per tile. Padding is
inlined as a condition on the load: where a row has few tiles, their loop is unrolled too, which decides the
conditions on columns at compile time, and the one on rows is the same for a whole tile, so its branch is predicted.
Float32 on AArch64 has a nest of its own, see ``depthwise_columns``, and so has one axis channels first, see
``depthwise_rows``.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import LINE_BYTES, Hardware
from nnfuze_tvm.schedules.blocks import (
    extents,
    inline_around,
    is_padding,
    iter_kinds,
    layout_free,
    single_anchor,
    uses,
)
from nnfuze_tvm.schedules.families import depthwise_columns, depthwise_rows
from nnfuze_tvm.schedules.intrinsics import words
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, STACK_BYTES, divisors, unroll_tile, vectorize_copy
from nnfuze_tvm.schedules.rewrites import overlap
from nnfuze_tvm.schedules.rule import Rule

# Rows of at most this many tiles are unrolled whole; more code than that no longer pays.
_UNROLLED_TILES = 4
# A window of more taps than this stays a loop.
_UNROLLED_TAPS = 25


@dataclass(frozen=True)
class DepthwiseTile:
    """``cols`` output columns × ``vectors`` registers of ``lanes`` channels; ``whole_row`` unrolls all tiles."""

    cols: int
    vectors: int
    lanes: int
    whole_row: bool


def tiles(ow: int, oc: int, lanes: int, hw: Hardware, overlapping: bool = False) -> list[DepthwiseTile]:
    """Return register tiles for ``ow`` output columns × ``oc`` channels, best first.

    Only where the last tile of a row may overlap the one before it, tiles of any number of columns fit any row. Where
    channels fill no whole vectors, the last tile of them overlaps the one before it.

    Small images have many channels, so neighbouring pixels lie kilobytes apart and compete for few cache sets:
    there a step takes a whole cache line of channels. Large ones are better off with half a line and more columns.
    """
    if oc % lanes:
        lanes = min(lanes, 1 << (oc.bit_length() - 1))
    whole = oc % lanes == 0
    line = max(1, LINE_BYTES // hw.vector_bytes)
    found: list[tuple[float, DepthwiseTile]] = []
    for vectors in sorted({1, line // 2 or 1, line, 2 * line}):
        if oc % (lanes * vectors) if whole else oc < lanes * vectors:
            continue
        fitting = {min(ow, 2), min(ow, 4), *(d for d in divisors(ow, 8) if d > 2), *divisors(ow, 3)}
        for cols in range(1, min(ow, 8) + 1) if overlapping else sorted(fitting):
            if cols * vectors > min(hw.registers * 5 // 8, STACK_BYTES // hw.vector_bytes):
                continue
            count = -(-ow // cols)
            whole_row = count <= _UNROLLED_TILES and not overlapping
            if not whole_row and not overlapping and ow % cols:
                continue
            best_vectors = line if whole_row else max(1, line // 2)
            best_cols = 4 if whole_row else 7
            cost = abs(vectors - best_vectors) / best_vectors + abs(cols - best_cols) / best_cols
            found.append((cost, DepthwiseTile(cols, vectors, lanes, whole_row)))
    found.sort(key=lambda item: item[0])
    return [tile for _, tile in found]


def _is_depthwise(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether a block is a convolution with one input channel per group, chosen by the output's channel."""
    body = sch.get(block)
    kinds = iter_kinds(sch, block)
    spatial = kinds.count("S")
    if spatial < 3 or kinds != "S" * spatial + "R" * (spatial - 1) or len(body.reads) != 2:
        return False
    data, weight = (region.region for region in body.reads)
    if extents(sch, block)[-1] != 1 or len(data) != spatial or len(weight) != spatial:
        return False
    return uses(data[-1].min, body.iter_vars[spatial - 1].var)


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a depthwise convolution with NHWC data and OHWI weights; see `Rule`."""
    conv = single_anchor(sch)
    if conv is not None and depthwise_rows.schedule(sch, conv, hw, tunable):
        return True
    if conv is None or not _is_depthwise(sch, conv):
        return False
    if iter_kinds(sch, conv) == "SSSSRRR" and depthwise_columns.schedule(sch, conv, hw, tunable):
        return True
    shape = extents(sch, conv)
    # A row alone is no image: what is at its ends is too much of it for conditions on every load, and its length is
    # often no multiple of anything.
    single_row = len(shape) == 5
    tile = _tile(sch, conv, hw, tunable, overlapping=single_row)
    # Bytes are loaded and widened, and results are narrowed, by several vectors of sums at once.
    bytes_on_arm = hw.isa == "arm" and "neon" in hw.features and str(sch.get(conv).reads[1].source.dtype) == "int8"
    joined = next(n for n in (2, 1) if tile.vectors % n == 0) if bytes_on_arm else 1
    lanes, vectors = tile.lanes * joined, tile.vectors // joined

    # Conditions on loads keep LLVM from widening bytes once for all taps that they meet: a padded copy costs less.
    copied = bytes_on_arm or single_row
    pads = [block for block in sch.get_producers(conv) if copied and is_padding(sch, block)]
    out = inline_around(sch, conv, keep=pads)
    _pack_weights(sch, conv)

    *loops, loop_x, loop_c = sch.get_loops(out)
    rank = len(loops) + 2
    channels, step = shape[rank - 1], vectors * lanes
    block, vector, lane = sch.split(loop_c, [None, vectors, lanes], disable_predication=channels % step != 0)
    outer, col = sch.split(loop_x, [None, tile.cols], disable_predication=single_row)
    sch.reorder(*loops, outer, block, col, vector, lane)
    sch.compute_at(conv, block, preserve_unit_loops=True)
    acc_col, acc_c, *window = sch.get_loops(conv)[-rank - 1 :]
    acc_vector, acc_lane = sch.split(acc_c, [None, lanes])
    sch.reorder(*window, acc_col, acc_vector, acc_lane)
    taps = window[:-1] if prod(shape[rank:]) <= _UNROLLED_TAPS else ()
    rows = (outer,) if tile.whole_row else ()
    for loop in (*rows, *taps, col, vector, acc_col, acc_vector):
        sch.unroll(loop)
    for loop in (lane, acc_lane):
        sch.vectorize(loop)
    if hw.cores > 1 and prod(shape) >= PARALLEL_MIN_OPS:
        sch.parallel(outer if single_row else sch.fuse(*loops))
    if single_row and shape[1] % tile.cols:
        overlap.mark(sch, outer, shape[1])
    if channels % step:
        overlap.mark(sch, block, channels)
    init = sch.decompose_reduction(conv, window[0])
    if bytes_on_arm:
        words.mark(sch, conv)
    for pad in pads:
        vectorize_copy(sch, pad, hw)
    unroll_tile(sch, sch.get_loops(init)[-3:])
    return True


def _tile(sch: s_tir.Schedule, conv: SBlockRV, hw: Hardware, tunable: bool, overlapping: bool) -> DepthwiseTile:
    ow, oc = extents(sch, conv)[iter_kinds(sch, conv).count("S") - 2 :][:2]
    lanes = hw.lanes(str(sch.get(conv).writes[0].source.dtype))
    found = tiles(ow, oc, lanes, hw, overlapping) or [
        DepthwiseTile(divisors(ow, 8)[0], 1, divisors(oc, lanes)[0], False)
    ]
    return choose(sch, found[:8], tunable)


def _pack_weights(sch: s_tir.Schedule, conv: SBlockRV) -> None:
    """Rewrite the weights to ``[kh][kw][c]``, at compile time if they are constant."""
    constant = sch.get(conv).reads[1].source.name in {param.name for param in layout_free(sch)}
    packed = sch.cache_read(conv, 1, "global")
    sch.transform_layout(conv, ("read", 1), lambda f, *window: (*window, f))
    if constant:
        sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)


RULE = Rule("depthwise", apply, order=30)
