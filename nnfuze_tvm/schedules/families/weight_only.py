"""Dense layers of floats whose weights are packed codes (see the pass `WeightOnly`).

The loop nest is ``channel_block, outer, tile of rows, block of inputs, (word of codes, code in it (unrolled), row
(unrolled), vector of channels (unrolled), lane)``: codes become floats in registers, sums of a block of inputs stay
there, and are scaled once. Weights are packed ``[channel_block][word][channels]``.
"""

from __future__ import annotations

from itertools import product
from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import blocks, extents, has_one_output, iter_kinds
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, STACK_BYTES, divisors, unroll_tile
from nnfuze_tvm.schedules.register_tile import RegisterTile
from nnfuze_tvm.schedules.rewrites import overlap, tails
from nnfuze_tvm.schedules.rule import Rule

# As the pass names its blocks.
_PRODUCTS, _SUMS = "block_products", "scaled_sums"
# Instructions that make floats of a vector of codes; what a broadcast of data costs, which is a load; what scales sums.
_UNPACK, _BROADCAST, _SCALE = 4, 0.5, 3


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule such a layer; see `Rule` for the contract."""
    names = [sch.get(block).name_hint for block in blocks(sch)]
    if _SUMS not in names or not has_one_output(sch):
        return False
    products, sums = sch.get_sblock(_PRODUCTS), sch.get_sblock(_SUMS)
    shape = extents(sch, sums)[: iter_kinds(sch, sums).count("S")]
    result = extents(sch, blocks(sch)[-1])
    if result[:-1] != shape[:-1] and names[-1] != _SUMS:
        return False
    *_, words, beside = extents(sch, products)
    tile = choose(sch, tiles(shape[-2], shape[-1], words * beside, hw)[:8], tunable)

    first, at = names.index(_PRODUCTS), names.index(_SUMS)
    for name in (*names[:first], *names[at + 1 : -1]):
        sch.compute_inline(sch.get_sblock(name))
    out = sch.cache_write(sums, 0, "global") if names[-1] == _SUMS else sch.get_sblock(names[-1])
    _pack_weights(sch, products, sums, tile)
    nest, pixels = _tile_loops(sch, out, tile, shape[-1])
    block = _sum_loops(sch, sums, pixels, tile)
    words_loop = _product_loops(sch, products, block, tile)
    if hw.cores > 1 and prod(shape) * prod(extents(sch, products)[len(shape) :]) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(*nest) if result[-1] == shape[-1] else nest[0])
    unroll_tile(sch, sch.get_loops(sch.decompose_reduction(products, words_loop))[-3:])
    unroll_tile(sch, sch.get_loops(sch.decompose_reduction(sums, block))[-3:])
    return True


def tiles(cols: int, channels: int, inputs: int, hw: Hardware) -> list[RegisterTile]:
    """Return register tiles, best first: those with the fewest instructions per multiply-add.

    Parameters
    ----------
    cols, channels : int
        Of the result.
    inputs : int
        Inputs that share a scale.
    hw : Hardware
        The machine.
    """
    lanes = divisors(channels, hw.lanes("float32"))[0]
    found = []
    # x86 unpacks the codes of a vector out of one that is in memory; ARM needs registers for both.
    several = (1, 2, 4) if hw.isa == "arm" else (1, 2, 4, 8)
    for pixels, vectors in product(range(1, min(cols, 16) + 1), several):
        sums = pixels * vectors
        if channels % (vectors * lanes) or sums + vectors + 3 > hw.registers or sums * lanes * 4 > STACK_BYTES:
            continue
        waste = -(-cols // pixels) * pixels / cols
        cost = 1 + _UNPACK / pixels + _BROADCAST / vectors + _SCALE / inputs
        # An addition waits for the one before it.
        cost = max(cost, 8 / sums)
        found.append((cost * waste, sums, RegisterTile(pixels, vectors * lanes, lanes, False)))
    found.sort(key=lambda each: each[:2])
    return [tile for *_, tile in found] or [RegisterTile(1, lanes, lanes, False)]


def _pack_weights(sch: s_tir.Schedule, products: SBlockRV, sums: SBlockRV, tile: RegisterTile) -> None:
    for block in (products, sums):
        for number in range(1, len(sch.get(block).reads)):
            packed = sch.cache_read(block, number, "global")
            sch.transform_layout(
                block, ("read", number), lambda row, channel: (channel // tile.channels, row, channel % tile.channels)
            )
            sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)


def _tile_loops(sch: s_tir.Schedule, out: SBlockRV, tile: RegisterTile, channels: int) -> tuple[list[LoopRV], LoopRV]:
    """Tile the result; return the loops around the tiles of rows, and the one over them."""
    *outer, pixel, channel = sch.get_loops(out)
    extent, own = int(sch.get(pixel).extent), int(sch.get(channel).extent)
    block, vector, lane = sch.split(channel, [None, tile.channels // tile.lanes, tile.lanes])
    # Without conditions: the last tile will overlap the one before.
    pixels, inside = sch.split(pixel, [None, tile.pixels], disable_predication=True)
    sch.reorder(block, *outer, pixels, inside, vector, lane)
    unroll_tile(sch, [inside, vector, lane])
    if own < channels:
        tails.mark(sch, block, vector, tile.lanes, own)
    if extent % tile.pixels:
        overlap.mark(sch, pixels, extent)
    return [block, *outer], pixels


def _sum_loops(sch: s_tir.Schedule, sums: SBlockRV, pixels: LoopRV, tile: RegisterTile) -> LoopRV:
    """Schedule what scales and adds; return the loop of its reduction."""
    sch.compute_at(sums, pixels, preserve_unit_loops=True)
    *_, pixel, channel, block = sch.get_loops(sums)
    vector, lane = sch.split(channel, [None, tile.lanes])
    sch.reorder(block, pixel, vector, lane)
    unroll_tile(sch, [pixel, vector, lane])
    return block


def _product_loops(sch: s_tir.Schedule, products: SBlockRV, block: LoopRV, tile: RegisterTile) -> LoopRV:
    """Schedule the products of one block of inputs; return the outermost loop of their reduction."""
    sch.compute_at(products, block, preserve_unit_loops=True)
    *_, pixel, _block, channel, word, code = sch.get_loops(products)
    vector, lane = sch.split(channel, [None, tile.lanes])
    sch.reorder(word, code, pixel, vector, lane)
    unroll_tile(sch, [code, pixel, vector, lane])
    return word


RULE = Rule("weight_only", apply, order=12)
