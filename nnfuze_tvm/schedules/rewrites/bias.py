"""Sums that start from the bias instead of zero: one addition less per result.

A rule marks the block that clears its sums. Where the block that finishes them first adds what depends on the channel
alone, ``start_from_bias`` lets the sums start there. Sums of floats then are rounded in another order.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.schedule import SBlockRV

_KEY = "nnfuze.bias"


def mark(sch: s_tir.Schedule, init: SBlockRV) -> None:
    """Mark the block that clears the sums."""
    sch.annotate(init, _KEY, 1)


def start_from_bias(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel whose marked blocks store the bias, if there is one."""
    cleared: set[tirx.Var] = set()
    finishing: list[tirx.BufferStore] = []

    def collect(block: s_tir.SBlock) -> None:
        if _KEY in block.annotations:
            cleared.add(block.body.buffer)
        elif isinstance(block.body, tirx.BufferStore):
            finishing.append(block.body)

    tvm_ffi.structural_walk(func.body, (s_tir.SBlock, collect))
    biases: dict[tirx.Var, tuple[TensorLoad, TensorLoad]] = {}
    for store in finishing:
        biases |= _biases(store, cleared)

    def sums_alone(add: tirx.Add) -> tirx.Expr:
        pair = _sums_and_bias(add, cleared)
        # Without its bias, a sum may be found to be added to something else.
        known = pair and biases.get(pair[0].source)
        return pair[0] if pair and known and known[1].source.same_as(pair[1].source) else add

    def visit(block: s_tir.SBlock) -> s_tir.SBlock:
        body, reads, annotations = block.body, list(block.reads), dict(block.annotations.items())
        if annotations.pop(_KEY, None) is not None:
            if body.buffer in biases:
                sums, bias = biases[body.buffer]
                pairs = zip(sums.indices, body.indices, strict=True)
                places = {own: place for own, place in pairs if isinstance(own, tirx.Var)}
                start = tvm_ffi.structural_map(bias, (tirx.Var, lambda var: places.get(var, var)))
                body = tirx.BufferStore(body.buffer, start, body.indices)
                ranges = [tvm.ir.Range.from_min_extent(index, 1) for index in start.indices]
                reads.append(tirx.BufferRegion(start.source, ranges))
        elif isinstance(body, tirx.BufferStore) and _biases(body, cleared):
            body = tvm_ffi.structural_map(body, (tirx.Add, sums_alone))
        else:
            return block
        parts = (block.iter_vars, reads, block.writes, block.name_hint, body, block.init)
        return s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, annotations)

    return func.with_body(tvm_ffi.structural_map(func.body, (s_tir.SBlock, visit)))


def _biases(store: tirx.BufferStore, cleared: set[tirx.Var]) -> dict[tirx.Var, tuple[TensorLoad, TensorLoad]]:
    """Return, by the buffer of sums, the sums and the bias that a block adds to them; it must read them only there."""
    found: dict[tirx.Var, tuple[TensorLoad, TensorLoad]] = {}
    loaded: list[tirx.Var] = []

    def add(expr: tirx.Add) -> None:
        pair = _sums_and_bias(expr, cleared)
        if pair is not None:
            found[pair[0].source] = pair

    tvm_ffi.structural_walk(store, [(tirx.Add, add), (TensorLoad, lambda load: loaded.append(load.source))])
    return {buffer: pair for buffer, pair in found.items() if loaded.count(buffer) == 1}


def _sums_and_bias(add: tirx.Add, cleared: set[tirx.Var]) -> tuple[TensorLoad, TensorLoad] | None:
    """Return both operands of the addition of a bias, which only the sums' last index selects."""
    for sums, bias in ((add.a, add.b), (add.b, add.a)):
        if not (isinstance(sums, TensorLoad) and isinstance(bias, TensorLoad)):
            continue
        if sums.source in cleared and all(isinstance(index, (tirx.Var, tirx.IntImm)) for index in sums.indices):
            used: list[tirx.Var] = []
            for index in bias.indices:
                tvm_ffi.structural_walk(index, (tirx.Var, used.append))
            known = {index for index in sums.indices if isinstance(index, tirx.Var)}
            if bias.source not in cleared and set(used) <= known:
                return sums, bias
    return None
