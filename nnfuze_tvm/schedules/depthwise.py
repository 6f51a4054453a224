"""Depthwise NHWC convolution: a register tile of output columns × channels, padding without a copy.

The loop nest is ``n, oh, c_block, ow_outer, (kh, kw), ow_inner (unrolled), vector (unrolled), lane``, or with the
channel block outermost. The accumulators of a tile stay in registers; the weights, packed to ``[kh][kw][c]`` at
compile time, are loaded once per tile. Padding is a condition on the load, and partitioning the loops over rows and
columns leaves it only to the tiles on the border.
"""

from __future__ import annotations

from math import prod

from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.schedules.base import PARALLEL_MIN_OPS, blocks, choose, extents, iter_kinds
from nnfuze_tvm.schedules.hardware import Hardware
import os
PARTITION_HINT = "pragma_loop_partition_hint"

def _uses(expr, var):
    found=[]
    tirx.stmt_functor.post_order_visit(expr, lambda e: found.append(1) if isinstance(e, tirx.Var) and e.same_as(var) else None)
    return bool(found)

def _anchor(sch: s_tir.Schedule) -> SBlockRV | None:
    for block in blocks(sch):
        body = sch.get(block)
        if iter_kinds(sch, block) != "SSSSRRR" or len(body.reads) != 2 or extents(sch, block)[6] != 1:
            continue
        return block
    return None

def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    conv = _anchor(sch)
    if conv is None:
        return False
    n, oh, ow, oc, kh, kw, _ = extents(sch, conv)
    dtype = str(sch.get(conv).writes[0].source.dtype)
    lanes = hw.lanes(dtype)
    vectors = int(os.environ.get("V", 2)); cols = int(os.environ.get("T", 4))
    order = os.environ.get("ORD", "c_in")
    name = sch.get(conv).name_hint
    names = [sch.get(b).name_hint for b in blocks(sch)]
    position = names.index(name)
    for before in names[:position]:
        if os.environ.get("PAD")!="copy":
            sch.compute_inline(sch.get_sblock(before))
    out = sch.get_sblock(names[-1]) if position + 1 < len(names) else sch.cache_write(conv, 0, "global")
    for after in names[position + 1 : -1]:
        sch.compute_inline(sch.get_sblock(after))
    packed = sch.cache_read(conv, 1, "global")
    sch.transform_layout(conv, ("read", 1), lambda f, y, x, c: (y, x, c, f))
    sch.annotate(packed, "meta_schedule.layout_rewrite_preproc", True)
    ln, ly, lx, lc = sch.get_loops(out)
    co, cv, lane = sch.split(lc, [None, vectors, lanes])
    xo, xi = sch.split(lx, [None, cols])
    if order == "c_in":
        sch.reorder(ln, ly, co, xo, xi, cv, lane)
        sch.annotate(co, PARTITION_HINT, 1) if oc % (lanes*vectors) else None
    elif order == "c_mid":
        sch.reorder(ln, ly, xo, co, xi, cv, lane)
    else:
        sch.reorder(co, ln, ly, xo, xi, cv, lane)
    sch.unroll(xi); sch.unroll(cv); sch.vectorize(lane)
    at = {"c_in": xo, "c_mid": co, "c_out": xo}[order]
    sch.compute_at(conv, at, preserve_unit_loops=True)
    sch.set_scope(conv, 0, "local")
    *_, wy, wx, wc, ky, kx, kc = sch.get_loops(conv)
    wcv, wl = sch.split(wc, [None, lanes])
    sch.reorder(ky, kx, kc, wy, wx, wcv, wl)
    for l in (wx, wcv): sch.unroll(l)
    sch.vectorize(wl)
    if os.environ.get("UK","1")=="1":
        sch.unroll(kx)
    if os.environ.get("UKY","1")=="1":
        sch.unroll(ky)
    init = sch.decompose_reduction(conv, ky)
    *_, a,b,c,d = sch.get_loops(init)
    sch.unroll(b); sch.unroll(c); sch.vectorize(d)
    if int(sch.get(xo).extent) <= int(os.environ.get("UX","1")):
        sch.unroll(xo)
    return True
