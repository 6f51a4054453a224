"""Direct convolution, NHWC data and OHWI weights: dense and grouped, float32 and int8."""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.schedules.base import blocks, extents, iter_kinds
from nnfuze_tvm.schedules.contraction import schedule
from nnfuze_tvm.schedules.hardware import Hardware


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a convolution; see the package's docstring for the contract. Depthwise ones are left alone."""
    for block in blocks(sch):
        node = sch.get(block)
        if iter_kinds(sch, block) != "SSSSRRR" or len(node.reads) != 2:
            continue
        in_channels = int(node.reads[0].source.shape[-1])
        depth = extents(sch, block)[-1]
        if depth == 1 and in_channels > 1:
            return False
        return schedule(sch, block, hw, tunable, pixel_axes=2, groups=in_channels // depth)
    return False
