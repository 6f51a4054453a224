"""Kernels that first fill a buffer of their own, as two: what only the first of them reads is gone for the second.

So a convolution that pads its data, all of it, leaves room for its result where the data were.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import NamedTuple

import tvm
import tvm_ffi
from tvm import relax, tirx
from tvm.ir import GlobalVar

from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.graph import results
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, with_functions, with_values

Loops = dict[GlobalVar, tirx.PrimFunc]


class Halves(NamedTuple):
    """A kernel in two.

    Attributes
    ----------
    first : tvm.tirx.PrimFunc
        What fills the buffer, its last parameter.
    second : tvm.tirx.PrimFunc
        What does the rest, with the buffer as its last operand.
    operands : list of int, list of int
        Which operands of the whole kernel each of them takes.
    buffer : tvm.tirx.Var
        The buffer, of one axis.
    """

    first: tirx.PrimFunc
    second: tirx.PrimFunc
    operands: tuple[list[int], list[int]]
    buffer: tirx.Var


def halves(func: tirx.PrimFunc, count: int) -> Halves | None:
    """Return a kernel of loops in two, None if it isn't one that fills a buffer first.

    Parameters
    ----------
    func : tvm.tirx.PrimFunc
        The kernel.
    count : int
        How many of its parameters, the last ones, it writes.
    """
    own = kernels.scratch(func)
    if not own or not isinstance(func.body, tirx.SeqStmt):
        return None
    allocated = [part for part in func.body.seq if isinstance(part, tirx.AllocBuffer)]
    parts = [part for part in func.body.seq if not isinstance(part, tirx.AllocBuffer)]
    buffer = own[0]
    filled = max((n for n, part in enumerate(parts) if buffer in _written(part)), default=-1) + 1
    groups = parts[:filled], parts[filled:]
    used = [set().union(*map(_used, group)) for group in groups]
    between = {each.buffer for each in allocated if all(each.buffer in own for own in used)}
    given = set(func.params)
    plain = not any(isinstance(part, tirx.Bind) for part in parts)
    alone = not any(var in given for part in groups[0] for var in _written(part))
    if not (all(groups) and plain and alone and between == {buffer}):
        return None
    flat = tirx.decl_buffer([kernels.elements(buffer)], str(buffer.ty.dtype), buffer.name)
    taken = len(func.params) - count
    numbers = [[n for n, param in enumerate(func.params[:taken]) if param in each] for each in used]
    made = []
    for group, each, own_numbers, last in zip(groups, used, numbers, ([], func.params[taken:]), strict=True):
        room = [part for part in allocated if part.buffer in each and part.buffer not in between]
        body = tirx.SeqStmt([*room, tirx.DeclBuffer(buffer, data=flat.data), *group])
        params = [*(func.params[n] for n in own_numbers), flat, *last]
        made.append(tirx.PrimFunc(params, body, func.ret_type, func.attrs))
    return Halves(made[0], made[1], (numbers[0], numbers[1]), flat)


def split(mod: tvm.IRModule, loops: Loops, chosen: Collection[GlobalVar]) -> tuple[tvm.IRModule, Loops]:
    """Return a module with some of its kernels called in two, and its kernels as loops.

    Parameters
    ----------
    mod : tvm.IRModule
        The module.
    loops : dict of GlobalVar to PrimFunc
        Its kernels as loops.
    chosen : collection of GlobalVar
        Those that shall be in two, of the `candidates`.
    """
    if not chosen:
        return mod, loops
    rest = {gvar: func for gvar, func in mod.functions_items() if gvar not in chosen and gvar.name_hint != "main"}
    builder = relax.BlockBuilder(with_functions(mod, rest))
    new = {gvar: func for gvar, func in loops.items() if gvar not in chosen}
    both: dict[GlobalVar, tuple[Halves, GlobalVar, GlobalVar]] = {}

    def change(value: Value, _: str, emitter: Emitter) -> Value | None:
        if op_name(value) != "call_tir" or (kernel := value.args[0]) not in chosen:
            return None
        if kernel not in both:
            found = halves(loops[kernel], len(loops[kernel].params) - len(value.args[1]))
            assert found is not None
            first = builder.add_func(found.first, f"{kernel.name_hint}_scratch")
            second = builder.add_func(found.second, kernel.name_hint)
            both[kernel] = found, first, second
            new.update({first: found.first, second: found.second})
        found, first, second = both[kernel]
        operands = [[value.args[1][n] for n in numbers] for numbers in found.operands]
        room = relax.TensorType([kernels.elements(found.buffer)], str(found.buffer.ty.dtype))
        filled = emitter.emit(relax.op.call_tir(first, relax.Tuple(operands[0]), room), "scratch")
        return relax.op.call_tir(second, relax.Tuple([*operands[1], filled]), results(value))

    main = with_values(mod["main"], change)
    return with_functions(mod, {**dict(builder.get().functions_items()), "main": main}), new


def candidates(mod: tvm.IRModule, loops: Loops) -> list[GlobalVar]:
    """Return the kernels of a module that can be split, in the order in which it calls them."""
    found: dict[GlobalVar, bool] = {}
    for binding in bindings(mod["main"]):
        if op_name(binding.value) == "call_tir" and (kernel := binding.value.args[0]) not in found:
            count = len(loops[kernel].params) - len(binding.value.args[1])
            found[kernel] = halves(loops[kernel], count) is not None
    return [kernel for kernel, can in found.items() if can]


def _written(stmt: tirx.Stmt) -> set[tirx.Var]:
    """Return the buffers that a statement stores to."""
    found: set[tirx.Var] = set()
    tvm_ffi.structural_walk(stmt, (tirx.BufferStore, lambda store: found.add(store.buffer)))
    return found


def _used(stmt: tirx.Stmt) -> set[tirx.Var]:
    """Return the variables that a statement mentions."""
    found: set[tirx.Var] = set()
    tvm_ffi.structural_walk(stmt, (tirx.Var, found.add))
    return found
