"""What a choice does not take is not computed.

Of a branch on computed data both sides are in the graph, and a choice by one condition behind them. A kernel whose
result matters on one side alone asks for the condition first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod

import tvm
from tvm import relax, s_tir, tirx
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.dataflow import (
    Emitter,
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    substitute,
    with_rewritten,
)
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.keep_nan import Legalize, by_tvm

ATTRIBUTE = "nnfuze.choice"
"""A kernel that has it takes its second or its third operand as the first, a single one, says."""

# TVM's operator patterns: reductions and what is above them are worth asking; the last is fused with nothing.
_REDUCTION, _OPAQUE = 3, 8

Conditions = frozenset[tuple[Value, bool]]
"""What all must hold for a value to matter: variables of one element, and whether each must be true."""


def legalizations() -> dict[str, Legalize]:
    """Return how ``LegalizeOps`` shall write choices."""
    return {"relax.where": _choice}


def _choice(builder: relax.BlockBuilder, call: Call) -> relax.Expr:
    written = by_tvm(builder, call)
    if chosen(call) and op_name(written) == "call_tir":
        kernel = written.args[0]
        builder.update_func(kernel, builder.get()[kernel].with_attr(ATTRIBUTE, 1))
    return written


@module_pass(opt_level=0, name="KeepChoices")
class KeepChoices:
    """Keep TVM from fusing a choice with what it chooses from, where one side alone computes something large."""

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the patterns of choices corrected; those that are not worth it are none any more."""
        main = mod["main"]
        when = conditions(main, lambda value: _chosen(value, mod))
        bound = {binding.var: binding.value for binding in bindings(main)}
        saving = {
            condition
            for var, own in when.items()
            for condition, _ in own
            if var in bound and _is_large(bound[var], mod)
        }
        kept = {
            value.args[0]
            for value in bound.values()
            if (own := _chosen(value, mod)) and _origin(own[0], bound) in saving
        }
        for gvar, func in mod.functions_items():
            if isinstance(func, tirx.PrimFunc) and ATTRIBUTE in func.attrs:
                new = func.with_attr("op_pattern", _OPAQUE) if gvar in kept else func.without_attr(ATTRIBUTE)
                mod.update_func(gvar, new)
        return mod


