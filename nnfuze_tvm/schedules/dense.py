"""Dense layers and (batched) matrix products with a row-major right-hand side, float32 and int8."""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.schedules.base import blocks, iter_kinds
from nnfuze_tvm.schedules.contraction import schedule
from nnfuze_tvm.schedules.hardware import Hardware


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a matrix product; see the package's docstring for the contract."""
    for block in blocks(sch):
        node = sch.get(block)
        if iter_kinds(sch, block) not in ("SSR", "SSSR") or len(node.reads) != 2:
            continue
        if len(node.reads[1].region) != len(iter_kinds(sch, block)) - 1:
            return False
        return schedule(sch, block, hw, tunable, pixel_axes=1, groups=1)
    return False
