"""Few-bit layers whose sums are counted bits (see the pass `BitSerial`).

The loop nest is ``channel_block, outer, tile of pixels, part of the reduction, (byte, pixel (unrolled), pair of planes
(unrolled), vector of channels (unrolled), lane)``: counts of a part stay in registers as bytes, one lane per output
channel, and are then added to wider sums. Weights are packed ``[channel_block][tap][byte][plane][channels]``.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product
from math import prod

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.contraction import Contraction
from nnfuze_tvm.schedules.blocks import blocks, extents, has_one_output, iter_kinds
from nnfuze_tvm.schedules.contraction import cycles, to_compute
from nnfuze_tvm.schedules.intrinsics import bytes_are_fast, wants_unsigned
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, STACK_BYTES, divisors, unroll_tile
from nnfuze_tvm.schedules.rewrites import overlap
from nnfuze_tvm.schedules.rule import Rule

# Instructions that count the bits of the bytes of a vector: one, or two look-ups of four bits and what is around them.
_COUNT, _LOOK_UP = 1, 6
# Of a part's counts, per vector of them: what widens and adds them.
_WIDEN = 4
# A vector of fewer channels is not worth its instructions.
_LEAST_LANES = 8
# How many times as fast as direct convolution Winograd's is, with its transforms and products of int16.
_WINOGRAD = 1.6


@dataclass(frozen=True)
class Tile:
    """``pixels`` × ``channels``, in vectors of ``lanes``."""

    pixels: int
    channels: int
    lanes: int


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule such a layer; see `Rule` for the contract."""
    names = [sch.get(block).name_hint for block in blocks(sch)]
    if "bit_sums" not in names or not has_one_output(sch):
        return False
    counts, sums = sch.get_sblock("bit_counts"), sch.get_sblock("bit_sums")
    shape = extents(sch, sums)[: iter_kinds(sch, sums).count("S")]
    if extents(sch, blocks(sch)[-1]) != shape:
        return False
    planes = extents(sch, counts)[len(shape) + 2 : len(shape) + 4]
    dtype = str(sch.get(sums).writes[0].source.dtype)
    tile = choose(sch, tiles(shape[-2], shape[-1], planes[0], planes[1], dtype, hw)[:8], tunable)

    for name in names[names.index("bit_sums") + 1 : -1]:
        sch.compute_inline(sch.get_sblock(name))
    _pack_weights(sch, counts, tile)
    nest, pixels = _tile_loops(sch, blocks(sch)[-1], tile)
    steps = _sum_loops(sch, sums, pixels, tile)
    byte = _count_loops(sch, counts, steps[-1], tile)
    if hw.cores > 1 and prod(extents(sch, sums)) * prod(extents(sch, counts)[len(shape) :]) >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(*nest))
    unroll_tile(sch, sch.get_loops(sch.decompose_reduction(counts, byte))[-5:])
    unroll_tile(sch, sch.get_loops(sch.decompose_reduction(sums, steps[0]))[-3:])
    return True


def tiles(cols: int, channels: int, data_planes: int, weight_planes: int, dtype: str, hw: Hardware) -> list[Tile]:
    """Return register tiles, best first: those whose counts fit the registers with the fewest loads per count."""
    return [tile for _, tile in _ranked(cols, channels, (data_planes, weight_planes), dtype, hw)]


