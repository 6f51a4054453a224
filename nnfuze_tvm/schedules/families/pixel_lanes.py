"""Pointwise float32 convolutions on AArch64: four pixels' data in one vector.

A multiplication by element takes its factor from any lane of a vector. In NHWC, a vector of data holds neighbouring
channels of one pixel, so a tile of many pixels loads many vectors. Transposed by squares of 4 pixels × 4 channels it
loads a few, and keeps only those of one step in registers, which leaves more for accumulators. The loop nest is
``image, band of pixels, (transposed copy; channel_block, tile, reduction, quads of pixels, channel vectors)``: the
band's copy stays in a cache while all weights pass it. Bands are whole rows where rows can be, so that such a kernel
can be fused with its neighbours (`bands`). A transposition costs less than a percent of the products where there are
enough output channels.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import blocks, extents, inline_around, is_padding, layout_free
from nnfuze_tvm.schedules.contraction import flatten_pixels
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, divisors, unroll_tile
from nnfuze_tvm.schedules.packing import pack_weights
from nnfuze_tvm.schedules.rewrites import bias, peel, prefetch, squares

_PIXELS = _LANES = 4
# Pixels from which it pays that the last quad has fewer.
_MIN_PIXELS = 24
# Output channels from which the transposition pays.
_MIN_CHANNELS = 64
_REGISTERS = 32
# Cycles in which a byte comes from L2, and multiply-adds per cycle: those of small cores, about.
_L2_CYCLES = 1 / 16
_MACS = 4
# Costs up to this ratio are about the same.
_ALIKE = 1.05


@dataclass(frozen=True)
class QuadTile:
    """``quads`` of four pixels × ``vectors`` of four channels."""

    quads: int
    vectors: int


def tiles(quads: int, channels: int) -> list[QuadTile]:
    """Return register tiles for a band of ``quads`` of pixels, best first by the instructions per product.

    A pair of vectors, of data or of weights, is one load.
    """
    found: list[tuple[float, QuadTile]] = []
    for tile in (QuadTile(q, v) for q in range(1, 8) for v in range(1, 8)):
        accumulators = _LANES * tile.quads * tile.vectors
        # Beside the sums, the weights of two steps and one quad's data of both.
        if channels % (_LANES * tile.vectors) or accumulators + 2 * tile.vectors + 2 >= _REGISTERS:
            continue
        if quads >= tile.quads:
            found.append((_step(quads, tile) / tile.vectors, tile))
    found.sort(key=lambda item: item[0])
    return [tile for _, tile in found]


def _step(quads: int, tile: QuadTile) -> float:
    """Return the instructions of one step of a band of ``quads``, for one block of channels."""
    whole, rest = divmod(quads, tile.quads)
    return whole * _instructions(tile.quads, tile.vectors) + (_instructions(rest, tile.vectors) if rest else 0)


def _instructions(quads: int, vectors: int) -> float:
    return _LANES * quads * vectors + (quads + vectors) / 2


def bands(height: int, width: int, depth: int, channels: int, hw: Hardware) -> list[int]:
    """Return how many quads of pixels to transpose at once, best first by the cycles per quad, estimated.

    They are those of whole rows. What outgrows half of L1 comes from L2, and what outgrows most of L2 from memory: the
    copy once per block of channels, the weights once per band. Of bands that cost about the same the smallest is best:
    kernels that are fused with this one keep fewer rows then.
    """
    quads = height * width // _PIXELS
    rows = [n for n in divisors(quads, quads) if n * _PIXELS % width == 0]
    weights = depth * channels * 4

    def cost(band: int) -> float:
        tile = tiles(band, channels)[0]
        copy = band * _PIXELS * depth * 4
        blocks = channels // (_LANES * tile.vectors)
        fetched = weights * _byte_cycles(
            weights + (copy if weights > hw.l1_bytes // 2 else 0), hw
        ) + blocks * copy * _byte_cycles(copy, hw)
        return (blocks * depth * _step(band, tile) / 2 + fetched) / band

    costs = {n: cost(n) for n in rows if tiles(n, channels)}
    least = min(costs.values(), default=0.0)
    return sorted(costs, key=lambda n: (0, n) if costs[n] <= _ALIKE * least else (1, costs[n]))[:4]


def _byte_cycles(size: int, hw: Hardware) -> float:
    """Return the cycles in which a byte comes from where so many stay, where the core waits for half of them."""
    if size <= hw.l1_bytes // 2:
        return 0.0
    return _L2_CYCLES if size <= hw.l2_bytes * 4 // 5 else hw.far_macs / _MACS


def _place(quad: tirx.PrimExpr, band: int, size: int, depth_block: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
    """Return where a quad's square of four channels is: band, tile of ``size`` quads, channels, quad."""
    return (quad // band, quad % band // size, depth_block, quad % band % size)


def schedule(sch: s_tir.Schedule, anchor: SBlockRV, hw: Hardware, tunable: bool) -> bool:
    """Schedule a convolution (n, y, x, f, ky, kx, c), or return False, and nothing changed, if it doesn't fit."""
    if not _fits(sch, anchor, hw):
        return False
    _, height, width, channels, *_, depth = extents(sch, anchor)
    pixels = height * width
    quads = -(-pixels // _PIXELS)
    whole = pixels % _PIXELS == 0
    band = choose(sch, bands(height, width, depth, channels, hw) if whole else [quads], tunable, "band")
    tile = choose(sch, tiles(band, channels)[:4], tunable)
    unroll = choose(sch, [n for n in (16, 8, 4) if depth % n == 0 and depth > n], tunable, "unroll")

    out = inline_around(sch, anchor)
    copy = sch.reindex(anchor, ("read", 0))
    sch.transform_layout(copy, ("write", 0), lambda n, y, x, c: (n, y * width + x, c))
    sch.transform_block_layout(copy, lambda n, y, x, c: (n, y * width + x, c))
    flatten_pixels(sch, anchor, out, width)
    packed = pack_weights(sch, anchor, tile.vectors * _LANES, None)

    image, pixel, channel, _, _, reduction = sch.get_loops(anchor)
    # Without conditions on the pixels of the last quad: those beyond the image are not stored.
    quad, row = sch.split(pixel, [None, _PIXELS], disable_predication=True)
    band_loop, quad = sch.split(quad, [None, band])
    vector, lane = sch.split(channel, [None, _LANES])
    sch.reorder(image, band_loop, vector, quad, row, lane)
    if whole:
        sch.compute_at(copy, band_loop, preserve_unit_loops=True)
    _transpose(sch, copy, band, tile.quads)
    # Nor on the quads of the last tile: it will be cut.
    tiled, quad = sch.split(quad, [None, tile.quads], disable_predication=True)
    block, vector = sch.split(vector, [None, tile.vectors])
    # The data of two steps stand side by side: one instruction loads them, if they are used one after the other.
    steps, pair, step = sch.split(reduction, [None, unroll // 2, 2])
    sch.reorder(block, tiled, steps, pair, quad, step, vector, row, lane)
    for loop in (pair, quad, step, vector):
        sch.unroll(loop)
    weight_bytes = channels * depth * 4
    if band > tile.quads and weight_bytes > hw.l2_bytes // 2:
        prefetch.mark(sch, tiled, [steps], packed, weight_bytes // (channels // (tile.vectors * _LANES)))

    sch.reverse_compute_at(out, tiled, preserve_unit_loops=True)
    out_pixel, out_channel = sch.get_loops(out)[-2:]
    out_quad, out_row = sch.split(out_pixel, [None, _PIXELS])
    unroll_tile(sch, [out_quad, out_row, *sch.split(out_channel, [None, _LANES])])
    if hw.cores > 1 and pixels * channels * depth >= PARALLEL_MIN_OPS:
        sch.parallel(band_loop if quads // band >= 4 * hw.cores else block)
    init = sch.decompose_reduction(anchor, sch.get_loops(anchor)[4])
    bias.mark(sch, init)
    init_quad, *init_loops = sch.get_loops(init)[-4:]
    unroll_tile(sch, [init_quad, *init_loops])
    squares.mark(sch, row)
    if band % tile.quads or not whole:
        peel.mark(sch, tiled, "quads", [quad, init_quad, out_quad], band % tile.quads)
    return True


def _fits(sch: s_tir.Schedule, anchor: SBlockRV, hw: Hardware) -> bool:
    """Tell whether a convolution is pointwise, of float32, for AArch64, and large enough."""
    node = sch.get(anchor)
    _, height, width, channels, *window, depth = extents(sch, anchor)
    pixels = height * width
    dtypes = {str(region.source.dtype) for region in (*node.reads, *node.writes)}
    constants = {param.name for param in layout_free(sch)}
    return (
        hw.isa == "arm"
        and "neon" in hw.features
        and hw.registers >= _REGISTERS
        and dtypes == {"float32"}
        and window == [1, 1]
        and int(node.reads[0].source.ty.shape[-1]) == depth
        and not any(is_padding(sch, block) for block in sch.get_producers(anchor))
        and extents(sch, blocks(sch)[-1])[-1] == channels
        and (pixels % _PIXELS == 0 or pixels >= _MIN_PIXELS)
        and channels % _LANES == 0
        and channels >= _MIN_CHANNELS
        and depth % _LANES == 0
        and depth > _LANES
        and node.reads[1].source.name in constants
    )


def _transpose(sch: s_tir.Schedule, copy: SBlockRV, band: int, size: int) -> None:
    """Place and schedule the transposed copy: what one step of a tile of ``size`` quads needs stands close together."""
    sch.transform_layout(
        copy,
        ("write", 0),
        lambda n, p, c: (n, *_place(p // _PIXELS, band, size, c // _LANES), c % _LANES, p % _PIXELS),
        assume_injective_transform=True,
    )
    copied_pixel, copied_channel = sch.get_loops(copy)[-2:]
    copied_row = sch.split(copied_pixel, [None, _PIXELS], disable_predication=True)[1]
    copied_vector, copied_lane = sch.split(copied_channel, [None, _LANES])
    sch.reorder(copied_vector, copied_row, copied_lane)
    squares.mark(sch, copied_row)
