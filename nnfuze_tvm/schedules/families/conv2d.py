"""Direct convolution, NHWC data and OHWI weights of one to three spatial axes: dense and grouped, floats and int8."""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import extents, iter_kinds, single_anchor, weights_follow
from nnfuze_tvm.schedules.contraction import schedule
from nnfuze_tvm.schedules.families import pixel_lanes
from nnfuze_tvm.schedules.rule import Rule

# The kinds of the iterators with one, two and three spatial axes.
_KINDS = ("SSSRR", "SSSSRRR", "SSSSSRRRR")


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a convolution; see `Rule` for the contract. Depthwise ones are left alone."""
    block = single_anchor(sch, cropped=True)
    # Iterators n, y, x, f, ky, k; weights [f, ky, k]: one reduction axis along each kernel row.
    if block is not None and iter_kinds(sch, block) == "SSSSRR" and weights_follow(sch, block, (3, 4, 5)):
        return schedule(sch, block, hw, tunable, pixel_axes=2, groups=1)
    # Iterators n, y, x, f, ky, kx, c; weights [f, ky, kx, c]. With one or three spatial axes there are as many y, x.
    kinds = iter_kinds(sch, block) if block is not None else ""
    spatial = kinds.count("S")
    if block is None or kinds not in _KINDS or not weights_follow(sch, block, tuple(range(spatial - 1, len(kinds)))):
        return False
    in_channels = int(sch.get(block).reads[0].source.shape[-1])
    depth = extents(sch, block)[-1]
    if depth == 1 and in_channels > 1:
        return False
    if kinds == _KINDS[1] and pixel_lanes.schedule(sch, block, hw, tunable):
        return True
    return schedule(sch, block, hw, tunable, pixel_axes=min(2, spatial - 2), groups=in_channels // depth)


RULE = Rule("conv2d", apply, order=20)
