"""Weights of 4 or 8 bits beside activations of float32: dense layers that are read from memory once and used once."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from math import gcd
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import float_layers, lineage, static_shape, with_float_layers
from nnfuze_tvm.graph.packed_weights import IN_WORD
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.compress.free_weights import with_free_weights
from nnfuze_tvm.passes.compress.method import Method, Precision, Training
from nnfuze_tvm.passes.compress.moments import moments
from nnfuze_tvm.passes.compress.rounding import best_scales, nearest, rounded

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
    with the least squared error; with samples, the least one of what the layer gives, and codes that make up for each
    other's errors (`rounding.rounded`). `WeightOnly` makes kernels that read the codes. Layers of other kinds stay
    float32; the module attribute ``nnfuze.float_layers`` says so.

    Parameters
    ----------
    policy : Policy
        Which layers get how many bits.
    precision : Precision
        `W4` or `W8`: those that this pass looks for.
    calibration : path or mapping, optional
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    executor : callable
        Runs the float network; by default with NumPy.
    """

    def __init__(
        self,
        policy: Policy,
        precision: Precision,
        calibration: str | os.PathLike[str] | Mapping[str, np.ndarray] | None = None,
        executor: Executor = evaluate.executor,
    ) -> None:
        self.policy, self.precision, self.calibration, self.executor = policy, precision, calibration, executor

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions' weights rounded."""
        samples = None if self.calibration is None else load_calibration(self.calibration, mod)
        result, origins, left = mod.clone(), lineage(mod), dict[str, str]()
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            asked = {
                b.var: b.value
                for b in bindings(func)
                if ops.is_layer(b.value) and self.policy.for_layer(b.var.name, origins).precision == self.precision
            }
            dense = {var: call for var, call in asked.items() if _is_dense(call)}
            said = "only dense layers have a form with weights alone of few bits"
            left |= {
                var.name: said
                for var, call in asked.items()
                if var not in dense and isinstance(call.args[1], GenericConst)
            }
            seen = {} if samples is None else _inputs(mod, func, dense.values(), samples, self.executor)
            emitter, values = Emitter(), dict[Value, Value]()
            for binding in bindings(func):
                value = substitute(binding.value, values)
                if binding.var in dense:
                    products = seen.get(binding.value.args[0])
                    value = _rounded(value, 2 ** (self.precision.weights - 1) - 1, products, emitter)
                values[binding.var] = emitter.emit(value, binding.var.name)
            outputs = [substitute(out, values) for out in output_fields(func)]
            result.update_func(gvar, emitter.finish(func.params, outputs, func.attrs))
        return with_float_layers(result, {**float_layers(mod), **left}) if left else result


def _inputs(
    mod: tvm.IRModule,
    func: relax.Function,
    layers: Iterable[Call],
    samples: Mapping[str, np.ndarray],
    executor: Executor,
) -> dict[Var, np.ndarray]:
    """Return the sums of products of what dense layers take, ``[inputs, inputs]``."""
    data = [call.args[0] for call in layers if isinstance(call.args[0], Var)]
    found = moments(mod, func, {var: len(static_shape(var)) - 1 for var in data}, samples, executor)
    return {var: total for var, (total, _) in found.items()}


def _is_dense(value: Call) -> bool:
    """Tell whether a layer is a product with a matrix of finite numbers."""
    if op_name(value) != "matmul" or not isinstance(value.args[1], GenericConst):
        return False
    whole = len(static_shape(value.args[1])) == 2 and {str(arg.ty.dtype) for arg in value.args} == {"float32"}
    return whole and bool(np.isfinite(array(value.args[1])).all())


def _rounded(call: Call, levels: int, products: np.ndarray | None, emitter: Emitter) -> Call:
    """Return a product with a matrix ``[inputs, outputs]`` of codes up to ``levels``."""
    matrix = np.ascontiguousarray(array(call.args[1]).T)
    outputs, inputs = matrix.shape
    block = gcd(inputs, _BLOCK)
    if block < _LEAST_BLOCK or block % IN_WORD:
        block = inputs
    rows = matrix.reshape(-1, block)
    power = np.ones((1, inputs)) if products is None else np.diag(products)[None]
    scale = best_scales(rows, np.tile(power.reshape(-1, block), (outputs, 1)), levels)
    if products is None:
        codes = nearest(rows, scale[:, None], levels)
    else:
        codes = rounded(matrix, products, np.repeat(scale, block).reshape(matrix.shape), levels).reshape(rows.shape)
    zero = constant(np.zeros(len(rows), "int8"))
    whole = constant(codes.astype("int8"))
    real = emitter.emit(op.dequantize(whole, constant(scale), zero, axis=0, out_dtype="float32"))
    weights = emitter.emit(op.permute_dims(emitter.emit(op.reshape(real, matrix.shape))))
    return Call(call.op, [call.args[0], weights], call.attrs, call.ty_args, call.span)


def _method(precision: Precision, remark: str) -> Method:
    return Method(
        name=f"w{precision.weights}",
        activity=f"rounding weights to {precision.weights} bits",
        passes=lambda inputs: [FewBitWeights(inputs.policy, precision, inputs.samples, inputs.executor)],
        precision=precision,
        remark=remark,
        training=Training(with_free_weights, rate=0.1),
    )


METHODS = (_method(W4, "(weights alone)"), _method(W8, "(the same)"))
