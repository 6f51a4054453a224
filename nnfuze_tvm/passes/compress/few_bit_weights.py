"""Weights of 4 or 8 bits beside activations of float32: dense layers that are read from memory once and used once."""

from __future__ import annotations

from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute
from nnfuze_tvm.graph.ir import float_layers, lineage, static_shape, with_float_layers
from nnfuze_tvm.graph.packed_weights import IN_WORD
from nnfuze_tvm.passes.compress.free_weights import with_free_weights
from nnfuze_tvm.passes.compress.method import Method, Precision, Training
from nnfuze_tvm.passes.compress.rounding import best_scales, nearest

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

W4, W8 = Precision(4, 32, "int"), Precision(8, 32, "int")
# Inputs that share a scale: half a bit more for each weight.
_BLOCK = 64
# Of fewer, a scale is too many bytes; all inputs share one where their number has no such divisor.
_LEAST_BLOCK = 16


@module_pass(opt_level=0, name="FewBitWeights")
class FewBitWeights:
    """Round the weights of the dense layers that a policy gives 4 or 8 bits for weights and 32 for activations.

    They become constants behind a ``dequantize``: symmetric codes, a scale per output and block of 64 inputs, the one
    with the least squared error. `WeightOnly` makes kernels that read the codes. Layers of other kinds stay float32;
    the module attribute ``nnfuze.float_layers`` says so.

    Parameters
    ----------
    policy : Policy
        Which layers get how many bits.
    precision : Precision
        `W4` or `W8`: those that this pass looks for.
    """

    def __init__(self, policy: Policy, precision: Precision) -> None:
        self.policy, self.precision = policy, precision

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions' weights rounded."""
        result, origins, left = mod.clone(), lineage(mod), dict[str, str]()
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            emitter, values = Emitter(), dict[Value, Value]()
            for binding in bindings(func):
                value, name = substitute(binding.value, values), binding.var.name
                if ops.is_layer(value) and self.policy.for_layer(name, origins).precision == self.precision:
                    if _is_dense(value):
                        value = _rounded(value, 2 ** (self.precision.weights - 1) - 1, emitter)
                    elif isinstance(value.args[1], GenericConst):
                        left[name] = "only dense layers have a form with weights alone of few bits"
                values[binding.var] = emitter.emit(value, name)
            outputs = [substitute(out, values) for out in output_fields(func)]
            result.update_func(gvar, emitter.finish(func.params, outputs, func.attrs))
        return with_float_layers(result, {**float_layers(mod), **left}) if left else result


def _is_dense(value: Call) -> bool:
    """Tell whether a layer is a product with a matrix of finite numbers."""
    if op_name(value) != "matmul" or not isinstance(value.args[1], GenericConst):
        return False
    whole = len(static_shape(value.args[1])) == 2 and {str(arg.ty.dtype) for arg in value.args} == {"float32"}
    return whole and bool(np.isfinite(array(value.args[1])).all())


def _rounded(call: Call, levels: int, emitter: Emitter) -> Call:
    """Return a product with a matrix ``[inputs, outputs]`` of codes up to ``levels``."""
    matrix = array(call.args[1]).T
    block = gcd(matrix.shape[1], _BLOCK)
    if block < _LEAST_BLOCK or block % IN_WORD:
        block = matrix.shape[1]
    rows = np.ascontiguousarray(matrix).reshape(-1, block)
    scale = best_scales(rows, np.ones(1, "float32"), levels)
    codes = constant(nearest(rows, scale[:, None], levels).astype("int8"))
    zero = constant(np.zeros(len(rows), "int8"))
    real = emitter.emit(op.dequantize(codes, constant(scale), zero, axis=0, out_dtype="float32"))
    weights = emitter.emit(op.permute_dims(emitter.emit(op.reshape(real, matrix.shape))))
    return Call(call.op, [call.args[0], weights], call.attrs, call.ty_args, call.span)


def _method(precision: Precision, remark: str) -> Method:
    return Method(
        name=f"w{precision.weights}",
        activity=f"rounding weights to {precision.weights} bits",
        passes=lambda inputs: [FewBitWeights(inputs.policy, precision)],
        precision=precision,
        remark=remark,
        training=Training(with_free_weights, rate=0.1),
    )


METHODS = (_method(W4, "(weights alone)"), _method(W8, "(the same)"))
