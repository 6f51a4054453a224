"""Which layers can be quantized, and why others can't."""

from __future__ import annotations

from collections.abc import Container
from typing import TYPE_CHECKING

from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name
from nnfuze_tvm.graph.ir import Lineage
from nnfuze_tvm.passes.compress.method import Precision

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

INT8 = Precision(8, 8, "int")
W4A8 = Precision(4, 8, "int")
INTEGER = (INT8, W4A8)
"""What layers of integers compute in: their activations have 8 bits."""


def quantizable(value: Value) -> bool:
    """Tell whether a bound value is a layer that can be quantized: one with constant weights."""
    operator = ops.of(value)
    return operator is not None and operator.quantizes and ops.layer(value) is not None


def why_not(value: Call) -> str:
    """Return why a layer is none that can be quantized."""
    operator = ops.of(value)
    if operator is None or not operator.quantizes:
        return f"{op_name(value)} has no integer form"
    if not isinstance(value.args[1], GenericConst):
        return "its weights are not constant"
    return "its input is constant" if isinstance(value.args[0], GenericConst) else "its weights are no matrix"


def int8_layers(
    func: relax.Function, policy: Policy, origins: Lineage, precisions: Container[Precision] = INTEGER
) -> set[str]:
    """Return the layers of real numbers that a policy gives activations of 8 bits.

    Those are not among them whose operands are integers already; ``precisions`` are those that are looked for.
    """
    asked = {
        binding.var.name
        for binding in bindings(func)
        if ops.is_layer(binding.value)
        and str(binding.value.ty.dtype) == "float32"
        and policy.for_layer(binding.var.name, origins).precision in precisions
    }
    return asked - integer_layers(func)


def integer_layers(func: relax.Function) -> set[str]:
    """Return the layers whose input and weights are dequantized: those of a file that is quantized already."""
    made_by = {binding.var: binding.value for binding in bindings(func)}

    def is_dequantized(value: Value) -> bool:
        call = made_by.get(value)
        while call is not None and (operator := ops.of(call)) is not None and operator.effect == "moves":
            call = made_by.get(call.args[0])
        return op_name(call) == "dequantize"

    def is_integer(value: Value) -> bool:
        operator = ops.of(value)
        if operator is not None and operator.recurs is not None:
            return operator.recurs.already(value)
        return ops.is_layer(value) and all(map(is_dequantized, value.args[:2]))

    return {var.name for var, value in made_by.items() if is_integer(value)}
