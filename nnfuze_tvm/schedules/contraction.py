"""The register tile that convolutions and dense layers share.

A contraction is ``out[…, pixel, channel] += data[…] · weights[…]`` with NHWC-like data and constant weights. The
loop nest is ``channel_block, outer, row, col_outer, reduction, pixel tile (unrolled), channel vectors
(unrolled), lane``: the accumulators of one tile stay in registers over the whole reduction, and bias,
activation, residual and requantization run on the tile before it is stored. Weights are packed
``[channel_block][reduction][channels]`` at compile time; in int8 four input channels stand together, as the
dot-product instructions want them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from math import inf, isfinite, prod

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.contraction import NO_PRODUCTS, Contraction
from nnfuze_tvm.schedules.blocks import (
    extents,
    goes_by_rows,
    inline_around,
    is_padding,
    iter_kinds,
    layout_free,
    narrow_products,
)
from nnfuze_tvm.schedules.intrinsics import Dot, dots, fitting
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, unroll_tile, vectorize_copy
from nnfuze_tvm.schedules.packing import arrange, can_pack_rows, pack_rows, pack_weights
from nnfuze_tvm.schedules.register_tile import RegisterTile, Work, ranked, streams, tiles, vectors_first
from nnfuze_tvm.schedules.rewrites import bias, narrow_sums, overlap, partial_sums, prefetch, row_pairs, tails

# Uses of a dot product in one iteration, best first. By element, two leave LLVM registers enough if they are of at
# most this many steps each.
_UNROLLED = {False: (1, 2, 4), True: (2, 1, 4)}
_TWICE = 4


@dataclass(frozen=True)
class _Plan:
    """What the template does with one contraction: the work, and what was chosen for it.

    Attributes
    ----------
    work : Work
        What there is to do.
    tile : RegisterTile
        The tile.
    dot : Dot or None
        The tensor intrinsic.
    unroll : int
        Steps of the reduction in one iteration.
    constant_weights : bool
        The weights can be packed at compile time.
    """

    work: Work
    tile: RegisterTile
    dot: Dot | None
    unroll: int
    constant_weights: bool


@dataclass(frozen=True)
class _Nest:
    """The loops of a tiled reduction that its other parts are placed in.

    ``blocks`` are the loops around the tiles of a channel block, ``window`` those over the kernel's places; ``dot`` the
    loops that the intrinsic replaces, outermost first, if there is one.
    """

    blocks: list[LoopRV]
    channel_block: LoopRV
    pixel_block: LoopRV
    window: list[LoopRV]
    steps: LoopRV
    pixel: LoopRV
    dot: list[LoopRV]


def schedule(
    sch: s_tir.Schedule,
    anchor: SBlockRV,
    hw: Hardware,
    tunable: bool,
    pixel_axes: int,
    groups: int,
    block: tuple[int, int] | None = None,
) -> bool:
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
    block : tuple of int, optional
        Of data that an index selects: how many output channels share an index, and how many input channels one is for.

    Returns
    -------
    bool
        False, and nothing changed, where the template does not fit.
    """
    n_spatial = iter_kinds(sch, anchor).count("S")
    sizes = extents(sch, anchor)
    plan = _plan(sch, anchor, hw, tunable, pixel_axes, groups, block)
    if plan is None:
        return False
    tile, dot = plan.tile, plan.dot
    data, accumulator = (str(sch.get(anchor).reads[0].source.dtype), str(sch.get(anchor).writes[0].source.dtype))

    pads = [block for block in sch.get_producers(anchor) if is_padding(sch, block)]
    out = inline_around(sch, anchor, keep=pads)
    if dot is not None and dot.data != data:
        pads = pads or [sch.cache_read(anchor, 0, "global")]
        sch.unsafe_set_dtype(pads[0], 0, dot.data)
    packed = pack_weights(sch, anchor, tile.channels, dot) if plan.constant_weights else ""
    rows = arrange(sch, anchor, tile.channels, dot) if dot and not plan.constant_weights else None
    if tile.flat:
        flatten_pixels(sch, anchor, out, plan.work.cols)
        n_spatial -= 1
        sizes = extents(sch, anchor)

    nest = _tile_loops(sch, anchor, plan, n_spatial, hw)
    cropped = extents(sch, out)[-1] < sizes[n_spatial - 1]
    _store_tiles(sch, out, nest, tile, cropped)
    if dot is not None and rows is not None:
        pack_rows(sch, rows, nest.blocks[-1], dot)
    if hw.cores > 1 and prod(sizes) >= PARALLEL_MIN_OPS:
        _share(sch, nest, cropped)
    one_image = prod(sizes[: n_spatial - 2]) == 1
    # Sums of two rows stand together in other places than the bias has.
    from_bias = accumulator != "float16" and not cropped and not (dot is not None and dot.rows > 1)
    reduction = _clear_sums(sch, anchor, plan, nest, from_bias)
    whole = tile.flat or plan.work.rows == 1
    # The tiles after the first leave the memory idle; a single one reads its weights in a stream anyway.
    several = int(sch.get(nest.pixel_block).extent) > 1
    if plan.constant_weights and one_image and whole and several and streams(plan.work, hw):
        block_bytes = plan.work.steps * tile.channels * plan.work.weight_bytes * plan.work.depth
        reduction = prefetch.mark(sch, nest.pixel_block, reduction, packed, block_bytes)
    if dot is not None:
        sch.tensorize(nest.dot[0], dot.name)
        if dot.rows > 1:
            row_pairs.mark(sch, reduction[0], nest.pixel, dot)
    for pad in pads:
        vectorize_copy(sch, pad, hw)
    return True