def pays(layer: Contraction, data_planes: int, weight_planes: int, hw: Hardware) -> bool:
    """Tell whether a layer is faster by counting bits than by products of bytes, by the models of both."""
    if divisors(layer.channels, hw.vector_bytes)[0] < _LEAST_LANES or not _counts_bits(hw):
        return False
    planes = (data_planes, weight_planes)
    (per_count, tile), *_ = _ranked(layer.cols, layer.channels, planes, "int32", hw)
    taps, count = layer.products // layer.depth, -(-layer.depth // 8)
    vectors = layer.rows * layer.cols * (layer.channels // tile.lanes) * data_planes * weight_planes
    counted = vectors * taps * (count * per_count + _WIDEN / 2)
    packed = layer.rows * layer.cols * layer.depth * data_planes * 4 / hw.vector_bytes
    data = "uint8" if wants_unsigned(hw.features) else layer.data
    bytewise = replace(layer, data=data)
    multiplied = cycles(replace(bytewise, channels=to_compute(bytewise, hw)), hw)
    if taps == 9 and not bytes_are_fast(hw.features):
        multiplied /= _WINOGRAD
    return (counted + packed) / 2 < multiplied


def _counts_bits(hw: Hardware) -> int:
    """Return the instructions that count the bits of each byte of a vector; zero where they are too many."""
    if hw.isa == "arm" or "avx512bitalg" in hw.features:
        return _COUNT
    return _LOOK_UP if "avx2" in hw.features else 0


def _ranked(cols: int, channels: int, planes: tuple[int, int], dtype: str, hw: Hardware) -> list[tuple[float, Tile]]:
    """Return the instructions per vector of counts, and the register tile, best first."""
    lanes = divisors(channels, hw.vector_bytes)[0]
    per_count = 2 + (_counts_bits(hw) or 2 * _LOOK_UP)
    found = []
    for pixels, vectors in product(range(1, min(cols, 8) + 1), (1, 2, 4)):
        counted = pixels * vectors * prod(planes)
        loads = pixels * planes[0] + vectors * planes[1]
        size = pixels * vectors * lanes * (2 if dtype == "int16" else 4)
        if channels % (vectors * lanes) or counted + loads > hw.registers or size > STACK_BYTES:
            continue
        waste = -(-cols // pixels) * pixels / cols
        found.append(((per_count + loads / counted) * waste, -pixels, Tile(pixels, vectors * lanes, lanes)))
    found.sort(key=lambda each: each[:2])
    return [(cost, tile) for cost, _, tile in found] or [(2.0 * per_count, Tile(1, lanes, lanes))]


def _pack_weights(sch: s_tir.Schedule, counts: SBlockRV, tile: Tile) -> None:
    packed = sch.cache_read(counts, 1, "global")
    sch.transform_layout(
        counts,
        ("read", 1),
        lambda plane, y, x, byte, o: (o // tile.channels, y, x, byte, plane, o % tile.channels),
    )
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)


def _tile_loops(sch: s_tir.Schedule, out: SBlockRV, tile: Tile) -> tuple[list[LoopRV], LoopRV]:
    """Tile the result; return the loops around the tiles of a row, and the one over them."""
    *outer, pixel, channel = sch.get_loops(out)
    extent = int(sch.get(pixel).extent)
    block, vector, lane = sch.split(channel, [None, tile.channels // tile.lanes, tile.lanes])
    # Without conditions: the last tile will overlap the one before.
    pixels, inside = sch.split(pixel, [None, tile.pixels], disable_predication=True)
    sch.reorder(block, *outer, pixels, inside, vector, lane)
    unroll_tile(sch, [inside, vector, lane])
    if extent % tile.pixels:
        overlap.mark(sch, pixels, extent)
    return [block, *outer], pixels


def _sum_loops(sch: s_tir.Schedule, sums: SBlockRV, pixels: LoopRV, tile: Tile) -> list[LoopRV]:
    """Schedule what adds counts up; return the loops of its reduction."""
    sch.compute_at(sums, pixels, preserve_unit_loops=True)
    *_, pixel, channel, row, col, block = sch.get_loops(sums)
    vector, lane = sch.split(channel, [None, tile.lanes])
    sch.reorder(row, col, block, pixel, vector, lane)
    unroll_tile(sch, [pixel, vector, lane])
    return [row, col, block]


def _count_loops(sch: s_tir.Schedule, counts: SBlockRV, part: LoopRV, tile: Tile) -> LoopRV:
    """Schedule what counts the bits of one part; return the outermost loop of its reduction."""
    sch.compute_at(counts, part, preserve_unit_loops=True)
    *_, pixel, _row, _col, _block, left, right, channel, row, col, byte = sch.get_loops(counts)
    vector, lane = sch.split(channel, [None, tile.lanes])
    sch.reorder(row, col, byte, pixel, left, right, vector, lane)
    unroll_tile(sch, [pixel, left, right, vector, lane])
    return row


RULE = Rule("bit_serial", apply, order=12)
