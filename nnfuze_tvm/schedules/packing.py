"""The right-hand side of a contraction as its tiles want it."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.schedules.blocks import iter_kinds
from nnfuze_tvm.schedules.intrinsics import Dot
from nnfuze_tvm.schedules.intrinsics.interleave import interleaving

# For fewer rows of data, to bring the right-hand side into order costs more than it saves.
_MIN_ROWS = 8


def pack_weights(sch: s_tir.Schedule, anchor: SBlockRV, block: int, dot: Dot | None) -> str:
    """Rewrite the weights for the tile, in a block that is evaluated at compile time; return its buffer's name."""
    packed = arrange(sch, anchor, block, dot)
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)
    return str(sch.get(packed).writes[0].source.name)


def can_pack_rows(sch: s_tir.Schedule, anchor: SBlockRV, dot: Dot, pixels: int) -> bool:
    """Tell whether a right-hand side that is computed, ``[..., K, N]``, can be packed for ``dot``, and should be."""
    node = sch.get(anchor)
    channel = node.iter_vars[iter_kinds(sch, anchor).count("S") - 1].var
    rows_first = node.reads[1].region[-1].min.same_as(channel)
    return rows_first and dot.depth > 1 and not dot.paired and dot.rows == 1 and pixels >= _MIN_ROWS


def pack_rows(sch: s_tir.Schedule, packed: SBlockRV, around: LoopRV, dot: Dot) -> None:
    """Schedule the block that packs a right-hand side: for each channel block, in whole vectors.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        The schedule.
    packed : SBlockRV
        What :func:`arrange` returned.
    around : LoopRV
        The loop over the channel blocks.
    dot : Dot
        The tensor intrinsic.
    """
    dtype = str(sch.get(packed).writes[0].source.dtype)
    sch.compute_at(packed, around, preserve_unit_loops=True)
    *_, row, channel = sch.get_loops(packed)
    steps, inside = sch.split(row, [None, dot.depth])
    vectors, lane = sch.split(channel, [None, dot.lanes])
    sch.reorder(steps, vectors, lane, inside)
    sch.tensorize(lane, interleaving(dtype, dot.depth, dot.lanes))


def arrange(sch: s_tir.Schedule, anchor: SBlockRV, block: int, dot: Dot | None) -> SBlockRV:
    """Put a block in front of the anchor that rewrites its right-hand side for the tile, and return it."""
    node = sch.get(anchor)
    channel_iter = node.iter_vars[iter_kinds(sch, anchor).count("S") - 1]
    channels_last = node.reads[1].region[-1].min.same_as(channel_iter.var)
    packed = sch.cache_read(anchor, 1, "global")

    def place(*axes: tirx.PrimExpr) -> tuple[tirx.PrimExpr, ...]:
        if channels_last:  # a dense layer's, (batch,) K, N
            before, channel, kernel, depth = axes[:-2], axes[-1], (), axes[-2]
        else:  # a convolution's, OHWI of any rank, or O, row, place in the row
            before, channel, kernel, depth = (), axes[0], axes[1:-1], axes[-1]
        if dot is None or dot.depth == 1:
            return (*before, channel // block, *kernel, depth, channel % block)
        if dot.paired:
            # TVM does not see by itself that a block of one vector has one only.
            vector = channel % block // dot.lanes if block > dot.lanes else tirx.IntImm(channel.ty.dtype, 0)
            pair, lane = depth % dot.depth // 2, channel % dot.lanes
            return (*before, channel // block, *kernel, depth // dot.depth, vector, pair, lane, depth % 2)
        return (*before, channel // block, *kernel, depth // dot.depth, channel % block, depth % dot.depth)

    sch.transform_layout(anchor, ("read", 1), place)
    return packed