def _share(sch: s_tir.Schedule, nest: _Nest, cropped: bool) -> None:
    """Share tiles among threads; the loop over blocks of channels stays by itself if the last one has fewer."""
    outer = [loop for loop in nest.blocks if loop is not nest.channel_block]
    if not cropped:
        sch.parallel(sch.fuse(*nest.blocks))
    elif prod(int(sch.get(loop).extent) for loop in outer) == 1:
        sch.parallel(nest.channel_block)
    else:
        sch.parallel(sch.fuse(*outer))


def _plan(
    sch: s_tir.Schedule,
    anchor: SBlockRV,
    hw: Hardware,
    tunable: bool,
    pixel_axes: int,
    groups: int,
    block: tuple[int, int] | None,
) -> _Plan | None:
    """Choose the knobs, or return None, and nothing changed, where no tile fits."""
    node = sch.get(anchor)
    n_spatial = iter_kinds(sch, anchor).count("S")
    sizes = extents(sch, anchor)
    data, weights = (str(region.source.dtype) for region in node.reads[:2])
    accumulator = str(node.writes[0].source.dtype)
    constant_weights = node.reads[1].source.name in {param.name for param in layout_free(sch)}
    channels, depth = sizes[n_spatial - 1] // groups, sizes[-1]
    together, beside = block or (0, depth)
    pixels = prod(sizes[n_spatial - 1 - pixel_axes : n_spatial - 1])
    narrow = narrow_products(sch) if constant_weights else NO_PRODUCTS
    known = [dot for dot in dots(hw.features, data, weights, narrow) if dot.sums == accumulator and dot.rows <= pixels]
    if not constant_weights:
        known = [dot for dot in known if can_pack_rows(sch, anchor, dot, pixels)]
    family = fitting(known, together or channels, beside)
    work = _work(
        family,
        (sizes[n_spatial - 3] if pixel_axes == 2 else 1, sizes[n_spatial - 2], channels, prod(sizes[n_spatial:])),
        weights,
        accumulator,
        hw,
        together,
    )
    options = tiles(replace(work, by_rows=goes_by_rows(sch)), hw)
    if not options:
        return None
    tile = choose(sch, options[:16], tunable)
    dot = next((dot for dot in family if dot.steps == tile.steps_per_load), None)
    by_element = bool(dot and 1 < dot.steps <= _TWICE and dot.rows == 1 and not dot.paired)
    most = depth // (work.depth * tile.steps_per_load)
    counts: tuple[int, ...] = _UNROLLED[by_element] if dot else (2, 4, 1)
    if block is not None:  # what an index is for, or whole numbers of that
        counts = tuple(sorted(counts, key=lambda n: n * work.depth * tile.steps_per_load % beside))
    if dot is not None and dot.narrow:
        counts = tuple(n for n in counts if n * dot.steps * dot.depth <= dot.narrow)
    unroll = choose(sch, [n for n in counts if most % n == 0], tunable, "unroll")
    return _Plan(work, tile, dot, unroll, constant_weights)


