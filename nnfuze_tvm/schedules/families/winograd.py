"""Winograd convolution: transforms and matrix products of a few tiles at a time, in one kernel.

The loop nest is ``tile_block, (data transform; products; sums)``. The block's transformed data and products stay in
L2. Each of the products is a matrix product with the register tile of any contraction, image tiles × output channels,
over weights packed ``[point][channel_block][channel][channels]``; the sums' tile of outputs stays in registers, where
bias, activation and residual are added before it is stored. Padding is a condition on the loads of the transform.
"""

from __future__ import annotations

from math import lcm

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.base import PARALLEL_MIN_OPS, blocks, choose, divisors, extents, has_one_output
from nnfuze_tvm.schedules.contraction import Tile, Work, fitting, tiles, vectors_first
from nnfuze_tvm.schedules.intrinsics import Dot, dots
from nnfuze_tvm.schedules.rewrites import partial_sums

_BLOCKS = ("winograd_data", "winograd_product", "winograd_sum", "winograd_crop")
_LINE_BYTES = 64
# Iterations of the inner loop that are unrolled, best first, by the steps in each; LLVM has registers for eight or so.
_UNROLLED = {1: (4, 2, 1), 8: (1, 2)}
# Buffers of this size and more are not kept on the stack, whence LLVM takes them into registers.
_STACK_BYTES = 1024


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule what the Winograd pass makes of a convolution; see the package's docstring for the contract."""
    everything = blocks(sch)
    names = [sch.get(block).name_hint for block in everything]
    if not set(_BLOCKS) <= set(names) or not has_one_output(sch):
        return False
    data, product, total, crop = (everything[names.index(name)] for name in _BLOCKS)
    out = everything[-1]
    if extents(sch, out) != extents(sch, crop) or len(extents(sch, out)) != 4:
        return False
    node = sch.get(product)
    factor, result = (str(buffer.source.dtype) for buffer in (node.reads[0], node.writes[0]))
    points, images, count, outputs, channels = extents(sch, product)
    edge = int(sch.get(total).writes[0].source.shape[2])

    block = choose(sch, _tile_blocks(points, count, outputs + channels, hw), tunable, "tile_block")
    family = fitting(dots(hw.features, factor, factor), outputs, channels)
    depth = family[0].depth if family else 1
    work = _work(block, outputs, channels // depth, result, family, hw)
    tile = choose(sch, _register_tiles(work, hw)[:8], tunable)
    dot = next((dot for dot in family if dot.steps == tile.at_once), None)
    unroll = choose(
        sch,
        [n for n in _UNROLLED.get(tile.at_once, (2, 1)) if channels % (n * depth * tile.at_once) == 0],
        tunable,
        "unroll",
    )

    for name in names[names.index("winograd_crop") : -1]:
        sch.compute_inline(sch.get_sblock(name))
    packed = sch.cache_read(product, 1, "global")
    sch.transform_layout(
        product,
        ("read", 1),
        lambda p, o, c: (p, o // tile.channels, c // depth, o % tile.channels, *([c % depth] if depth > 1 else [])),
    )
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)

    # The sums and what follows: one tile of outputs × one vector of channels.
    lanes = divisors(outputs, min(hw.lanes(result), (_STACK_BYTES - 1) // (edge * edge * 4)))[0]
    loop_n, loop_y, loop_x, loop_o = sch.get_loops(out)
    tile_y, y = sch.split(loop_y, [None, edge])
    tile_x, x = sch.split(loop_x, [None, edge])
    vector, lane = sch.split(loop_o, [None, lanes])
    sch.reorder(loop_n, tile_y, tile_x, vector, y, x, lane)
    outer, inner = sch.split(sch.fuse(tile_y, tile_x), [None, block])
    # Where there are too few tiles for all cores, they share the output channels of one block of tiles.
    parallel = hw.cores > 1 and points * images * count * outputs * channels >= PARALLEL_MIN_OPS
    parts = 1
    if parallel and images * (count // block) < hw.cores:
        parts = divisors(outputs // lcm(tile.channels, lanes), hw.cores)[0]
    part, vector = sch.split(vector, [parts, None])
    sch.reorder(loop_n, outer, part, inner, vector)
    for loop in (y, x):
        sch.unroll(loop)
    sch.vectorize(lane)
    sch.compute_at(total, vector, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(total)[-1])

    # The products: accumulators in registers, copied out when the reduction is done.
    copy = sch.cache_write(product, 0, "global")
    sch.compute_at(copy, part, preserve_unit_loops=True)
    point, _, copy_t, copy_o = sch.get_loops(copy)[-4:]
    tiled, row = sch.split(copy_t, [None, tile.pixels])
    channel_block, *inside = sch.split(copy_o, [None, tile.channels // tile.lanes, tile.lanes])
    sch.reorder(point, channel_block, tiled, row, *inside)
    _unroll(sch, [row, inside[0]], inside[1])
    sch.compute_at(product, tiled, preserve_unit_loops=True)
    row, own, reduction = sch.get_loops(product)[-3:]
    inside = sch.split(own, [None, tile.lanes])
    steps, step, *dot_axes = sch.split(reduction, [None, unroll, *(n for n in (tile.at_once, depth) if n > 1)])
    several = dot_axes[:1] if tile.at_once > 1 else []
    pair = [row, inside[0]]
    if vectors_first(work, tile.pixels, tile.channels // tile.lanes, tile.at_once, hw):
        pair.reverse()
    sch.reorder(steps, step, *pair, *several, inside[1], *dot_axes[len(several) :])
    for loop in (step, row, inside[0]):
        sch.unroll(loop)
    if dot is None:
        sch.vectorize(inside[1])
    sch.compute_at(data, outer, preserve_unit_loops=True)
    lanes = divisors(channels, hw.lanes(factor))[0]
    _, lane = sch.split(sch.get_loops(data)[-1], [None, lanes])
    sch.vectorize(lane)
    if tile.at_once > 1:
        # Vectors of the data of neighbouring tiles stand together: one instruction loads two.
        held = tile.at_once * depth
        sch.transform_layout(
            data, ("write", 0), lambda p, n, t, c: (p, n, t // tile.pixels, c // held, t % tile.pixels, c % held)
        )
    # The points of a tile go to rows far apart; an odd number of cache lines between them spreads them over all sets.
    for writer, dtype in ((data, factor), (copy, result)):
        line = _LINE_BYTES // hw.vector_bytes * hw.lanes(dtype)
        sch.storage_align(writer, 0, 0, 2 * line, line)
    if parallel:
        sch.parallel(sch.fuse(loop_n, outer) if parts == 1 else part)
    init = sch.decompose_reduction(product, steps)
    *rows, lane = sch.get_loops(init)[-3:]
    _unroll(sch, rows, lane)
    if result == "float16":
        partial_sums.mark(sch, init, [steps], unroll * tile.at_once)
    if dot is not None:
        sch.tensorize(*(several or inside[1:]), dot.name)
    return True


def _tile_blocks(points: int, count: int, channels: int, hw: Hardware) -> list[int]:
    """Return how many tiles to take at once, best first: what L2 holds, and something for every core.

    Transforms want few tiles, whose data L1 holds; products want many, which share the weights that are read.
    """
    fits = hw.l2_bytes // (points * channels * 4)
    most = max(4, min(fits, -(-count // hw.cores)))
    found = [d for d in divisors(count, most) if d % 4 == 0] or divisors(count, most)
    return sorted(found, key=lambda d: abs(d - 16))[:4]


def _work(block: int, outputs: int, steps: int, result: str, family: list[Dot], hw: Hardware) -> Work:
    dot = family[0] if family else None
    depth, lanes, multiplies = (dot.depth, dot.lanes, dot.multiplies) if dot else (1, hw.lanes(result), 1)
    latency, temporaries = (1.0, 3) if result == "int32" else (4.0, 2)
    return Work(
        rows=1,
        cols=block,
        channels=outputs,
        steps=steps,
        lanes=lanes,
        depth=depth,
        weight_bytes=4 if result == "float32" else 2,
        multiplies=multiplies,
        latency=latency,
        temporaries=temporaries,
        integer=False,
        sum_bytes=2 if result == "float16" else 4,
        at_once=tuple(dot.steps for dot in family) or (1,),
        loaded=2,
    )


def _register_tiles(work: Work, hw: Hardware) -> list[Tile]:
    whole = [tile for tile in tiles(work, hw) if not tile.flat and work.cols % tile.pixels == 0]
    small = [tile for tile in whole if tile.pixels * tile.channels * 4 < _STACK_BYTES]
    return small or whole


def _unroll(sch: s_tir.Schedule, loops: list[LoopRV], lane: LoopRV) -> None:
    for loop in loops:
        sch.unroll(loop)
    sch.vectorize(lane)
