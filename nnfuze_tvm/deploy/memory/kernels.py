"""Kernels as loops, their scratch and their operands as what the memory of a call is planned with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import reduce
from math import prod

import tvm
import tvm_ffi
from tvm import tirx
from tvm.target import Target

from nnfuze_tvm.graph.ir import nbytes
from nnfuze_tvm.schedules.loops import without_blocks

# TVM gives what is smaller a place on the stack.
_STACK = 1024


def as_loops(mod: tvm.IRModule, target: Target) -> dict[tvm.ir.GlobalVar, tirx.PrimFunc]:
    """Return the kernels of a module without blocks, as TVM's way to machine code makes them first of all."""
    kernels = {
        gvar: func.with_attr("global_symbol", gvar.name_hint)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    passes = [tirx.transform.BindTarget(target.with_host(target)), *without_blocks()]
    lowered = tvm.transform.Sequential(passes)(tvm.IRModule(kernels))
    added = ("global_symbol", "target")
    return {gvar: reduce(tirx.PrimFunc.without_attr, added, lowered[gvar.name_hint]) for gvar in kernels}


def scratch(func: tirx.PrimFunc) -> list[tirx.Var]:
    """Return the buffers that a kernel of loops allocates once per call, but for those on the stack."""
    parts = func.body.seq if isinstance(func.body, tirx.SeqStmt) else [func.body]
    found = [part.buffer for part in parts if isinstance(part, tirx.AllocBuffer)]
    return [buffer for buffer in found if buffer_size(buffer) > _STACK]


def per_thread(func: tirx.PrimFunc) -> int:
    """Return the bytes that every thread of a kernel of loops allocates, but for those on the stack."""
    own = scratch(func)
    found: list[int] = []

    def count(part: tirx.AllocBuffer) -> None:
        if not any(part.buffer.same_as(buffer) for buffer in own):
            found.append(buffer_size(part.buffer))

    tvm_ffi.structural_walk(func.body, (tirx.AllocBuffer, count))
    return sum(each for each in found if each > _STACK)


def changed(func: tirx.PrimFunc, inputs: int, given: Sequence[tirx.Var], over: Mapping[int, int]) -> tirx.PrimFunc:
    """Return a kernel that is given some of its scratch, and finds operands where it shall leave results.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        A kernel of loops.
    inputs : int
        How many of its parameters are operands; the others are results.
    given : sequence of tvm.tirx.Var
        Scratch that shall be parameters behind its operands.
    over : mapping of int to int
        From the number of a result to that of the operand that it lies over. The operand stays a parameter, the result
        does not.
    """
    operands, results = list(func.params[:inputs]), list(func.params[inputs:])
    same = {results[result]: operands[operand] for result, operand in over.items()}

    flat = [tirx.decl_buffer([elements(buffer)], str(buffer.ty.dtype), buffer.name) for buffer in given]
    places = dict(zip(given, flat, strict=True))

    def declared(part: tirx.Stmt) -> tirx.Stmt:
        if not isinstance(part, tirx.AllocBuffer) or part.buffer not in places:
            return part
        return tirx.DeclBuffer(part.buffer, data=places[part.buffer].data)

    body = tirx.SeqStmt(list(map(declared, func.body.seq))) if given else func.body
    body = tvm_ffi.structural_map(body, (tirx.Var, lambda var: same.get(var, var))) if same else body
    params = [*operands, *flat, *(result for result in results if result not in same)]
    return tirx.PrimFunc(params, body, func.ret_type, func.attrs)


def buffer_size(buffer: tirx.Var) -> int:
    """Return the bytes of a buffer."""
    return nbytes([elements(buffer)], str(buffer.ty.dtype))


def elements(buffer: tirx.Var) -> int:
    """Return how many numbers a buffer has, those between its rows included."""
    shape, strides = (list(map(int, each)) for each in (buffer.ty.shape, buffer.ty.strides))
    if not strides:
        return prod(shape)
    return max(extent * stride for extent, stride in zip(shape, strides, strict=True))