@module_pass(opt_level=0, name="SkipBranches")
class SkipBranches:
    """Let scheduled kernels do nothing where their result will not be chosen; what they leave is not read."""

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with the kernels of branches asking for their conditions."""
        return with_rewritten(mod, lambda func, builder: _guarded(mod, func, builder))


def chosen(value: Value) -> list[Value]:
    """Return the operands of a choice between whole tensors: the condition, and what it is when true and when false."""
    if op_name(value) != "where" or prod(static_shape(value.args[0])) != 1 or isinstance(value.args[0], GenericConst):
        return []
    return list(value.args)


def conditions(
    func: relax.Function,
    choice: Callable[[Value], Sequence[Value]] = chosen,
    always: Callable[[Value], bool] = lambda _: False,
) -> dict[Value, Conditions]:
    """Return for every variable that is used what must hold for its value to matter.

    Parameters
    ----------
    func : relax.Function
        A straight-line function.
    choice : callable
        From a bound value to the operands of a choice, none if it is none.
    always : callable
        Tells what is computed in vain, too, so that what it reads always matters.
    """
    found: dict[Value, Conditions] = {}
    steps = bindings(func)
    bound = {binding.var: binding.value for binding in steps}

    def use(value: Value, own: Conditions) -> None:
        for leaf in filter(lambda leaf: isinstance(leaf, Var), operands(value)):
            found[leaf] = found.get(leaf, own) & own

    for field in output_fields(func):
        use(field, frozenset())
    for binding in reversed(steps):
        if binding.var not in found:
            continue
        own = frozenset() if always(binding.value) else found[binding.var]
        if parts := choice(binding.value):
            condition, *sides = parts
            use(condition, own)
            for side, taken in zip(sides, (True, False), strict=True):
                use(side, own | {(_origin(condition, bound), taken)})
        else:
            use(binding.value, own)
    return found


def _origin(condition: Value, bound: dict[Value, Value]) -> Value:
    """Return what a condition is, whatever its shape."""
    while op_name(bound.get(condition)) in ("reshape", "expand_dims", "squeeze"):
        condition = bound[condition].args[0]
    return condition


def _chosen(value: Value, mod: tvm.IRModule) -> list[Value]:
    """Return the operands of a kernel that is a choice."""
    if op_name(value) != "call_tir" or ATTRIBUTE not in (mod[value.args[0]].attrs or {}) or len(value.args[1]) != 3:
        return []
    return list(value.args[1])


def _is_large(value: Value, mod: tvm.IRModule) -> bool:
    """Tell whether a value is computed by a kernel that is more than a map."""
    if op_name(value) != "call_tir":
        return False
    return int(mod[value.args[0]].attrs.get("op_pattern", _OPAQUE)) >= _REDUCTION


def _guarded(mod: tvm.IRModule, func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    when = conditions(func, lambda value: _chosen(value, mod), lambda value: not _is_skippable(value, mod))
    if not any(when.values()):
        return func
    emitter = Emitter()
    values: dict[Value, Value] = {}
    ready: dict[tuple[Value, bool], Value] = {}
    kernels: dict[tuple[Value, int], Value] = {}
    asked = {condition for own in when.values() for condition in own}

    def arrived(var: Value) -> None:
        """Compute what kernels will ask about a variable."""
        for taken in (True, False):
            if (var, taken) in asked:
                kernel = builder.add_func(_test(static_shape(var), taken), "condition")
                call = relax.call_tir(kernel, relax.Tuple([values.get(var, var)]), relax.TensorType([], "bool"))
                ready[var, taken] = emitter.emit(call, "condition")

    for param in func.params:
        emitter.unique(param.name)
        arrived(param)
    for binding in _conditions_first(bindings(func), {var for var, _ in asked}):
        value = substitute(binding.value, values)
        own = sorted((ready[c] for c in when.get(binding.var, ()) if c in ready), key=lambda var: str(var.name))
        if own and op_name(value) == "call_tir" and _is_skippable(value, mod):
            key = value.args[0], len(own)
            if key not in kernels:
                kernels[key] = builder.add_func(_asking(mod[key[0]], len(own)), f"{key[0].name_hint}_if")
            inputs = relax.Tuple([*own, *value.args[1]])
            args = [kernels[key], inputs, *value.args[2:]]
            value = Call(value.op, args, value.attrs, value.ty_args, value.span, value.ty)
        values[binding.var] = emitter.emit(value, binding.var.name)
        arrived(binding.var)
    outputs = [substitute(field, values) for field in output_fields(func)]
    return emitter.finish(func.params, outputs, func.attrs)


def _conditions_first(steps: list[relax.VarBinding], asked: set[Value]) -> list[relax.VarBinding]:
    """Return bindings in an order in which what is asked for, and what it follows from, is in front."""
    needed = set(asked)
    for binding in reversed(steps):
        if binding.var in needed:
            needed.update(operands(binding.value))
    return sorted(steps, key=lambda binding: binding.var not in needed)


def _is_skippable(value: Value, mod: tvm.IRModule) -> bool:
    """Tell whether a value is a kernel that can ask first, or none that computes anything."""
    if op_name(value) != "call_tir":
        return isinstance(value, relax.Tuple | relax.TupleGetItem | Var) or op_name(value) == "reshape"
    return isinstance(mod[value.args[0]].body, s_tir.SBlockRealize)


def _asking(func: tirx.PrimFunc, count: int) -> tirx.PrimFunc:
    """Return a kernel that does what ``func`` does if all of so many numbers in front of its operands are true."""
    asked = [tirx.decl_buffer([], "bool", f"asked{n}") for n in range(count)]
    holds = asked[0][()]
    for one in asked[1:]:
        holds = tirx.And(holds, one[()])
    realize = func.body
    block = realize.block
    outermost = s_tir.SBlock(
        block.iter_vars,
        block.reads,
        block.writes,
        block.name_hint,
        tirx.IfThenElse(holds, block.body, None),
        block.init,
        block.alloc_buffers,
        block.match_buffers,
        block.annotations,
    )
    body = s_tir.SBlockRealize(realize.iter_values, realize.predicate, outermost)
    return tirx.PrimFunc([*asked, *func.params], body, func.ret_type, func.attrs)


def _test(shape: tuple[int, ...], taken: bool) -> tirx.PrimFunc:
    """Return the kernel that tells whether a single truth value is ``taken``."""
    with IRBuilder() as builder:
        with T.prim_func(s_tir=True):
            T.func_attr({"tirx.noalias": True, "tirx.is_scheduled": True})
            source = T.arg("source", T.buffer(list(map(T.int64, shape)), "bool"))
            holds = T.arg("holds", T.buffer([], "bool"))
            with T.sblock("condition"):
                T.reads(source[tuple(slice(0, size) for size in shape)] if shape else source[()])
                T.writes(holds[()])
                value = source[tuple(T.int64(0) for _ in shape)]
                T.buffer_store(holds, value if taken else tirx.Not(value), [])
    return builder.get()
