"""The register tile that convolutions and dense layers share.

A contraction is ``out[…, pixel, channel] += data[…] · weights[…]`` with NHWC-like data and constant weights. The
loop nest is ``channel_block, outer, row, col_outer, reduction, pixel tile (unrolled), channel vectors
(unrolled), lane``: the accumulators of one tile stay in registers over the whole reduction, and bias,
activation, residual and requantization run on the tile before it is stored. Weights are packed
``[channel_block][reduction][channels]`` at compile time; in int8 four input channels stand together, as the
dot-product instructions want them.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.schedules.base import (
    PARALLEL_MIN_OPS,
    choose,
    divisors,
    extents,
    inline_around,
    iter_kinds,
    vectorize_inner,
)
from nnfuze_tvm.schedules.hardware import Hardware
from nnfuze_tvm.schedules.intrinsics import Dot4, dot4


@dataclass(frozen=True)
class Tile:
    """Output pixels (``rows`` × ``cols``) × output channels (``channels``, in vectors of ``lanes``)."""

    rows: int
    cols: int
    channels: int
    lanes: int


@dataclass(frozen=True)
class Work:
    """What a contraction has to do, seen by the tile model.

    Attributes
    ----------
    rows, cols, channels : int
        Output rows and columns that a tile may span, and output channels (of one group).
    steps : int
        Length of the reduction, in instructions that each take ``depth`` of its elements.
    lanes : int
        Channels per vector register of accumulators.
    depth : int
        Reduction elements per step: 4 with an int8 dot product, else 1.
    weight_bytes : int
        Bytes of one weight.
    multiplies : int
        Instructions on the multiply ports per accumulator and step.
    latency : float
        Cycles from one addition into an accumulator to the next.
    temporaries : int
        Registers that one step needs beside the accumulators and the weights.
    """

    rows: int
    cols: int
    channels: int
    steps: int
    lanes: int
    depth: int
    weight_bytes: int
    multiplies: int
    latency: float
    temporaries: int


def tiles(work: Work, hw: Hardware) -> list[Tile]:
    """Return register tiles that divide the output, best first by a model of the inner loop.

    One step of the reduction loads ``vectors`` weight registers and broadcasts one input per pixel for
    ``pixels · vectors`` multiply-adds. Two loads and two multiplies start per cycle, and an accumulator can be
    added to once per ``latency``, so few accumulators leave the units idle. What is loaded also takes issue slots:
    among tiles that keep the multipliers busy the one with fewer loads wins. Weights of a channel block that do
    not stay in L1 come from L2 or beyond, once per tile.
    """
    found: list[tuple[float, int, int, Tile]] = []
    lanes = work.lanes if work.channels % work.lanes == 0 else divisors(work.channels, work.lanes)[0]
    for vectors in range(1, 9):
        channels = vectors * lanes
        if work.channels % channels:
            continue
        step_bytes = channels * work.weight_bytes * work.depth
        block_bytes = work.steps * step_bytes
        bandwidth = 64 if block_bytes < hw.l1_bytes else 16 if block_bytes < hw.l2_bytes else 6
        for rows in divisors(work.rows, 4):
            for cols in divisors(work.cols, hw.registers):
                pixels = rows * cols
                accumulators = pixels * vectors
                if accumulators + work.temporaries + min(vectors, 2) > hw.registers:
                    continue
                cycles = max(
                    accumulators * work.multiplies / 2,
                    (pixels + vectors) / 2,
                    work.latency,
                    step_bytes / bandwidth,
                )
                cycles += 0.1 * (pixels + vectors)
                cost = cycles / (pixels * channels) * (1 + 0.02 * (rows - 1))
                found.append((cost, rows, -cols, Tile(rows, cols, channels, lanes)))
    found.sort(key=lambda item: item[:3])
    return [tile for *_, tile in found]


def schedule(sch: s_tir.Schedule, anchor: SBlockRV, hw: Hardware, tunable: bool, pixel_axes: int, groups: int) -> bool:
    """Schedule a contraction in place.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        Schedule of the PrimFunc ``main``.
    anchor : SBlockRV
        The reduction block. Its last spatial iterator is the output channel, the ``pixel_axes`` before it are
        the pixels, its last reduction iterator is the input channel; it reads data, then weights.
    hw : Hardware
        The machine.
    tunable : bool
        Sample tile and unrolling instead of taking the model's best.
    pixel_axes : int
        2 (rows and columns) or 1 (columns only).
    groups : int
        Groups of output channels that read different data.

    Returns
    -------
    bool
        False, and nothing changed, where the template does not fit.
    """
    kinds = iter_kinds(sch, anchor)
    n_spatial = kinds.count("S")
    sizes = extents(sch, anchor)
    node = sch.get(anchor)
    data, weights = (str(region.source.dtype) for region in node.reads[:2])
    accumulator = str(node.writes[0].source.dtype)
    depth = sizes[-1]
    constant_weights = node.reads[1].source.name in {param.name for param in _layout_free(sch)}
    dot = None
    if constant_weights and (accumulator, weights) == ("int32", "int8") and depth % 4 == 0:
        dot = dot4(hw.features, data)
    channels = sizes[n_spatial - 1] // groups
    if dot is not None and channels % dot.lanes:
        dot = None
    lanes = dot.lanes if dot else hw.lanes(accumulator)
    pixels = sizes[n_spatial - 1 - pixel_axes : n_spatial - 1]
    work = Work(
        rows=pixels[0] if pixel_axes == 2 else 1,
        cols=pixels[-1],
        channels=channels,
        steps=prod(sizes[n_spatial:]) // (4 if dot else 1),
        lanes=lanes,
        depth=4 if dot else 1,
        weight_bytes={"int8": 1, "int16": 2}.get(weights, 4),
        multiplies=dot.multiplies if dot else 1 if accumulator == "float32" else 2,
        latency=1.0 if accumulator == "int32" and not (dot and dot.multiplies == 1) else 4.0,
        temporaries=1 if accumulator == "float32" else 3 if data == "uint8" else 4,
    )
    options = tiles(work, hw)
    if not options:
        return False
    tile = choose(sch, options[:16], tunable)
    most = depth // work.depth
    unroll = choose(sch, [n for n in ((1, 2, 4) if dot else (2, 4, 1)) if most % n == 0], tunable, "unroll")

    pads = [block for block in sch.get_producers(anchor) if "pad" in sch.get(block).name_hint]
    out = inline_around(sch, anchor, keep=pads)
    if constant_weights:
        _pack_weights(sch, anchor, tile.channels, dot)

    loops = sch.get_loops(out)
    if len(loops) != n_spatial:
        raise AssertionError("the output block has other axes than the anchor")
    outer, tiled, channel = loops[: n_spatial - 1 - pixel_axes], loops[-1 - pixel_axes : -1], loops[-1]
    counts = [tile.rows, tile.cols][-pixel_axes:]
    channel_block, inner = sch.split(channel, [None, tile.channels])
    split = [sch.split(loop, [None, count]) for loop, count in zip(tiled, counts, strict=True)]
    vectors, lane = sch.split(inner, [None, tile.lanes])
    blocks_of = [pair[0] for pair in split]
    inside = [pair[1] for pair in split]
    sch.reorder(channel_block, *outer, *blocks_of, *inside, vectors, lane)
    _unroll_tile(sch, [*inside, vectors], lane)
    sch.compute_at(anchor, blocks_of[-1], preserve_unit_loops=True)

    own = sch.get_loops(anchor)[-len(kinds) :]
    spatial, reduction = own[:n_spatial], own[n_spatial:]
    tile_loops, tile_channel = spatial[-1 - pixel_axes : -1], spatial[-1]
    vectors, lane = sch.split(tile_channel, [None, tile.lanes])
    factors = [None, unroll] if dot is None else [None, unroll, 4]
    steps, unrolled, *dot_axis = sch.split(reduction[-1], factors)
    sch.reorder(*reduction[:-1], steps, unrolled, *tile_loops, vectors, lane, *dot_axis)
    for loop in (unrolled, *tile_loops, vectors):
        sch.unroll(loop)
    if dot is None:
        sch.vectorize(lane)
    if hw.cores > 1 and prod(sizes) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(channel_block, *outer, *blocks_of[:-1]))
    init = sch.decompose_reduction(anchor, [*reduction[:-1], steps][0])
    *init_tile, init_lane = sch.get_loops(init)[-pixel_axes - 2 :]
    _unroll_tile(sch, init_tile, init_lane)
    if dot is not None:
        sch.tensorize(lane, dot.name)
    for pad in pads:
        vectorize_inner(sch, sch.get_loops(pad)[-1], data, hw)
    return True


def weights_follow(sch: s_tir.Schedule, anchor: SBlockRV, order: tuple[int, ...]) -> bool:
    """Tell whether a block reads two buffers, the second at the block's iterators in this order."""
    node = sch.get(anchor)
    if len(node.reads) != 2 or len(node.reads[1].region) != len(order):
        return False
    return all(index.min.same_as(node.iter_vars[i].var) for index, i in zip(node.reads[1].region, order, strict=True))


