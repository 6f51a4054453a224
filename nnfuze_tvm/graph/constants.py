"""Constant subgraphs computed with numpy: quick, because nothing is compiled for them."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.ir import static_shape


def array(constant: GenericConst) -> np.ndarray:
    """Return the value of a constant."""
    return constant.value.numpy()


def constant(value: np.ndarray, dtype: str | np.dtype | None = None) -> GenericConst:
    """Return ``value`` as a Relax constant."""
    return relax.const(np.ascontiguousarray(value, dtype=dtype))


def _reshaped(call: Call, value: np.ndarray, *_: np.ndarray) -> np.ndarray:
    return value.reshape(static_shape(call))


def _permuted(call: Call, value: np.ndarray) -> np.ndarray:
    axes = call.attrs.axes
    return value.transpose(None if axes is None else [int(a) for a in axes])


_FLOAT_OPS: dict[str, Callable[..., np.ndarray]] = {
    "add": np.add,
    "subtract": np.subtract,
    "multiply": np.multiply,
    "divide": np.divide,
    "negative": np.negative,
    "sqrt": np.sqrt,
}

_OPS: dict[str, Callable[..., np.ndarray]] = {
    "reshape": _reshaped,
    "flatten": _reshaped,
    "squeeze": _reshaped,
    "expand_dims": _reshaped,
    "permute_dims": _permuted,
    "astype": lambda call, value: value.astype(str(call.attrs.dtype)),
    **{name: lambda _, *args, f=f: f(*args) for name, f in _FLOAT_OPS.items()},
}


def folded(func: relax.Function) -> tuple[list[relax.VarBinding], list[Value]]:
    """Return the bindings and the output fields of ``func`` with constant subgraphs computed.

    Shape operators and floating-point arithmetic on constants are computed; Vars that only rename another Var
    and fields of literal tuples are looked through; what nothing reads is left out. Vars keep their identity.
    """
    known: dict[Value, Value] = {}
    tuples: dict[Value, relax.Tuple] = {}
    result = []
    for binding in bindings(func):
        value = substitute(binding.value, known)
        if isinstance(value, relax.TupleGetItem) and isinstance(value.tuple_value, relax.Tuple):
            value = value.tuple_value.fields[value.index]
        elif isinstance(value, relax.TupleGetItem) and value.tuple_value in tuples:
            value = tuples[value.tuple_value].fields[value.index]
        elif isinstance(value, relax.Tuple):
            tuples[binding.var] = value
        elif (computed := _computed(value)) is not None:
            value = computed
        if isinstance(value, tvm.ir.Var | GenericConst):
            known[binding.var] = value
        else:
            result.append(relax.VarBinding(binding.var, value))
    outputs = [substitute(field, known) for field in output_fields(func)]
    read = {leaf for out in outputs for leaf in operands(out)}
    live = []
    for binding in reversed(result):
        if binding.var in read:
            read.update(operands(binding.value))
            live.append(binding)
    return live[::-1], outputs


def _computed(value: Value) -> GenericConst | None:
    name = op_name(value)
    if name not in _OPS or not isinstance(value.args[0], GenericConst):
        return None
    args = [array(arg) for arg in value.args if isinstance(arg, GenericConst)]
    if len(args) != len([arg for arg in value.args if not isinstance(arg, relax.ShapeExpr)]):
        return None
    if name in _FLOAT_OPS and any(arg.dtype.kind != "f" for arg in args):
        return None
    with np.errstate(all="ignore"):
        return constant(_OPS[name](value, *args))
