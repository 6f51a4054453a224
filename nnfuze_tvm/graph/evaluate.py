"""A Relax function computed with NumPy: quick to start, exact in integers, in floats within rounding.

Operators say themselves how they are computed (`ops`). PrimFuncs, and operators that don't say it, are compiled by LLVM
without optimization, all that a module needs in one library.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import tvm
from tvm import relax, tirx
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, scalar
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, output_fields

Run = Callable[[Mapping[str, np.ndarray]], list[np.ndarray]]
"""One inference: arrays by input name → outputs in tuple order."""
Executor = Callable[[tvm.IRModule, int], Run]
"""Makes a module with one function ``main`` ready to run on this machine, so many times."""
Hook = Callable[[Value, Any], Any]
"""``(what a binding binds, its value) -> value``: the value that is gone on with."""

# Each kernel runs a few times, so what LLVM takes to compile it counts, not how good it becomes.
QUICKLY = {"kind": "llvm", "opt-level": 0}
# So many of TVM's own kernels stay compiled.
_KEPT = 128


def executor(mod: tvm.IRModule, inferences: int = 1) -> Run:
    """Return what computes ``main`` of a module.

    Parameters
    ----------
    mod : tvm.IRModule
        One straight-line Relax function ``main`` with static shapes, and the PrimFuncs that it calls.
    inferences : int
        How often it will be run, see `Executor`; it is the same however often.

    Raises
    ------
    ValueError
        When run, if the function has control flow.
    """
    run = hooked_executor(mod)
    return lambda inputs: run(inputs, None)


def hooked_executor(mod: tvm.IRModule) -> Callable[[Mapping[str, np.ndarray], Hook | None], list[np.ndarray]]:
    """Return what `executor` does, with a hook for `evaluate` at every run."""
    library = kernels_of(mod)
    func = mod["main"]
    return lambda inputs, hook: evaluate(func, inputs, library, hook)


def evaluate(
    func: relax.Function,
    inputs: Mapping[str, np.ndarray],
    library: tvm.runtime.Module | None = None,
    hook: Hook | None = None,
    known: dict[Value, Any] | None = None,
) -> list[np.ndarray]:
    """Return the outputs of a straight-line function, in tuple order.

    Parameters
    ----------
    func : tvm.relax.Function
        The function.
    inputs : mapping of str to np.ndarray
        One array per parameter, by its name.
    library : tvm.runtime.Module, optional
        The PrimFuncs that it calls, by name.
    hook : callable, optional
        Is handed the value of every binding and returns what to go on with.
    known : dict, optional
        Values of Vars that need not be computed; those that are computed are added.
    """
    known = {} if known is None else known
    known |= {param: np.asarray(inputs[param.name]) for param in func.params}
    for binding in bindings(func):
        if binding.var in known:
            continue
        found = value_of(binding.value, known, library)
        known[binding.var] = found if hook is None else hook(binding.value, found)
    fields = output_fields(func)
    values = [value_of(field, known, library) for field in fields]
    if len(fields) == 1 and isinstance(fields[0].ty, relax.TupleType):
        (values,) = values
    return list(map(np.asarray, values))


def call_of_constants(value: Value) -> np.ndarray | None:
    """Return what a call of an operator with a NumPy form makes of constants; None for anything else."""
    operator = ops.of(value)
    if operator is None or operator.evaluate is None or operator.opaque or not isinstance(value.ty, relax.TensorType):
        return None
    if not all(_is_known(arg) for arg in value.args) or not value.args:
        return None
    return _called(value, [value_of(arg, {}, None) for arg in value.args])


def _is_known(arg: Value) -> bool:
    if isinstance(arg, relax.Tuple):
        return all(map(_is_known, arg.fields))
    return not isinstance(arg, tvm.ir.Var | Call | relax.TupleGetItem)


def value_of(value: Value, known: Mapping[Value, Any], library: tvm.runtime.Module | None) -> Any:
    """Return what a value is: an array for a tensor, a list for a tuple, numbers for scalars and shapes.

    Parameters
    ----------
    value : Value
        What a binding binds, or a part of it.
    known : mapping
        The values of the Vars that it reads.
    library : tvm.runtime.Module, optional
        The PrimFuncs that it calls, by name.
    """
    if isinstance(value, tvm.ir.Var):
        return known[value]
    if isinstance(value, GenericConst):
        return array(value)
    if isinstance(value, relax.Tuple):
        return [value_of(field, known, library) for field in value.fields]
    if isinstance(value, relax.TupleGetItem):
        return value_of(value.tuple_value, known, library)[value.index]
    if isinstance(value, relax.ShapeExpr):
        return tuple(int(dim) for dim in value.values)
    if isinstance(value, Call):
        if op_name(value) in ("call_tir", "call_tir_inplace"):
            return _kernel(value, known, library)
        if op_name(value) == "shape_of":
            return value_of(value.args[0], known, library).shape
        return _called(value, [value_of(arg, known, library) for arg in value.args])
    return scalar(value)


def _called(call: Call, args: Sequence[Any]) -> Any:
    operator = ops.of(call)
    if operator is None or operator.evaluate is None:
        return _compiled(call, args)
    with np.errstate(all="ignore"):
        result = operator.evaluate(call, *args)
    if isinstance(call.ty, relax.TupleType):
        return [_typed(each, ty) for each, ty in zip(result, call.ty.fields, strict=True)]
    return _typed(result, call.ty)


def _typed(result: np.ndarray, ty: relax.TensorType) -> np.ndarray:
    return np.asarray(result).astype(str(ty.dtype), copy=False)


def _kernel(call: Call, known: Mapping[Value, Any], library: tvm.runtime.Module | None) -> Any:
    """Run a PrimFunc on arrays."""
    assert library is not None, "a function that calls PrimFuncs needs their library"
    given = [tvm.runtime.tensor(np.asarray(each, order="C")) for each in value_of(call.args[1], known, library)]
    types = call.ty.fields if isinstance(call.ty, relax.TupleType) else [call.ty]
    results = [tvm.runtime.empty([int(dim) for dim in ty.shape.values], str(ty.dtype)) for ty in types]
    library[call.args[0].name_hint](*given, *results)
    arrays = [each.numpy() for each in results]
    return arrays if isinstance(call.ty, relax.TupleType) else arrays[0]


def kernels_of(mod: tvm.IRModule) -> tvm.runtime.Module | None:
    """Compile the PrimFuncs of a module, see `library_of`."""
    return library_of({var.name_hint: f for var, f in mod.functions_items() if isinstance(f, tirx.PrimFunc)})


def library_of(kernels: Mapping[str, tirx.PrimFunc]) -> tvm.runtime.Module | None:
    """Compile PrimFuncs for this machine, as they are and without optimization; None if there are none.

    Parameters
    ----------
    kernels : Mapping[str, tirx.PrimFunc]
        By the name that each has in the library.
    """
    named = {name: func.with_attr("global_symbol", name) for name, func in kernels.items()}
    return tvm.tirx.build(tvm.IRModule(named), target=tvm.target.Target(QUICKLY)) if named else None


def _compiled(call: Call, args: Sequence[Any]) -> Any:
    """Compute one call with TVM's own kernel for it."""
    tensors = [n for n, arg in enumerate(call.args) if isinstance(arg.ty, relax.TensorType)]
    params = [relax.Var(f"x{n}", call.args[n].ty) for n in tensors]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        mine = iter(params)
        own = [next(mine) if n in tensors else arg for n, arg in enumerate(call.args)]
        with builder.dataflow():
            result = builder.emit(Call(call.op, own, call.attrs, call.ty_args))
            if isinstance(call.ty, relax.TupleType):
                # Field by field: a function whose result is a bound tuple has one output to `output_fields`.
                result = relax.Tuple([builder.emit(relax.TupleGetItem(result, n)) for n in range(len(call.ty.fields))])
            result = builder.emit_output(result)
        builder.emit_func_output(result)
    results = _ready(str(tvm.ir.save_json(builder.get())), op_name(call))({f"x{n}": args[n] for n in tensors})
    return results if isinstance(call.ty, relax.TupleType) else results[0]


@lru_cache(maxsize=_KEPT)
def _ready(module: str, name: str) -> Run:
    """Compile a module of one call, as JSON: it is called for every sample, and by every pass."""
    with tvm.target.Target(QUICKLY):
        legalize = [relax.backend.DispatchSortScan(), relax.transform.LegalizeOps()]
        lowered = tvm.transform.Sequential(legalize)(tvm.ir.load_json(module))
    if any(op_name(b.value) == name for b in bindings(lowered["main"])):
        raise ValueError(f"{name}: there is neither a NumPy form nor a kernel of it")
    return executor(lowered)