def _layout_free(sch: s_tir.Schedule) -> list:
    """Return the parameters of ``main`` that are constants of the graph."""
    func = sch.mod["main"]
    return [func.params[int(i)] for i in func.attrs.get("layout_free_buffers", [])]


def _pack_weights(sch: s_tir.Schedule, anchor: SBlockRV, block: int, dot: Dot4 | None) -> None:
    """Rewrite the weights' layout for the tile, in a block that is evaluated at compile time."""
    rank = len(sch.get(anchor).reads[1].region)
    packed = sch.cache_read(anchor, 1, "global")

    def place(*axes: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
        if rank == 4:  # a convolution's, OHWI
            before, channel, kernel, depth = (), axes[0], axes[1:3], axes[3]
        else:  # a dense layer's, (batch,) K, N
            before, channel, kernel, depth = axes[:-2], axes[-1], (), axes[-2]
        if dot is None:
            return (*before, channel // block, *kernel, depth, channel % block)
        return (*before, channel // block, *kernel, depth // 4, channel % block, depth % 4)

    maps = {
        2: lambda a, b: place(a, b),
        3: lambda a, b, c: place(a, b, c),
        4: lambda a, b, c, d: place(a, b, c, d),
    }
    sch.transform_layout(anchor, ("read", 1), maps[rank])
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)


def _unroll_tile(sch: s_tir.Schedule, loops: list[LoopRV], lane: LoopRV) -> None:
    for loop in loops:
        sch.unroll(loop)
    sch.vectorize(lane)
