"""x · (1 + erf(x / √2)) / 2, written out in elementary operators, becomes one operator."""

from __future__ import annotations

import math
from collections.abc import Mapping

import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute

Bound = Mapping[Value, Value]


@module_pass(opt_level=0, name="FuseGelu")
class FuseGelu:
    """Recognize the activation function GELU in the operators that ONNX files below opset 20 write it in.

    As one operator it costs no division and is quantized as one function: its inner products need no 8-bit codes
    of their own.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions rewritten."""
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                mod.update_func(gvar, _rewrite(func))
        return mod


def _rewrite(func: relax.Function) -> relax.Function:
    bound = {binding.var: binding.value for binding in bindings(func)}
    emitter = Emitter()
    values: dict[Value, Value] = {}
    for var, value in bound.items():
        argument = _argument(var, bound)
        new = substitute(value, values) if argument is None else relax.op.nn.gelu(values.get(argument, argument))
        values[var] = emitter.emit(new, var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _argument(var: Value, bound: Bound) -> Value | None:
    """Return the x whose GELU a Var holds, if it holds one."""
    for gate in _factors(var, bound)[1]:
        erf = _erf_plus_one(gate, bound)
        if erf is None:
            continue
        scale, rest = _scaled(bound.get(erf.args[0], erf.args[0]))
        half, factors = _factors(var, bound, (rest, gate))
        if _close(scale, math.sqrt(0.5)) and _close(half, 0.5) and len(factors) == 2:
            if {*factors} == {rest, gate}:
                return rest
    return None


def _erf_plus_one(var: Value, bound: Bound) -> Value | None:
    """Return the call of erf behind ``erf(…) + 1``."""
    add = bound.get(var, var)
    if op_name(add) != "add":
        return None
    for one, other in (add.args, add.args[::-1]):
        if _scalar(one) == 1.0 and op_name(bound.get(other, other)) == "erf":
            return bound[other]
    return None


def _scaled(value: Value) -> tuple[float, Value]:
    """Return a product or quotient as a constant and what it scales; a constant of 0 where it is neither."""
    if op_name(value) == "multiply":
        for constant, other in (value.args, value.args[::-1]):
            if (factor := _scalar(constant)) is not None:
                return factor, other
    if op_name(value) == "divide" and (divisor := _scalar(value.args[1])):
        return 1 / divisor, value.args[0]
    return 0.0, None


def _factors(var: Value, bound: Bound, stop: tuple[Value, ...] = ()) -> tuple[float, list[Value]]:
    """Return a product of products as one constant and its other factors; those in ``stop`` are left whole."""
    value = bound.get(var, var)
    if var not in stop:
        scale, rest = _scaled(value)
        if rest is not None:
            inner, factors = _factors(rest, bound, stop)
            return scale * inner, factors
        if op_name(value) == "multiply":
            parts = [_factors(arg, bound, stop) for arg in value.args]
            return math.prod(scale for scale, _ in parts), [leaf for _, leaves in parts for leaf in leaves]
    return 1.0, [var]


def _scalar(expr: Value) -> float | None:
    return float(array(expr).flat[0]) if isinstance(expr, GenericConst) and array(expr).size == 1 else None


def _close(a: float, b: float) -> bool:
    return math.isclose(a, b, rel_tol=1e-6)
