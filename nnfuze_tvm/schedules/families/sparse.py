"""Layers that skip blocks of their weights (see the pass `SkipBlocks`): the register tile over what is kept.

The loops are those of any contraction whose reduction runs over the inputs that are kept; which these are, an index per
block says.
"""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.block_sparsity import INPUTS, OUTPUTS
from nnfuze_tvm.schedules.blocks import iter_kinds, single_anchor
from nnfuze_tvm.schedules.contraction import schedule
from nnfuze_tvm.schedules.rule import Rule

# As the pass names the block of its sums.
_SUMS = "sparse_sums"


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule such a layer; see `Rule` for the contract."""
    block = single_anchor(sch, cropped=True)
    if block is None or sch.get(block).name_hint != _SUMS:
        return False
    kinds = iter_kinds(sch, block)
    axes = 1 if kinds.count("R") == 1 else min(2, kinds.count("S") - 2)
    return schedule(sch, block, hw, tunable, pixel_axes=axes, groups=1, block=(OUTPUTS, INPUTS))


RULE = Rule("sparse", apply, order=12)
