"""Constant subgraphs computed with NumPy: quick, because nothing is compiled for them."""

from __future__ import annotations

import tvm
from tvm import relax
from tvm.ir import GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import (
    Emitter,
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    substitute,
    with_values,
)
from nnfuze_tvm.graph.evaluate import call_of_constants


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
    operator = ops.of(value)
    if operator is None or not operator.folds:
        return None
    result = call_of_constants(value)
    return None if result is None else constant(result)


def settled(func: relax.Function) -> relax.Function:
    """Return a function with constants in place of whatever is computed of constants alone.

    What ``dequantize`` makes stays as it is: it says what integers stand for.
    """

    def computed(value: Value, _name: str, _emitter: Emitter) -> GenericConst | None:
        made = None if op_name(value) == "dequantize" else call_of_constants(value)
        return None if made is None else constant(made)

    return with_values(func, computed)
