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
from itertools import product
from math import prod

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.base import PARALLEL_MIN_OPS, choose, divisors, extents, inline_around, iter_kinds
from nnfuze_tvm.schedules.intrinsics import Dot, dots
from nnfuze_tvm.schedules.rewrites import bias, overlap, partial_sums, prefetch, row_pairs

# Uses of a dot product in one iteration, best first. By element, two leave LLVM registers enough if they are of at
# most this many steps each.
_UNROLLED = {False: (1, 2, 4), True: (2, 1, 4)}
_TWICE = 4


@dataclass(frozen=True)
class Tile:
    """``pixels`` neighbouring output pixels × ``channels``, in vectors of ``lanes``.

    ``flat`` tiles run on from the end of one row of the image into the next. One load brings the data of ``at_once``
    steps.
    """

    pixels: int
    channels: int
    lanes: int
    flat: bool
    at_once: int = 1


@dataclass(frozen=True)
class Work:
    """What a contraction has to do, seen by the tile model.

    Attributes
    ----------
    rows, cols, channels : int
        Rows and columns of the output, and its channels (of one group).
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
    integer : bool
        The accumulators are int32 and not floats.
    sum_bytes : int
        Bytes of one accumulator.
    prepare : int
        Instructions per pixel and step that bring the data into order.
    together : int
        Pixels that one instruction takes: only multiples of them make a tile.
    constants : int
        Registers, per step at once, of what brings the data into order.
    at_once : tuple of int
        Of how many steps one load may bring the data.
    loaded : int
        Pixels whose data stand together: one instruction loads them.
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
    integer: bool
    sum_bytes: int = 4
    prepare: int = 0
    constants: int = 0
    together: int = 1
    at_once: tuple[int, ...] = (1,)
    loaded: int = 1


def tiles(work: Work, hw: Hardware) -> list[Tile]:
    """Return register tiles, best first by a model of the inner loop.

    One step of the reduction loads ``vectors`` weight registers and broadcasts one input per pixel for
    ``pixels · vectors`` multiply-adds. Two loads and two multiplies start per cycle, and an accumulator can be
    added to once per ``latency``, so few accumulators leave the units idle. What is loaded also takes issue slots:
    among tiles that keep the multipliers busy the one with fewer loads wins. Weights of a channel block that do
    not stay in L1 come from L2 or beyond, once per tile. A tile's accumulators are cleared, and its results stored,
    once. Where pixels don't divide a row, either the last tile of every row overlaps the one before it, or tiles run
    on into the next row, and then only the image's last one overlaps. Where the weights outgrow the cache, all tiles
    of a channel block stand in one loop, which prefetches the next block's.

    On ARM, whose cores start few instructions per cycle of whatever kind, a step costs what it executes.
    """
    found: list[tuple[float, int, Tile]] = []
    streams = _streams(work, hw)
    lanes = work.lanes if work.channels % work.lanes == 0 else divisors(work.channels, work.lanes)[0]
    for vectors in range(1, 9):
        channels = vectors * lanes
        if work.channels % channels:
            continue
        step_bytes = channels * work.weight_bytes * work.depth
        block_bytes = work.steps * step_bytes
        bandwidth = 64 if block_bytes < hw.l1_bytes else 16 if block_bytes < hw.l2_bytes else 6
        for pixels, at_once in product(range(1, min(hw.registers, work.rows * work.cols) + 1), work.at_once):
            accumulators = pixels * vectors
            if pixels % work.together or _registers(work, pixels, vectors, at_once, hw) > hw.registers:
                continue
            if hw.isa == "arm":
                cycles = max(
                    _instructions(work, pixels, vectors, at_once, hw) / 2, work.latency, step_bytes / bandwidth
                )
            else:
                cycles = max(
                    accumulators * work.multiplies / 2,
                    (pixels + vectors) / 2,
                    work.latency,
                    step_bytes / bandwidth,
                )
                cycles += 0.05 * (pixels + vectors)
            # Integer sums are requantized, which takes its cycles; float ones only wait for their last additions.
            finish = 5 * accumulators + 12 if work.integer else 0.2 * accumulators**2 + 4
            tile_cycles = cycles * work.steps + finish
            for flat in (False, True):
                if flat and (work.rows == 1 or (work.cols % pixels == 0 and not streams)):
                    continue
                if not flat and (pixels > work.cols or (streams and work.rows > 1)):
                    continue
                count = -(-work.rows * work.cols // pixels) if flat else work.rows * -(-work.cols // pixels)
                cost = count * (tile_cycles + (4 * pixels if flat else 0)) / channels
                found.append((cost, -pixels, Tile(pixels, channels, lanes, flat, at_once)))
    found.sort(key=lambda item: item[:2])
    return [tile for *_, tile in found]


def _registers(work: Work, pixels: int, vectors: int, at_once: int, hw: Hardware) -> int:
    """Return how many vector registers a tile needs."""
    accumulators = pixels * vectors
    if at_once > 1:
        wide = max(1, work.lanes * work.sum_bytes // hw.vector_bytes)
        held = _held(work, at_once, hw)
        if vectors_first(work, pixels, vectors, at_once, hw):
            # Two loads bring the data of three steps.
            kept = 2 * held + pixels + (at_once == 3)
        elif work.integer or work.latency == 1:
            kept = vectors * held + 1
        else:  # float additions wait for each other, so LLVM loads the next steps' weights early
            kept = (vectors + 1) * held + 2
        return accumulators * wide + kept + work.constants * at_once + work.temporaries - 1
    # Weights that several pixels use stay in registers; of a single pixel's, each is used once. And a
    # broadcast that is used once gives its register to the float sum: LLVM then needs two per pixel.
    needed = accumulators + work.temporaries + work.constants + (vectors if pixels > 1 else 1)
    return needed + pixels if vectors == 1 and not work.integer else needed


def vectors_first(work: Work, pixels: int, vectors: int, at_once: int, hw: Hardware) -> bool:
    """Tell whether a tile's multiplications should go from vector to vector and not from pixel to pixel.

    LLVM keeps what the inner loop shares: the weights of one vector (and of the next, loaded early) and the data of all
    pixels, or the data of one pixel and the weights of all vectors. Data that are brought into order would be so again
    for every vector, and pairs of rows (`row_pairs`) go from pixel to pixel.
    """
    if at_once == 1 or work.prepare or work.together > 1:
        return False
    held = _held(work, at_once, hw)
    return 2 * held + pixels < vectors * held + 1


def _held(work: Work, at_once: int, hw: Hardware) -> int:
    """Return how many registers the weights of one vector of channels take."""
    return max(1, work.lanes * work.depth * work.weight_bytes // hw.vector_bytes) * at_once


def _instructions(work: Work, pixels: int, vectors: int, at_once: int, hw: Hardware) -> float:
    """Return the instructions of one step: two start per cycle, whatever they are.

    A pair of weight vectors is one load, and so are the data of ``at_once`` steps (of three, it is two), of ``loaded``
    pixels. The loop takes four more.
    """
    weights = vectors * work.lanes * work.depth * work.weight_bytes / (2 * hw.vector_bytes)
    data = pixels * (work.prepare + (2 if at_once == 3 else 1) / (at_once * work.loaded))
    return pixels * vectors * work.multiplies + weights + data + 4 / at_once


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
        2 (rows and columns of an image) or 1.
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
    floats = accumulator.startswith("float")
    depth = sizes[-1]
    constant_weights = node.reads[1].source.name in {param.name for param in layout_free(sch)}
    channels = sizes[n_spatial - 1] // groups
    known = dots(hw.features, data, weights) if constant_weights else []
    pixels = prod(sizes[n_spatial - 1 - pixel_axes : n_spatial - 1])
    known = [dot for dot in known if dot.sums == accumulator and dot.rows <= pixels]
    family = fitting(known, channels, depth)
    dot = family[0] if family else None
    lanes = dot.lanes if dot else hw.lanes(accumulator)
    work = Work(
        rows=sizes[n_spatial - 3] if pixel_axes == 2 else 1,
        cols=sizes[n_spatial - 2],
        channels=channels,
        steps=prod(sizes[n_spatial:]) // (dot.depth if dot else 1),
        lanes=lanes,
        depth=dot.depth if dot else 1,
        weight_bytes={"int8": 1, "int16": 2, "float16": 2}.get(weights, 4),
        multiplies=dot.multiplies if dot else 1 if floats else 2,
        prepare=dot.prepare if dot else 0,
        latency=1.0 if accumulator == "int32" and not (dot and (dot.depth, dot.multiplies) == (4, 1)) else 4.0,
        temporaries=2 if floats else 3 if dot and not dot.paired else 4,
        # What the table look-ups take, and sums of two products that wait to be added.
        constants=2 if dot and dot.paired else 0,
        together=dot.rows if dot else 1,
        at_once=tuple(dot.steps for dot in family) or (1,),
        integer=not floats,
        sum_bytes=2 if accumulator == "float16" else 4,
    )
    options = tiles(work, hw)
    if not options:
        return False
    tile = choose(sch, options[:16], tunable)
    dot = next((dot for dot in family if dot.steps == tile.at_once), None)
    by_element = bool(dot and 1 < dot.steps <= _TWICE and dot.rows == 1 and not dot.paired)
    most = depth // (work.depth * tile.at_once)
    unroll = choose(sch, [n for n in (_UNROLLED[by_element] if dot else (2, 4, 1)) if most % n == 0], tunable, "unroll")

    pads = [block for block in sch.get_producers(anchor) if is_padding(sch, block)]
    out = inline_around(sch, anchor, keep=pads)
    if dot is not None and dot.data != data:
        pads = pads or [sch.cache_read(anchor, 0, "global")]
        sch.unsafe_set_dtype(pads[0], 0, dot.data)
    if constant_weights:
        packed = pack_weights(sch, anchor, tile.channels, dot)
    if tile.flat:
        flatten_pixels(sch, anchor, out, work.cols)
        n_spatial -= 1
        sizes = extents(sch, anchor)

    loops = sch.get_loops(anchor)
    *outer, pixel, channel = loops[:n_spatial]
    *window, depth_loop = loops[n_spatial:]
    extent = int(sch.get(pixel).extent)
    channel_block, inner = sch.split(channel, [None, tile.channels])
    # Without conditions on the pixels of the last tile: it will overlap the one before.
    pixel_block, inside = sch.split(pixel, [None, tile.pixels], disable_predication=True)
    vectors, lane = sch.split(inner, [None, tile.lanes])
    own = [n for n in (tile.at_once, work.depth) if n > 1]
    steps, unrolled, *dot_axes = sch.split(depth_loop, [None, unroll, *own])
    several = dot_axes[:1] if tile.at_once > 1 else []
    reduction = [*window, steps]
    pair = [inside, vectors]
    if vectors_first(work, tile.pixels, tile.channels // tile.lanes, tile.at_once, hw):
        pair.reverse()
    sch.reorder(
        channel_block,
        *outer,
        pixel_block,
        *reduction,
        unrolled,
        *pair,
        *several,
        lane,
        *dot_axes[len(several) :],
    )
    for loop in (unrolled, inside, vectors):
        sch.unroll(loop)
    if dot is not None and not dot.paired and window and int(sch.get(steps).extent) == 1:
        # A loop over the pixels of a kernel row would be most of the work; table look-ups leave no registers for it.
        sch.unroll(window[-1])
    if dot is None:
        sch.vectorize(lane)
    if extent % tile.pixels:
        overlap.mark(sch, pixel_block, extent)

    sch.reverse_compute_at(out, pixel_block, preserve_unit_loops=True)
    *_, out_pixel, out_channel = sch.get_loops(out)
    # 8-bit results are packed from several vectors of sums at once.
    narrow = str(sch.get(out).writes[0].source.dtype) in ("int8", "uint8")
    at_once = next(n for n in (4, 2, 1) if tile.channels % (n * tile.lanes) == 0) if narrow else 1
    unroll_tile(sch, [out_pixel, *sch.split(out_channel, [None, at_once * tile.lanes])])
    if hw.cores > 1 and prod(sizes) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(channel_block, *outer))
    init = sch.decompose_reduction(anchor, reduction[0])
    if accumulator == "float32":
        bias.mark(sch, init)
    unroll_tile(sch, sch.get_loops(init)[-3:])
    if accumulator == "float16":
        reduction = partial_sums.mark(sch, init, reduction, unroll * tile.at_once)
    if constant_weights and prod(sizes[: n_spatial - 2]) == 1 and _streams(work, hw):
        block_bytes = work.steps * tile.channels * work.weight_bytes * work.depth
        prefetch_next(sch, packed, pixel_block, reduction, block_bytes)
    if dot is not None:
        sch.tensorize(*(several or [lane]), dot.name)
        if dot.rows > 1:
            row_pairs.mark(sch, reduction[0], inside, dot)
    for pad in pads:
        copy(sch, pad, hw)
    return True


def fitting(known: list[Dot], channels: int, depth: int) -> list[Dot]:
    """Return the best of the known intrinsics that divides so many channels and products, for several steps or one."""
    found = [dot for dot in known if channels % dot.lanes == 0 and depth % (dot.steps * dot.depth) == 0]
    return [dot for dot in found if (dot.lanes, dot.depth) == (found[0].lanes, found[0].depth)]


def _streams(work: Work, hw: Hardware) -> bool:
    """Tell whether the weights don't stay in L2 from one inference to the next."""
    return work.steps * work.depth * work.channels * work.weight_bytes > hw.l2_bytes // 2


