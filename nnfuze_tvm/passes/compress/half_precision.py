"""Layers that compute in float16."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, operands, output_fields, substitute
from nnfuze_tvm.graph.ir import lineage
from nnfuze_tvm.passes.compress.method import Features, Method, Precision
from nnfuze_tvm.passes.compress.stored_weights import with_constants

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

FLOAT16 = Precision(16, 16, "float")
_LARGEST = 65504.0


@module_pass(opt_level=0, name="HalfPrecision")
class HalfPrecision:
    """Compute the layers that a policy gives 16 bits in float16.

    Their weights become float16 constants. What lies between such layers (activations, residual adds, maxima,
    moves) follows them; averages, softmax and every function that is not linear piece by piece stay float32, and so
    do the inputs and outputs of the network. A layer whose weights exceed float16's range stays float32, too.

    Parameters
    ----------
    policy : Policy
        Which layers get 16 bits.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions rewritten."""
        result = mod.clone()
        origins = lineage(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                names = {b.var.name for b in bindings(func) if _computes_in_half(b.value) and ops.is_layer(b.value)}
                chosen = {name for name in names if self.policy.for_layer(name, origins).precision == FLOAT16}
                if chosen:
                    # Codes of weights would be cast at every call, by kernels that can't have them packed.
                    result.update_func(gvar, _rewrite(with_constants(func, chosen)[0], chosen))
        return result


def _rewrite(func: relax.Function, chosen: set[str]) -> relax.Function:
    emitter = Emitter()
    values: dict[Value, Value] = {}
    # The float16 value behind a float32 one, where there is one; its cast is dead unless float32 is asked for.
    halves: dict[Value, Value] = {}

    def half(value: Value) -> Value:
        if isinstance(value, GenericConst):
            return relax.const(array(value).astype("float16")) if _is_float(value) else value
        if value not in halves:
            halves[value] = emitter.emit(op.astype(value, "float16"))
        return halves[value]

    def follows(value: Value) -> bool:
        if not _computes_in_half(value) or ops.is_layer(value) or not _is_float(value):
            return False
        data = [leaf for leaf in operands(value) if _is_float(leaf)]
        return all(leaf in halves or _fits(leaf) for leaf in data) and any(leaf in halves for leaf in data)

    for binding in bindings(func):
        value = substitute(binding.value, values)
        name = binding.var.name
        is_layer = name in chosen and ops.is_layer(value) and all(map(_may_be_half, value.args))
        if not is_layer and not follows(value):
            values[binding.var] = emitter.emit(value, name)
            continue
        args = [_with(arg, half) for arg in value.args]
        narrow = emitter.emit(Call(value.op, args, value.attrs, value.ty_args), name)
        wide = emitter.emit(op.astype(narrow, "float32"))
        values[binding.var] = wide
        halves[wide] = narrow
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _computes_in_half(value: Value) -> bool:
    operator = ops.of(value)
    return operator is not None and operator.half


def _with(arg: Value, half: Callable[[Value], Value]) -> Value:
    if isinstance(arg, relax.Tuple):
        return relax.Tuple([_with(field, half) for field in arg.fields])
    return half(arg) if _is_float(arg) else arg


def _is_float(value: Value) -> bool:
    return isinstance(value.ty, relax.TensorType) and str(value.ty.dtype.dtype) == "float32"


def _fits(value: Value) -> bool:
    """Tell whether a value is a constant that float16 can hold."""
    return isinstance(value, GenericConst) and bool((abs(array(value)) <= _LARGEST).all())


def _may_be_half(arg: Value) -> bool:
    return _is_float(arg) and (not isinstance(arg, GenericConst) or _fits(arg))


METHOD = Method(
    name="fp16",
    activity="converting to float16",
    passes=lambda inputs: [HalfPrecision(inputs.policy)],
    precision=FLOAT16,
    remark="where the CPU computes in it",
    features=Features(
        frozenset({"fullfp16", "avx512fp16"}),
        "this CPU doesn't compute in float16 (Cortex-A76 and later do), so 16 bits are slower than 32; take int8 or "
        "float32",
    ),
    # Eleven bits round less than a step of training changes.
    training=None,
)
