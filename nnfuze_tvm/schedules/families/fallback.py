"""The last rule: whatever no other rule takes is inlined, vectorized and run in parallel as far as is legal.

Each step is tried on its own. A kernel with scans, opaque blocks or loops without blocks keeps what cannot be
improved, so this rule never fails.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod

import tvm
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import blocks, inline_spatial, iter_kinds
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, vectorize_inner
from nnfuze_tvm.schedules.rule import Rule


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule any PrimFunc; see `Rule` for the contract."""
    everything = blocks(sch)
    if everything:
        # What several blocks read is not worth computing several times.
        shared = [block for block in everything[:-1] if len(sch.get_consumers(block)) > 1]
        attempt(lambda: inline_spatial(sch, keep=[*shared, everything[-1]]))
    for block in blocks(sch):
        _schedule(sch, block, hw)
    return True


def with_block(sch: s_tir.Schedule) -> tirx.PrimFunc:
    """Return ``main``, its body wrapped in a block if it has none: some operators are legalized to bare loops.

    ``SplitLayoutRewritePreproc`` fails on a whole module when one of its functions has no block below the root.
    """
    func = sch.mod["main"]
    if blocks(sch):
        return func
    body = func.body
    if not isinstance(body, s_tir.SBlockRealize):
        body = s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "opaque", body))
    return func.with_body(s_tir.SBlockRealize([], True, s_tir.SBlock([], [], [], "root", body)))


def attempt(step: Callable[[], object]) -> bool:
    """Run one step of a schedule; tell whether it was legal. A primitive that fails changes nothing."""
    try:
        step()
    except (tvm.s_tir.ScheduleError, RuntimeError, ValueError):
        return False
    return True


def _schedule(sch: s_tir.Schedule, block: SBlockRV, hw: Hardware) -> None:
    kinds = iter_kinds(sch, block)
    loops = sch.get_loops(block)
    body = sch.get(block)
    domains = [it.dom.extent for it in body.iter_vars]
    regular = len(loops) == len(kinds) and "O" not in kinds and "S" in kinds and len(body.writes) > 0
    if not regular or not all(isinstance(extent, tirx.IntImm) for extent in domains):
        return
    spatial = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "S"]
    reduction = [loop for loop, kind in zip(loops, kinds, strict=True) if kind == "R"]
    if reduction and not attempt(lambda: sch.reorder(*spatial[:-1], *reduction, spatial[-1])):
        return
    outer = spatial[:-1]
    if hw.cores > 1 and prod(int(extent) for extent in domains) >= PARALLEL_MIN_OPS:
        if outer:
            attempt(lambda: sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0]))
        elif not reduction:
            outer_loop, spatial[-1] = sch.split(spatial[-1], [hw.cores, None])
            attempt(lambda: sch.parallel(outer_loop))
    attempt(lambda: vectorize_inner(sch, spatial[-1], str(body.writes[0].source.dtype), hw))


RULE = Rule("fallback", apply, order=100)
