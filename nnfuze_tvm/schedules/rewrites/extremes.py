"""Reductions to the largest or smallest float that are NaN where one of the numbers is.

Schedules know TVM's own form, ``max(so_far, x)`` from the least finite number on, and give every lane a result of its
own. A block of the graph that is marked keeps the mark however it is scheduled, and then gets what is right: it starts
from infinity, and combines as the mark says, by an operation of LLVM or by `bounds.either`.
"""

from __future__ import annotations

import tvm_ffi
from tvm import s_tir, tirx

from nnfuze_tvm.schedules.intrinsics.bounds import either

_KEY = "nnfuze.extreme"


def keep_nan(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked reductions keep NaN and infinities."""
    found: list[s_tir.SBlock] = []

    def collect(block: s_tir.SBlock) -> None:
        if _KEY in block.annotations:
            found.append(block)

    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, collect))
    return func.with_body(tvm_ffi.structural_map(func.body, (s_tir.SBlock, _corrected))) if found else func


def _corrected(block: s_tir.SBlock) -> s_tir.SBlock:
    annotations = dict(block.annotations.items())
    name = annotations.pop(_KEY, None)
    if name is None:
        return block

    def combined(store: tirx.BufferStore) -> tirx.BufferStore:
        return tirx.BufferStore(store.buffer, _combined(store.value, str(name)), store.indices)

    body = tvm_ffi.structural_map(block.body, (tirx.BufferStore, combined))
    init = block.init if block.init is None else tvm_ffi.structural_map(block.init, (tirx.BufferStore, combined))
    parts = (block.iter_vars, block.reads, block.writes, block.name_hint, body, init)
    return s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, annotations)


def _combined(value: tirx.Expr, name: str) -> tirx.Expr:
    """Return what is stored: infinity for the least finite number, and the combination for TVM's."""
    if isinstance(value, tirx.FloatImm):
        return tirx.const(float("inf") if value.value > 0 else -float("inf"), str(value.ty.dtype))
    if not isinstance(value, tirx.Max | tirx.Min):
        return value
    if name:
        return tirx.call_llvm_pure_intrin(str(value.ty.dtype), name, value.a, value.b)
    return either(tirx.max if isinstance(value, tirx.Max) else tirx.min, value.a, value.b)
