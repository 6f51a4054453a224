"""Straight-line Relax functions: read their bindings, write new ones, and keep every name as it is.

``relax.BlockBuilder.emit`` rewrites names (``.`` becomes ``_``) and the functions of this package are one
dataflow block each, so a pass reads the bindings in order, appends what it wants to an :class:`Emitter`, and
gets a normalized function without dead bindings from :meth:`Emitter.finish`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeAlias

import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax.expr import _update_type

Value: TypeAlias = Any
"""A Relax expression (TVM has no static types): what a binding binds, or one of its operands."""


def bindings(func: relax.Function) -> list[relax.VarBinding]:
    """Return the bindings of a straight-line function, in order.

    Raises
    ------
    ValueError
        If the function has control flow or a match_cast.
    """
    found: list[relax.VarBinding] = []
    for block in func.body.blocks:
        for binding in block.bindings:
            if not isinstance(binding, relax.VarBinding) or isinstance(binding.value, relax.If):
                raise ValueError(f"not a straight-line function: {binding.var.name}")
            found.append(binding)
    return found


def output_fields(func: relax.Function) -> list[Value]:
    """Return the fields of the tuple that ``func`` returns, also where the tuple itself is bound to a Var."""
    body = func.body.body
    bound = {b.var: b.value for block in func.body.blocks for b in block.bindings}
    while body in bound and isinstance(bound[body], tvm.ir.Var):
        body = bound[body]
    body = bound.get(body, body)
    if isinstance(body, relax.Tuple):
        return list(body.fields)
    return [func.body.body]


def op_name(value: Value) -> str:
    """Return the operator's name of a call to a Relax operator without ``relax.``, else an empty string."""
    if isinstance(value, Call) and isinstance(value.op, tvm.ir.Op):
        return value.op.name.removeprefix("relax.")
    return ""


def operands(value: Value) -> list[Value]:
    """Return the Vars and constants a bound value reads, looking into tuples."""
    if isinstance(value, relax.Tuple):
        return [leaf for field in value.fields for leaf in operands(field)]
    if isinstance(value, relax.TupleGetItem):
        return operands(value.tuple_value)
    if isinstance(value, Call):
        return [leaf for arg in value.args for leaf in operands(arg)]
    return [value] if isinstance(value, tvm.ir.Var | GenericConst) else []


def substitute(value: Value, replace: Mapping[Value, Value]) -> Value:
    """Return ``value`` with its operands replaced by others of the same types."""
    if isinstance(value, tvm.ir.Var | GenericConst | tvm.ir.GlobalVar):
        return replace.get(value, value)
    if isinstance(value, relax.Tuple):
        fields = [substitute(field, replace) for field in value.fields]
        if all(new.same_as(old) for new, old in zip(fields, value.fields, strict=True)):
            return value
        result = relax.Tuple(fields)
    elif isinstance(value, relax.TupleGetItem):
        source = substitute(value.tuple_value, replace)
        if source.same_as(value.tuple_value):
            return value
        result = relax.TupleGetItem(source, value.index)
    elif isinstance(value, Call):
        args = [substitute(arg, replace) for arg in value.args]
        if all(new.same_as(old) for new, old in zip(args, value.args, strict=True)):
            return value
        result = Call(value.op, args, value.attrs, value.ty_args, value.span, value.ty)
    else:
        return value
    if _is_missing(result.ty):
        _update_type(result, value.ty)
    return result


def with_functions(mod: tvm.IRModule, functions: Mapping[tvm.ir.GlobalVar | str, tvm.ir.BaseFunc]) -> tvm.IRModule:
    """Return a module with these functions and everything else of ``mod``."""
    result = tvm.IRModule(dict(functions), global_infos=mod.global_infos)
    return result.with_attrs(dict(mod.attrs.items())) if mod.attrs is not None else result


def with_main(mod: tvm.IRModule, main: relax.Function) -> tvm.IRModule:
    """Return ``mod`` with ``main`` replaced."""
    return with_functions(mod, {**mod.functions, mod.get_global_var("main"): main})


def with_kernels_of(mod: tvm.IRModule, main: relax.Function) -> tvm.IRModule:
    """Return a module with one Relax function, ``main``, and the PrimFuncs of ``mod``, which it may call."""
    kernels = {var: func for var, func in mod.functions.items() if not isinstance(func, relax.Function)}
    return tvm.IRModule({**kernels, "main": main.with_attr("global_symbol", "main")})


def with_rewritten(
    mod: tvm.IRModule, rewrite: Callable[[relax.Function, relax.BlockBuilder], relax.Function]
) -> tvm.IRModule:
    """Return ``mod`` with its Relax functions rewritten.

    Parameters
    ----------
    mod : tvm.IRModule
        The module.
    rewrite : callable
        From a function, and the builder of the module that PrimFuncs can be added to, to the new function.
    """
    builder = relax.BlockBuilder(mod)
    for gvar, func in mod.functions_items():
        if isinstance(func, relax.Function):
            new = rewrite(func, builder)
            if not new.same_as(func):
                builder.update_func(gvar, new)
    result = builder.get()
    return result.with_attrs(dict(mod.attrs.items())) if mod.attrs is not None else result


