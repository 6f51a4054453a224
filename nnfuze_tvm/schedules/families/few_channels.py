"""Convolutions to few channels, whose sums run in lanes (see the pass `FewChannels`).

The loop nest is ``image, row, tile of columns, (kernel row, vector of products, channel, column (unrolled), lane)``:
a vector of weights is loaded once for all columns of a tile, and a column's sums stay in one register. Then the lanes
are added up, and what follows is done for the whole tile.
"""

from __future__ import annotations

from math import prod

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import blocks, extents, has_one_output, iter_kinds
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, unroll_tile, vectorize_copy
from nnfuze_tvm.schedules.rewrites import overlap
from nnfuze_tvm.schedules.rule import Rule


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule such a convolution; see `Rule` for the contract."""
    names = [sch.get(block).name_hint for block in blocks(sch)]
    if "few_sums" not in names or not has_one_output(sch):
        return False
    halves = [name for name in names if name.startswith("few_halves")]
    total = names.index(halves[-1])
    if any(set(iter_kinds(sch, block)) != {"S"} for block in blocks(sch)[total + 1 :]):
        return False
    shape = extents(sch, sch.get_sblock("few_sums"))
    cols, channels = shape[2:4]
    if extents(sch, blocks(sch)[-1]) != shape[:4]:
        return False
    # LLVM keeps in registers what neighbours share of the data, too.
    most = max(1, hw.registers // 4 // channels)
    tile = choose(sch, [n for n in (8, 4, 2, 1) if n <= min(cols, most)][:3], tunable, "pixels")

    sums = sch.get_sblock("few_sums")
    last = total + 1 == len(names)
    out = sch.cache_write(sch.get_sblock(halves[-1]), 0, "global") if last else sch.get_sblock(names[-1])
    for name in names[total + 1 : -1]:
        sch.compute_inline(sch.get_sblock(name))
    image, row, col, channel, *digits, height, width = sch.get_loops(sums)
    window, lane = [height, width], sch.fuse(*digits)
    # Without conditions: the last tile will overlap the one before.
    tiles, inside = sch.split(col, [None, tile], disable_predication=True)
    if cols % tile:
        overlap.mark(sch, tiles, cols)
    sch.reorder(image, row, tiles, *window, channel, inside, lane)
    unroll_tile(sch, [channel, inside, lane])
    reductions = [(sums, window[0])]
    for name in halves:
        block = sch.get_sblock(name)
        sch.reverse_compute_at(block, tiles, preserve_unit_loops=True)
        *spatial, half = sch.get_loops(block)[-len(iter_kinds(sch, block)) + 2 :]
        pixel, one, *digits = spatial
        lane = sch.fuse(*digits) if digits else sch.add_unit_loop(block)
        sch.reorder(half, pixel, one, lane)
        unroll_tile(sch, [half, pixel, one, lane])
        reductions.append((block, half))
    sch.reverse_compute_at(out, tiles, preserve_unit_loops=True)
    pixel, one = sch.get_loops(out)[-2:]
    sch.unroll(one if channels == 1 else pixel)
    if channels == 1:
        sch.reorder(one, pixel)
        sch.vectorize(pixel)
    if hw.cores > 1 and prod(shape) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(image, row))
    for block, loop in reductions:
        unroll_tile(sch, sch.get_loops(sch.decompose_reduction(block, loop))[-3:])
    if names[0] == "pad_temp":
        vectorize_copy(sch, sch.get_sblock("pad_temp"), hw)
    return True


RULE = Rule("few_channels", apply, order=15)