def to_compute(layer: Contraction, hw: Hardware) -> int:
    """Return how many output channels a kernel should compute of a layer, by the tile model: as many or some more."""
    known = _known(layer, hw)
    lengths = {dot.lanes for dot in known} | ({hw.lanes(layer.sums)} if layer.sums.startswith("float") else set())
    counts = sorted({-(-layer.channels // length) * length for length in (1, *lengths)})
    costs = {count: cycles(replace(layer, channels=count), hw) for count in counts}
    return min(costs, key=lambda count: costs[count]) if any(map(isfinite, costs.values())) else layer.channels


def cycles(layer: Contraction, hw: Hardware, block: tuple[int, int] | None = None) -> float:
    """Return the cycles that a layer takes by the tile model; infinitely many where there is nothing to know of them.

    ``block`` is what `schedule` is given.
    """
    known, (together, beside) = _known(layer, hw), block or (0, layer.depth)
    family = fitting(known, together or layer.channels, beside)
    if known and not family and not layer.sums.startswith("float"):
        return inf
    shape = (layer.rows, layer.cols, layer.channels, layer.products)
    work = _work(family, shape, layer.weights, layer.sums, hw, together)
    return min((cost * layer.channels for cost, _ in ranked(work, hw)[:1]), default=inf)


def _known(layer: Contraction, hw: Hardware) -> list[Dot]:
    known = [dot for dot in dots(hw.features, layer.data, layer.weights, layer.narrow) if dot.sums == layer.sums]
    return [dot for dot in known if dot.rows <= layer.rows * layer.cols]


def _work(
    family: list[Dot],
    shape: tuple[int, int, int, int],
    weights: str,
    accumulator: str,
    hw: Hardware,
    together: int = 0,
) -> Work:
    """Return what the tile model must know; ``shape`` is rows, columns, channels and products per sum."""
    rows, cols, channels, products = shape
    dot = family[0] if family else None
    floats = accumulator.startswith("float")
    return Work(
        rows=rows,
        cols=cols,
        channels=channels,
        steps=products // (dot.depth if dot else 1),
        lanes=dot.lanes if dot else hw.lanes(accumulator),
        depth=dot.depth if dot else 1,
        weight_bytes={"int8": 1, "int16": 2, "float16": 2}.get(weights, 4),
        multiplies=dot.multiplies if dot else 1 if floats else 2,
        prepare=dot.prepare if dot else 0,
        latency=1.0 if accumulator == "int32" and not (dot and (dot.depth, dot.multiplies) == (4, 1)) else 4.0,
        temporaries=2 if floats else 3 if dot and not dot.paired else 4,
        # What the table look-ups take, and sums of two products that wait to be added.
        constants=2 if dot and dot.paired else 0,
        pixels_per_instruction=dot.rows if dot else 1,
        steps_per_load=tuple(dot.steps for dot in family) or (1,),
        integer=not floats,
        sum_bytes=2 if accumulator == "float16" else 4,
        together=together,
        narrow=dot.narrow if dot else 0,
    )


def _tile_loops(sch: s_tir.Schedule, anchor: SBlockRV, plan: _Plan, n_spatial: int, hw: Hardware) -> _Nest:
    """Split and order the reduction's loops."""
    tile, work, dot = plan.tile, plan.work, plan.dot
    loops = sch.get_loops(anchor)
    *outer, pixel, channel = loops[:n_spatial]
    *window, depth_loop = loops[n_spatial:]
    extent = int(sch.get(pixel).extent)
    channel_block, inner = sch.split(channel, [None, tile.channels])
    # Without conditions on the pixels of the last tile: it will overlap the one before.
    pixel_block, inside = sch.split(pixel, [None, tile.pixels], disable_predication=True)
    vectors, lane = sch.split(inner, [None, tile.lanes])
    own = [n for n in (tile.steps_per_load, work.depth) if n > 1]
    steps, unrolled, *dot_axes = sch.split(depth_loop, [None, plan.unroll, *own])
    several = dot_axes[:1] if tile.steps_per_load > 1 else []
    pair = [inside, vectors]
    if vectors_first(work, tile.pixels, tile.channels // tile.lanes, tile.steps_per_load, hw):
        pair.reverse()
    innermost = [*several, lane, *dot_axes[len(several) :]]
    # A computed right-hand side is packed per matrix.
    blocks = [channel_block, *outer] if plan.constant_weights else [*outer, channel_block]
    sch.reorder(*blocks, pixel_block, *window, steps, unrolled, *pair, *innermost)
    for loop in (unrolled, inside, vectors):
        sch.unroll(loop)
    if dot is not None and not dot.paired and window and int(sch.get(steps).extent) == 1:
        # A loop over the pixels of a kernel row would be most of the work; table look-ups leave no registers for it.
        sch.unroll(window[-1])
    if dot is None:
        sch.vectorize(lane)
    if extent % tile.pixels:
        overlap.mark(sch, pixel_block, extent)
    return _Nest(blocks, channel_block, pixel_block, window, steps, inside, innermost)


def _store_tiles(sch: s_tir.Schedule, out: SBlockRV, nest: _Nest, tile: RegisterTile, cropped: bool) -> None:
    """Compute what follows the sums tile by tile."""
    channels = extents(sch, out)[-1]
    sch.reverse_compute_at(out, nest.pixel_block, preserve_unit_loops=True)
    *_, out_pixel, out_channel = sch.get_loops(out)
    # 8-bit results are packed from several vectors of sums at once.
    narrow = str(sch.get(out).writes[0].source.dtype) in ("int8", "uint8")
    vectors = next(n for n in (4, 2, 1) if tile.channels % (n * tile.lanes) == 0) if narrow else 1
    out_vector, lane = sch.split(out_channel, [None, vectors * tile.lanes])
    unroll_tile(sch, [out_pixel, out_vector, lane])
    if cropped:
        tails.mark(sch, nest.channel_block, out_vector, vectors * tile.lanes, channels)


def _clear_sums(sch: s_tir.Schedule, anchor: SBlockRV, plan: _Plan, nest: _Nest, from_bias: bool) -> list[LoopRV]:
    """Clear a tile's sums before its reduction; return the loops of the reduction, which may have become more."""
    reduction = [*nest.window, nest.steps]
    init = sch.decompose_reduction(anchor, reduction[0])
    if from_bias:
        bias.mark(sch, init)
    unroll_tile(sch, sch.get_loops(init)[-3:])
    if str(sch.get(init).writes[0].source.dtype) == "float16":
        reduction = partial_sums.mark(sch, init, reduction, plan.unroll * plan.tile.steps_per_load)
    if plan.dot is not None and plan.dot.narrow:
        reduction = narrow_sums.mark(
            sch, reduction, nest.pixel, plan.unroll * plan.dot.steps * plan.dot.depth, plan.dot
        )
    return reduction


def flatten_pixels(sch: s_tir.Schedule, anchor: SBlockRV, out: SBlockRV, width: int) -> None:
    """Make one iterator of the rows and columns (…, y, x, f), in the anchor and in the output."""
    row = iter_kinds(sch, out).count("S") - 3

    def flat(*axes: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
        return (*axes[:row], axes[row] * width + axes[row + 1], *axes[row + 2 :])

    sch.transform_layout(anchor, ("write", 0), flat)
    for block in (anchor, out):
        index_map = tirx.IndexMap.from_func(flat, len(iter_kinds(sch, block)), index_dtype="int64")
        sch.transform_block_layout(block, index_map)