def with_values(func: relax.Function, change: Callable[[Value, str, Emitter], Value | None]) -> relax.Function:
    """Return ``func`` with some of the values that it binds computed otherwise, itself if there are none.

    Parameters
    ----------
    func : relax.Function
        A straight-line function.
    change : callable
        From a value over the new function's variables, the name that it is bound to, and what binds others before it,
        to the new value; None keeps it. A value that is bound already has another name.
    """
    emitter = Emitter()
    values: dict[Value, Value] = {}
    changed = False
    for binding in bindings(func):
        value, name = substitute(binding.value, values), binding.var.name
        new = change(value, name, emitter)
        changed |= new is not None
        values[binding.var] = emitter.emit(value if new is None else new, name)
    if not changed:
        return func
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def readers(func: relax.Function) -> dict[Value, list[tvm.ir.Var]]:
    """Return by Vars and constants what is bound to a value that reads them, as often as it does."""
    found: dict[Value, list[tvm.ir.Var]] = {}
    for binding in bindings(func):
        for leaf in operands(binding.value):
            found.setdefault(leaf, []).append(binding.var)
    return found


def returning(func: relax.Function, values: Sequence[Value]) -> relax.Function:
    """Return a function that takes what ``func`` takes and returns some of its values, inner ones as well."""
    emitter = Emitter()
    for param in func.params:
        emitter.unique(param.name)
    new: dict[Value, Value] = {}
    emitter.copy(bindings(func), new)
    return emitter.finish(func.params, [new.get(value, value) for value in values], func.attrs)


class Emitter:
    """Collects the bindings of one function.

    Unlike a ``relax.BlockBuilder`` it keeps names verbatim (made unique by a suffix) and drops dead bindings.
    """

    def __init__(self) -> None:
        self._builder = relax.BlockBuilder()
        self._bindings: list[relax.VarBinding] = []
        self._names: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Reserve ``name``, with a numeric suffix when it is taken."""
        if name not in self._names:
            self._names[name] = 0
            return name
        while True:
            self._names[name] += 1
            candidate = f"{name}_{self._names[name]}"
            if candidate not in self._names:
                self._names[candidate] = 0
                return candidate

    def emit(self, value: Value, name: str = "lv") -> Value:
        """Bind ``value`` (nested calls are bound one by one) and return its Var; leaves stay as they are.

        ``value`` may already have a type, which is then trusted.
        """
        if isinstance(value, tvm.ir.Var | GenericConst | relax.ShapeExpr):
            return value
        value = self._flatten(value)
        if isinstance(value.ty, tvm.ir.Type) and _is_missing(value.ty):
            value = self._builder.normalize(value)
        var = relax.DataflowVar(self.unique(name), value.ty)
        self._bindings.append(relax.VarBinding(var, value))
        return var

    def copy(self, bindings: Iterable[relax.VarBinding], values: dict[Value, Value]) -> None:
        """Bind what a function binds under the same names, over ``values``, which gets the new Vars by the old ones."""
        for binding in bindings:
            values[binding.var] = self.emit(substitute(binding.value, values), binding.var.name)

    def _flatten(self, value: Value) -> Value:
        """Bind the calls among the operands of ``value``."""
        if isinstance(value, Call):
            args = [self._leaf(arg) for arg in value.args]
            if any(not new.same_as(old) for new, old in zip(args, value.args, strict=True)):
                return Call(value.op, args, value.attrs, value.ty_args, value.span)
        elif isinstance(value, relax.TupleGetItem):
            source = self._leaf(value.tuple_value)
            if not source.same_as(value.tuple_value):
                return relax.TupleGetItem(source, value.index)
        elif isinstance(value, relax.Tuple):
            fields = [self._leaf(field) for field in value.fields]
            if any(not new.same_as(old) for new, old in zip(fields, value.fields, strict=True)):
                return relax.Tuple(fields)
        return value

    def _leaf(self, arg: Value) -> Value:
        if isinstance(arg, Call | relax.TupleGetItem):
            return self.emit(arg)
        return self._flatten(arg) if isinstance(arg, relax.Tuple) else arg

    def finish(
        self, params: Sequence[tvm.ir.Var], outputs: Iterable[Value], attrs: tvm.ir.DictAttrs | None = None
    ) -> relax.Function:
        """Return the function ``params -> Tuple(outputs)`` with the bindings that the outputs need."""
        outputs = list(outputs)
        live = {leaf for out in outputs for leaf in operands(out)}
        kept: list[relax.VarBinding] = []
        for binding in reversed(self._bindings):
            if binding.var in live:
                live.update(operands(binding.value))
                kept.append(binding)
        # What leaves the dataflow block must not be a DataflowVar.
        public: dict[Value, Value] = {
            out: tvm.ir.Var(out.name, out.ty) for out in outputs if isinstance(out, relax.DataflowVar)
        }
        final = [relax.VarBinding(public.get(b.var, b.var), substitute(b.value, public)) for b in reversed(kept)]
        body = self._builder.normalize(relax.Tuple([substitute(out, public) for out in outputs]))
        sequence = relax.SeqExpr([relax.DataflowBlock(final)] if final else [], body)
        _update_type(sequence, body.ty)
        return relax.Function(list(params), sequence, ret_ty=body.ty, is_pure=True, attrs=attrs)


def _is_missing(ty: tvm.ir.Type) -> bool:
    return bool(ty.same_as(tvm.ir.Type.missing()))
