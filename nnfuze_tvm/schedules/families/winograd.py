"""Winograd convolution: transforms and matrix products of a few tiles at a time, in one kernel.

The loop nest is ``tile_block, (data transform; products; sums)``. The block's transformed data and products stay in
L2. Each of the products is a matrix product with the register tile of any contraction, image tiles × output channels,
over weights packed ``[point][channel_block][channel][channels]``; the sums' tile of outputs stays in registers, where
bias, activation and residual are added before it is stored. Padding is a condition on the loads of the transform.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import LINE_BYTES, Hardware
from nnfuze_tvm.schedules.blocks import blocks, extents, has_one_output
from nnfuze_tvm.schedules.intrinsics import Dot, dots, fitting
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, STACK_BYTES, divisors, unroll_tile
from nnfuze_tvm.schedules.register_tile import RegisterTile, Work, tiles, vectors_first
from nnfuze_tvm.schedules.rewrites import partial_sums
from nnfuze_tvm.schedules.rule import Rule

_BLOCKS = ("winograd_data", "winograd_product", "winograd_sum", "winograd_crop")
# Iterations of the inner loop that are unrolled, best first, by the steps in each; LLVM has registers for eight or so.
_UNROLLED = {1: (4, 2, 1), 8: (1, 2)}


@dataclass(frozen=True)
class _Plan:
    """What was chosen for one convolution.

    ``block`` tiles of the image are taken at once; ``tile`` is the register tile of the products, each iteration of
    which takes ``unroll`` uses of ``dot``, or of ``depth`` products if there is no intrinsic.
    """

    block: int
    work: Work
    tile: RegisterTile
    dot: Dot | None
    depth: int
    unroll: int


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule what the Winograd pass makes of a convolution; see `Rule` for the contract."""
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
    plan = _plan(sch, product, hw, tunable)

    for name in names[names.index("winograd_crop") : -1]:
        sch.compute_inline(sch.get_sblock(name))
    _pack_weights(sch, product, plan)
    parallel = hw.cores > 1 and points * images * count * outputs * channels >= PARALLEL_MIN_OPS
    nest = _sum_loops(sch, total, out, plan, result, parallel, hw)
    copy, steps, dot_loop = _product_loops(sch, product, nest.part, plan, hw)

    sch.compute_at(data, nest.outer, preserve_unit_loops=True)
    _, lane = sch.split(sch.get_loops(data)[-1], [None, divisors(channels, hw.lanes(factor))[0]])
    sch.vectorize(lane)
    if plan.tile.steps_per_load > 1:
        # Vectors of the data of neighbouring tiles stand together: one instruction loads two.
        held, pixels = plan.tile.steps_per_load * plan.depth, plan.tile.pixels
        sch.transform_layout(
            data, ("write", 0), lambda p, n, t, c: (p, n, t // pixels, c // held, t % pixels, c % held)
        )
    # The points of a tile go to rows far apart; an odd number of cache lines between them spreads them over all sets.
    for writer, dtype in ((data, factor), (copy, result)):
        line = LINE_BYTES // hw.vector_bytes * hw.lanes(dtype)
        sch.storage_align(writer, 0, 0, 2 * line, line)
    if parallel:
        sch.parallel(sch.fuse(nest.images, nest.outer) if nest.parts == 1 else nest.part)
    init = sch.decompose_reduction(product, steps)
    unroll_tile(sch, sch.get_loops(init)[-3:])
    if result == "float16":
        partial_sums.mark(sch, init, [steps], plan.unroll * plan.tile.steps_per_load)
    if plan.dot is not None:
        sch.tensorize(dot_loop, plan.dot.name)
    return True


def _plan(sch: s_tir.Schedule, product: SBlockRV, hw: Hardware, tunable: bool) -> _Plan:
    """Choose the knobs."""
    node = sch.get(product)
    factor, result = (str(buffer.source.dtype) for buffer in (node.reads[0], node.writes[0]))
    points, _, count, outputs, channels = extents(sch, product)
    block = choose(sch, _tile_blocks(points, count, outputs + channels, hw), tunable, "tile_block")
    family = fitting(dots(hw.features, factor, factor), outputs, channels)
    depth = family[0].depth if family else 1
    work = _work(block, outputs, channels // depth, result, family, hw)
    tile = choose(sch, _register_tiles(work, hw)[:8], tunable)
    dot = next((dot for dot in family if dot.steps == tile.steps_per_load), None)
    counts = _UNROLLED.get(tile.steps_per_load, (2, 1))
    unroll = choose(sch, [n for n in counts if channels % (n * depth * tile.steps_per_load) == 0], tunable, "unroll")
    return _Plan(block, work, tile, dot, depth, unroll)


def _pack_weights(sch: s_tir.Schedule, product: SBlockRV, plan: _Plan) -> None:
    packed = sch.cache_read(product, 1, "global")
    channels, depth = plan.tile.channels, plan.depth
    sch.transform_layout(
        product,
        ("read", 1),
        lambda p, o, c: (p, o // channels, c // depth, o % channels, *([c % depth] if depth > 1 else [])),
    )
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)


@dataclass(frozen=True)
class _Nest:
    """The loops over images, over blocks of tiles, and over ``parts`` parts of the output channels of a block."""

    images: LoopRV
    outer: LoopRV
    part: LoopRV
    parts: int


def _sum_loops(
    sch: s_tir.Schedule, total: SBlockRV, out: SBlockRV, plan: _Plan, result: str, parallel: bool, hw: Hardware
) -> _Nest:
    """Schedule the sums and what follows: one tile of outputs × one vector of channels."""
    images, height, width, outputs = extents(sch, out)
    edge = int(sch.get(total).writes[0].source.shape[2])
    count = -(-height // edge) * -(-width // edge)
    most = min(hw.lanes(result), STACK_BYTES // (edge * edge * 4))
    lanes = next((n for n in divisors(outputs, most) if n & (n - 1) == 0), 1)
    loop_n, loop_y, loop_x, loop_o = sch.get_loops(out)
    tile_y, y = sch.split(loop_y, [None, edge])
    tile_x, x = sch.split(loop_x, [None, edge])
    vector, lane = sch.split(loop_o, [None, lanes])
    sch.reorder(loop_n, tile_y, tile_x, vector, y, x, lane)
    outer, inner = sch.split(sch.fuse(tile_y, tile_x), [None, plan.block])
    # Where there are too few tiles for all cores, they share the output channels of one block of tiles.
    parts = 1
    if parallel and images * (count // plan.block) < hw.cores and outputs % plan.tile.channels == 0:
        parts = divisors(outputs // lcm(plan.tile.channels, lanes), hw.cores)[0]
    part, vector = sch.split(vector, [parts, None])
    sch.reorder(loop_n, outer, part, inner, vector)
    unroll_tile(sch, [y, x, lane])
    sch.compute_at(total, vector, preserve_unit_loops=True)
    sch.vectorize(sch.get_loops(total)[-1])
    return _Nest(loop_n, outer, part, parts)


def _product_loops(
    sch: s_tir.Schedule, product: SBlockRV, part: LoopRV, plan: _Plan, hw: Hardware
) -> tuple[SBlockRV, LoopRV, LoopRV]:
    """Schedule the products: accumulators in registers, copied out when the reduction is done.

    Returns the block of the copy, the outermost loop of the reduction, and the loop that an intrinsic replaces.
    """
    tile = plan.tile
    copy = sch.cache_write(product, 0, "global")
    sch.compute_at(copy, part, preserve_unit_loops=True)
    point, _, copy_t, copy_o = sch.get_loops(copy)[-4:]
    tiled, row = sch.split(copy_t, [None, tile.pixels])
    channel_block, *inside = sch.split(copy_o, [None, tile.channels // tile.lanes, tile.lanes])
    sch.reorder(point, channel_block, tiled, row, *inside)
    unroll_tile(sch, [row, *inside])
    sch.compute_at(product, tiled, preserve_unit_loops=True)
    row, own, reduction = sch.get_loops(product)[-3:]
    inside = sch.split(own, [None, tile.lanes])
    counts = [n for n in (tile.steps_per_load, plan.depth) if n > 1]
    steps, step, *dot_axes = sch.split(reduction, [None, plan.unroll, *counts])
    several = dot_axes[:1] if tile.steps_per_load > 1 else []
    pair = [row, inside[0]]
    if vectors_first(plan.work, tile.pixels, tile.channels // tile.lanes, tile.steps_per_load, hw):
        pair.reverse()
    innermost = [*several, inside[1], *dot_axes[len(several) :]]
    sch.reorder(steps, step, *pair, *innermost)
    for loop in (step, row, inside[0]):
        sch.unroll(loop)
    if plan.dot is None:
        sch.vectorize(inside[1])
    return copy, steps, innermost[0]


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
        steps_per_load=tuple(dot.steps for dot in family) or (1,),
        pixels_per_load=2,
    )


def _register_tiles(work: Work, hw: Hardware) -> list[RegisterTile]:
    whole = [tile for tile in tiles(work, hw) if not tile.flat and work.cols % tile.pixels == 0]
    small = [tile for tile in whole if tile.pixels * tile.channels * 4 <= STACK_BYTES]
    return small or whole


RULE = Rule("winograd", apply, order=10)
