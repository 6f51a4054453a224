"""Transposes by squares that stay in registers: whole vectors are loaded, and whole vectors are stored.

A loop over the axis that stands side by side in the data, around one over the axis that stands side by side in the
result, loads numbers one by one. A rule marks the outer one; both must run over as many iterations, a power of two.
``transpose_squares`` loads the square by vectors, exchanges the bits of row and lane one after the other (Eklundh, "A
fast computer method for matrix transposing", 1972), and lets the inner loop read vectors of the result.
"""

from __future__ import annotations

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.schedule import LoopRV

from nnfuze_tvm.schedules.blocks import with_buffers

_KEY = "nnfuze.transpose"


def mark(sch: s_tir.Schedule, rows: LoopRV, source: str) -> None:
    """Mark the outer loop of a square of the buffer named ``source``."""
    sch.annotate(rows, _KEY, source)


def transpose_squares(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel that transposes each marked square in registers."""
    added: list[tirx.Var] = []

    def visit(loop: tirx.For) -> tirx.Stmt:
        return _transposed(loop, added) if _KEY in loop.annotations else loop

    body = tvm_ffi.structural_map(func.body, (tirx.For, visit))
    return with_buffers(func, body, added) if added else func


def _transposed(rows: tirx.For, added: list[tirx.Var]) -> tirx.Stmt:
    name, columns = str(rows.annotations[_KEY]), rows.body
    size, realize = int(rows.extent), columns.body
    block = realize.block
    bound = dict(zip((it.var for it in block.iter_vars), realize.iter_values, strict=True))
    found: list[TensorLoad] = []

    def collect(load: TensorLoad) -> None:
        if load.source.name == name:
            found.append(load)

    tvm_ffi.structural_walk(block.body, (TensorLoad, collect))
    load = found[0]
    dtype = str(load.source.ty.dtype)
    square = tirx.decl_buffer((size, size), dtype, f"{name}_square")
    added.append(square)

    def place(index: tirx.Expr, column: int) -> tirx.Expr:
        at = {
            loop.loop_var: tirx.IntImm(loop.loop_var.ty.dtype, value) for loop, value in ((rows, 0), (columns, column))
        }
        inner = tvm_ffi.structural_map(index, (tirx.Var, lambda var: bound.get(var, var)))
        return tvm_ffi.structural_map(inner, (tirx.Var, lambda var: at.get(var, var)))

    stmts: list[tirx.Stmt] = []

    def named(value: tirx.Expr) -> tirx.Var:
        var = tirx.Var(f"lanes_{len(stmts)}", value.ty)
        stmts.append(tirx.Bind(var, value))
        return var

    vectors, reads = [], []
    for column in range(size):
        *outer, last = (place(index, column) for index in load.indices)
        vectors.append(named(tirx.BufferLoad(load.source, [*outer, tirx.Ramp(last, 1, size)])))
        ranges = [tvm.ir.Range.from_min_extent(index, 1) for index in outer]
        reads.append(tirx.BufferRegion(load.source, [*ranges, tvm.ir.Range.from_min_extent(last, size)]))
    for distance in (2**bit for bit in range(size.bit_length() - 1)):
        for first in (i for i in range(size) if not i & distance):
            pair = [vectors[first], vectors[first + distance]]
            low = [lane + (size - distance if lane & distance else 0) for lane in range(size)]
            high = [lane + (size if lane & distance else distance) for lane in range(size)]
            vectors[first] = named(tirx.Shuffle(pair, low))
            vectors[first + distance] = named(tirx.Shuffle(pair, high))
    zero = tirx.IntImm("int64", 0)
    for row, vector in enumerate(vectors):
        stmts.append(tirx.BufferStore(square, vector, [tirx.IntImm("int64", row), tirx.Ramp(zero, 1, size)]))
    whole = tirx.BufferRegion(square, [tvm.ir.Range.from_min_extent(zero, size)] * 2)
    copy = s_tir.SBlockRealize([], True, s_tir.SBlock([], reads, [whole], "transpose", tirx.SeqStmt(stmts)))
    return tirx.SeqStmt([copy, _reading(rows, name, square)])


def _reading(rows: tirx.For, name: str, square: tirx.Var) -> tirx.For:
    """Return the marked loops, reading the square instead of the source; the inner one becomes a vector."""
    columns = rows.body
    realize = columns.body
    block = realize.block
    place = [loop.loop_var for loop in (rows, columns)]
    own = [tirx.Var(f"in_{var.name}", var.ty) for var in place]
    body = tvm_ffi.structural_map(
        block.body,
        (TensorLoad, lambda load: tirx.BufferLoad(square, own) if load.source.name == name else load),
    )
    iters = [tirx.IterVar(tvm.ir.Range.from_min_extent(0, rows.extent), var, tirx.IterVar.DataPar) for var in own]
    region = tirx.BufferRegion(square, [tvm.ir.Range.from_min_extent(var, 1) for var in own])
    reads = [*(part for part in block.reads if part.source.name != name), region]
    inner = s_tir.SBlock([*block.iter_vars, *iters], reads, block.writes, block.name_hint, body)
    moved = s_tir.SBlockRealize([*realize.iter_values, *place], realize.predicate, inner)
    vector = tirx.For(columns.loop_var, columns.min, columns.extent, tirx.ForKind.VECTORIZED, moved)
    rest = {key: value for key, value in rows.annotations.items() if key != _KEY}
    return tirx.For(rows.loop_var, rows.min, rows.extent, tirx.ForKind.UNROLLED, vector, None, rest)
