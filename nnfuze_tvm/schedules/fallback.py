"""The last rule: inline what can be inlined, parallelize the outermost and vectorize the innermost loop."""

from __future__ import annotations

from math import prod

from tvm import s_tir

from nnfuze_tvm.schedules.base import (
    PARALLEL_MIN_OPS,
    blocks,
    extents,
    inline_spatial,
    iter_kinds,
    vectorize_inner,
)
from nnfuze_tvm.schedules.hardware import Hardware


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule any PrimFunc; see the package's docstring for the contract."""
    inline_spatial(sch, keep=blocks(sch)[-1:])
    for block in blocks(sch):
        loops = sch.get_loops(block)
        kinds = iter_kinds(sch, block)
        if not loops or len(loops) != len(kinds):
            continue
        spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
        reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind != "S"]
        if not spatial:
            continue
        work = prod(extents(sch, block))
        if reduction:
            sch.reorder(*spatial[:-1], *reduction, spatial[-1])
        dtype = str(sch.get(block).writes[0].source.dtype)
        last = vectorize_inner(sch, spatial[-1], dtype, hw)
        if len(spatial) > 1 and work >= PARALLEL_MIN_OPS and hw.cores > 1:
            sch.parallel(sch.fuse(*spatial[:-1]))
        elif not reduction and work >= PARALLEL_MIN_OPS and hw.cores > 1:
            sch.parallel(last)
    return True