def is_padding(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether a block puts zeros around its data; without any it is worth no copy."""
    node = sch.get(block)
    shapes = [[int(extent) for extent in region.source.ty.shape] for region in (*node.reads, *node.writes)]
    return "pad" in node.name_hint and any(shape != shapes[-1] for shape in shapes)


def prefetch_next(sch: s_tir.Schedule, packed: str, tiles: LoopRV, reduction: list[LoopRV], block_bytes: int) -> None:
    """Spread the prefetch of a channel block's weights evenly over the tiles of the block before."""
    count = int(sch.get(tiles).extent)
    window = prod(int(sch.get(loop).extent) for loop in reduction[:-1])
    steps = int(sch.get(reduction[-1]).extent)
    lines = -(-block_bytes // (prefetch.LINE_BYTES * count * window))
    # In bursts of a few lines, which the load buffers hold.
    groups = next((n for n in reversed(divisors(steps, steps)) if lines <= 4 * n), steps)
    reduction[-1:] = sch.split(reduction[-1], [groups, None])
    prefetch.mark(sch, tiles, reduction[-2], packed, -(-lines // groups))


def flatten_pixels(sch: s_tir.Schedule, anchor: SBlockRV, out: SBlockRV, width: int) -> None:
    """Make one iterator of the rows and columns, in the anchor (n, y, x, f, ky, and kx, c or k) and in the output."""
    sch.transform_layout(anchor, ("write", 0), lambda n, y, x, f: (n, y * width + x, f))
    if len(sch.get(anchor).iter_vars) == 6:
        sch.transform_block_layout(anchor, lambda n, y, x, f, ky, k: (n, y * width + x, f, ky, k))
    else:
        sch.transform_block_layout(anchor, lambda n, y, x, f, ky, kx, c: (n, y * width + x, f, ky, kx, c))
    sch.transform_block_layout(out, lambda n, y, x, f: (n, y * width + x, f))


def copy(sch: s_tir.Schedule, pad: SBlockRV, hw: Hardware) -> None:
    """Schedule the padded or widened copy of the data."""
    node = sch.get(pad)
    lanes = hw.lanes(str(node.writes[0].source.dtype))
    # What was padded by whole segments has the same condition for all numbers of one.
    last = sch.get_loops(pad)[-1]
    width = int(node.annotations.get("nnfuze.segment", sch.get(last).extent))
    _, lane = sch.split(last, [None, divisors(width, lanes)[0]])
    sch.vectorize(lane)


def weights_follow(sch: s_tir.Schedule, anchor: SBlockRV, order: tuple[int, ...]) -> bool:
    """Tell whether a block reads two buffers, the second at the block's iterators in this order."""
    node = sch.get(anchor)
    if len(node.reads) != 2 or len(node.reads[1].region) != len(order):
        return False
    return all(index.min.same_as(node.iter_vars[i].var) for index, i in zip(node.reads[1].region, order, strict=True))


def layout_free(sch: s_tir.Schedule) -> list[tirx.Var]:
    """Return the parameters of ``main`` that are constants of the graph."""
    func = sch.mod["main"]
    return [func.params[int(i)] for i in func.attrs.get("layout_free_buffers", [])]


def pack_weights(sch: s_tir.Schedule, anchor: SBlockRV, block: int, dot: Dot | None) -> str:
    """Rewrite the weights for the tile, in a block that is evaluated at compile time; return its buffer's name."""
    node = sch.get(anchor)
    rank = len(node.reads[1].region)
    channel_iter = node.iter_vars[iter_kinds(sch, anchor).count("S") - 1]
    channels_last = node.reads[1].region[-1].min.same_as(channel_iter.var)
    packed = sch.cache_read(anchor, 1, "global")

    def place(*axes: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
        if channels_last:  # a dense layer's, (batch,) K, N
            before, channel, kernel, depth = axes[:-2], axes[-1], (), axes[-2]
        else:  # a convolution's, OHWI, or O, row, place in the row
            before, channel, kernel, depth = (), axes[0], axes[1:-1], axes[-1]
        if dot is None or dot.depth == 1:
            return (*before, channel // block, *kernel, depth, channel % block)
        if dot.paired:
            lane, pair = (channel % block // dot.lanes, channel % dot.lanes), depth % dot.depth // 2
            return (*before, channel // block, *kernel, depth // dot.depth, lane[0], pair, lane[1], depth % 2)
        return (*before, channel // block, *kernel, depth // dot.depth, channel % block, depth % dot.depth)

    maps = {
        2: lambda a, b: place(a, b),
        3: lambda a, b, c: place(a, b, c),
        4: lambda a, b, c, d: place(a, b, c, d),
    }
    sch.transform_layout(anchor, ("read", 1), maps[rank])
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)
    return str(sch.get(packed).writes[0].source.name)


def unroll_tile(sch: s_tir.Schedule, loops: list[LoopRV]) -> None:
    """Unroll all loops but the last one, which becomes a vector."""
    *unrolled, lane = loops
    for loop in unrolled:
        sch.unroll(loop)
    sch.vectorize(lane)
