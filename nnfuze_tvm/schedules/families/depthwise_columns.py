"""Depthwise float32 convolution on AArch64: tiles of rows and columns, column by column, without conditions.

The loop nest is ``n, tile of rows, tile of columns, vector of channels, (column, (taps, row); all unrolled), lane``.
Weights stay in registers. So do the data of neighbouring columns, of which each serves all taps and rows that it
meets: a tile of two rows loads four vectors per column for eighteen multiplications. The rim of the image has code of
its own, see ``peel``.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import extents, inline_around, layout_free
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS
from nnfuze_tvm.schedules.rewrites import bias, peel

_LANES = 4
# Columns of one tile: more code than that no longer pays.
_MAX_COLS = 8
# LLVM keeps all sums and weights in registers, and beside them the data of so many columns.
_COLUMNS = 2
# Instructions per tile and vector of channels that are neither products nor loads of data.
_OVERHEAD = 6


@dataclass(frozen=True)
class ColumnTile:
    """``rows`` × ``cols`` of output pixels, four channels each."""

    rows: int
    cols: int


def tiles(shape: tuple[int, int], kernel: tuple[int, int], stride: tuple[int, int], registers: int) -> list[ColumnTile]:
    """Return tiles of an output of ``shape`` (rows, columns), best first by the vectors that are loaded for it."""
    found: list[tuple[float, ColumnTile]] = []
    taps = prod(kernel)
    for rows, cols in product(range(1, min(4, shape[0]) + 1), range(1, min(_MAX_COLS, shape[1]) + 1)):
        height = (rows - 1) * stride[0] + kernel[0]
        if rows * cols + taps + _COLUMNS * height >= registers:
            continue
        cost = 0.0
        for own_rows, own_cols in product(_sizes(shape[0], rows), _sizes(shape[1], cols)):
            data = ((own_rows[0] - 1) * stride[0] + kernel[0]) * ((own_cols[0] - 1) * stride[1] + kernel[1])
            cost += own_rows[1] * own_cols[1] * (data + taps / 2 + _OVERHEAD)
        found.append((cost, ColumnTile(rows, cols)))
    found.sort(key=lambda item: item[0])
    return [tile for _, tile in found]


def _sizes(extent: int, size: int) -> list[tuple[int, int]]:
    """Return the sizes of an axis' tiles, each with how many there are."""
    return [(own, count) for own, count in ((size, extent // size), (extent % size, 1)) if own and count]


def schedule(sch: s_tir.Schedule, conv: SBlockRV, hw: Hardware, tunable: bool) -> bool:
    """Schedule a depthwise convolution in place, or return False, and nothing changed, if it doesn't fit."""
    node = sch.get(conv)
    images, oh, ow, channels, *kernel, _ = shape = extents(sch, conv)
    constants = {param.name for param in layout_free(sch)}
    dtypes = {str(region.source.dtype) for region in (*node.reads, *node.writes)}
    if hw.isa != "arm" or dtypes != {"float32"} or channels % _LANES or node.reads[1].source.name not in constants:
        return False
    height, width = (int(extent) for extent in node.reads[0].source.ty.shape[1:3])
    stride = (max(1, (height - kernel[0]) // max(1, oh - 1)), max(1, (width - kernel[1]) // max(1, ow - 1)))
    options = tiles((oh, ow), (kernel[0], kernel[1]), stride, hw.registers)
    if not options:
        return False
    tile = choose(sch, options[:8], tunable)

    out = inline_around(sch, conv)
    packed = sch.cache_read(conv, 1, "global")
    sch.transform_layout(conv, ("read", 1), lambda f, y, x, c: (f // _LANES, y, x, c, f % _LANES))
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)

    loop_n, loop_y, loop_x, loop_c, tap_y, tap_x, group = sch.get_loops(conv)
    # Without conditions on what the last tiles do not have: they will be cut.
    row_tile, row = sch.split(loop_y, [None, tile.rows], disable_predication=True)
    col_tile, col = sch.split(loop_x, [None, tile.cols], disable_predication=True)
    vector, lane = sch.split(loop_c, [None, _LANES])
    sch.reorder(loop_n, row_tile, col_tile, vector, col, tap_y, tap_x, group, row, lane)
    sch.reverse_compute_at(out, col, preserve_unit_loops=True)
    out_row, out_lane = sch.get_loops(out)[-3], sch.get_loops(out)[-1]
    for loop in (col, tap_y, tap_x, row, out_row):
        sch.unroll(loop)
    for loop in (lane, out_lane):
        sch.vectorize(loop)
    if hw.cores > 1 and prod(shape) >= PARALLEL_MIN_OPS:
        sch.parallel(row_tile if images == 1 else loop_n)
    init = sch.decompose_reduction(conv, tap_y)
    bias.mark(sch, init)
    init_row, init_lane = sch.get_loops(init)[-2:]
    sch.unroll(init_row)
    sch.vectorize(init_lane)
    peel.mark(sch, row_tile, "rows", [row, init_row, out_row], oh % tile.rows, first=True)
    peel.mark(sch, col_tile, "columns", [col], ow % tile.cols, first=True)
    return True
