"""Direct NHWC convolution: a register tile of output pixels × output channels, weights packed at compile time.

The loop nest is ``oc_block, n, oh, ow_outer, (kh, kw, ic), oh_inner·ow_inner (unrolled), oc_vector (unrolled),
lane``. The accumulators of one tile stay in registers over the whole reduction; bias, activation, residual and
requantization run on the tile before it is stored.
"""

from __future__ import annotations

from dataclasses import dataclass

from tvm import s_tir
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.schedules.base import (
    PARALLEL_MIN_OPS,
    blocks,
    choose,
    divisors,
    extents,
    iter_kinds,
    vectorize_inner,
)
from nnfuze_tvm.schedules.hardware import Hardware


@dataclass(frozen=True)
class Tile:
    """Output pixels (``rows`` × ``cols``) × output channels (``channels``, in vectors of ``lanes``)."""

    rows: int
    cols: int
    channels: int
    lanes: int

    @property
    def vectors(self) -> int:
        return self.channels // self.lanes


def tiles(oh: int, ow: int, oc: int, steps: int, lanes: int, hw: Hardware) -> list[Tile]:
    """Return register tiles that divide the output, best first by a model of the inner loop.

    One step of the reduction loads ``vectors`` weight registers and broadcasts one input per pixel for
    ``pixels · vectors`` fused multiply-adds. Two loads and two multiply-adds start per cycle, and a
    multiply-add takes four cycles, so fewer than eight accumulators leave the units idle. Weights of a block
    of output channels that do not stay in L1 come from L2 or beyond, once per tile.

    Parameters
    ----------
    oh, ow, oc : int
        Output rows, columns and channels.
    steps : int
        Length of the reduction: kernel height × width × input channels.
    lanes : int
        Elements of one vector register.
    hw : Hardware
        The machine.
    """
    found: list[tuple[float, Tile]] = []
    lanes = lanes if oc % lanes == 0 else divisors(oc, lanes)[0]
    for vectors in range(1, 9):
        channels = vectors * lanes
        if oc % channels:
            continue
        block_bytes = steps * channels * 4
        bandwidth = 64 if block_bytes < hw.l1_bytes else 16 if block_bytes < hw.l2_bytes else 6
        for rows in divisors(oh, 4):
            for cols in divisors(ow, hw.registers):
                pixels = rows * cols
                if pixels * vectors + min(vectors, 2) >= hw.registers:
                    continue
                cycles = max(
                    pixels * vectors / 2, (pixels + vectors) / 2, 4.0, channels * 4 / bandwidth
                )
                found.append((cycles / (pixels * channels) * (1 + 0.02 * (rows - 1)), Tile(rows, cols, channels, lanes)))
    found.sort(key=lambda item: (item[0], item[1].rows, -item[1].cols))
    return [tile for _, tile in found]


def _anchor(sch: s_tir.Schedule) -> SBlockRV | None:
    for block in blocks(sch):
        if iter_kinds(sch, block) == "SSSSRRR" and len(sch.get(block).reads) == 2:
            return block
    return None


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a convolution with NHWC data and OHWI weights; see the package's docstring for the contract."""
    conv = _anchor(sch)
    if conv is None:
        return False
    name = sch.get(conv).name_hint
    dtype = str(sch.get(conv).writes[0].source.dtype)
    if dtype != "float32":
        return False
    n, oh, ow, oc, kh, kw, ic = extents(sch, conv)
    tile = choose(sch, tiles(oh, ow, oc, kh * kw * ic, hw.lanes(dtype), hw)[:12], tunable)
    chunk = choose(sch, divisors(ic, 4), tunable)

    out, pads = isolate(sch, conv)
    packed = sch.cache_read(conv, 1, "global")
    vo = tile.channels
    sch.transform_layout(conv, ("read", 1), lambda f, y, x, c: (f // vo, y, x, c, f % vo))
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)

    loop_n, loop_y, loop_x, loop_c = sch.get_loops(out)
    co, ci = sch.split(loop_c, [None, vo])
    yo, yi = sch.split(loop_y, [None, tile.rows])
    xo, xi = sch.split(loop_x, [None, tile.cols])
    cv, lane = sch.split(ci, [None, tile.lanes])
    sch.reorder(co, loop_n, yo, xo, yi, xi, cv, lane)
    _unroll_tile(sch, yi, xi, cv, lane)
    sch.compute_at(conv, xo, preserve_unit_loops=True)
    sch.set_scope(conv, 0, "local")

    _, ly, lx, lc, ky, kx, lic = sch.get_loops(conv)[-7:]
    lcv, llane = sch.split(lc, [None, tile.lanes])
    ico, ici = sch.split(lic, [None, chunk])
    sch.reorder(ky, kx, ico, ici, ly, lx, lcv, llane)
    sch.unroll(ici)
    _unroll_tile(sch, ly, lx, lcv, llane)
    if hw.cores > 1 and n * oh * ow * oc * kh * kw * ic >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(co, loop_n, yo))
    init = sch.decompose_reduction(conv, ky)
    _unroll_tile(sch, *sch.get_loops(init)[-4:])
    for pad in pads:
        vectorize_inner(sch, sch.get_loops(pad)[-1], dtype, hw)
    return True


def isolate(sch: s_tir.Schedule, anchor: SBlockRV) -> tuple[SBlockRV, list[SBlockRV]]:
    """Leave three kinds of blocks: padding before the anchor, the anchor, one output block after it.

    Returns the output block and the list of padding blocks that could not be inlined.
    """
    name = sch.get(anchor).name_hint
    names = [sch.get(block).name_hint for block in blocks(sch)]
    if names[-1] == name:
        out = sch.cache_write(anchor, 0, "global")
    else:
        out = sch.get_sblock(names[-1])
    out_name = sch.get(out).name_hint
    for after in names[names.index(name) + 1 :]:
        if after != out_name:
            sch.compute_inline(sch.get_sblock(after))
    reads = {region.source.name for region in sch.get(anchor).reads}
    pads = []
    for before in names[: names.index(name)]:
        block = sch.get_sblock(before)
        if sch.get(block).writes[0].source.name in reads and "pad" in before:
            pads.append(block)
        else:
            sch.compute_inline(block)
    return out, pads


def _unroll_tile(sch: s_tir.Schedule, rows: LoopRV, cols: LoopRV, vectors: LoopRV, lane: LoopRV) -> None:
    for loop in (rows, cols, vectors):
        sch.unroll(loop)
    sch.vectorize(lane)
