"""Weights of 4 bits beside activations of 8."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.channels import Filters
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute
from nnfuze_tvm.graph.evaluate import kernels_of
from nnfuze_tvm.graph.inferences import Inferences
from nnfuze_tvm.graph.ir import lineage, static_shape
from nnfuze_tvm.passes.compress.calibration import batches, load_calibration, spread
from nnfuze_tvm.passes.compress.equalize.equalize import Equalize
from nnfuze_tvm.passes.compress.method import Inputs, Method
from nnfuze_tvm.passes.compress.plan import Plan, layer_of
from nnfuze_tvm.passes.compress.quantizable import W4A8, int8_layers
from nnfuze_tvm.passes.compress.rounding import best_scales, nearest, rounded, towards

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

LEVELS = 7
# So many inferences are looked at, fewer where they would be more multiply-accumulates in all; of each layer so many
# rows for each weight of a channel, and so many more.
_MOST, _LEAST, _MACS = 128, 4, 2e11
_ROWS, _MORE_ROWS = 4, 4096


@module_pass(opt_level=0, name="FourBits")
class FourBits:
    """Round the weights of the layers that a policy gives 4 bits for weights and 8 for activations.

    They become constants behind a ``dequantize``: symmetric codes in [-7, 7], a scale per output channel. What the
    layers read stays float here; ``InsertQDQ`` quantizes it, and keeps these codes.

    Layer by layer, each behind those that are rounded already: its weights are fitted to what it gave in the float
    network, and rounded so that its sums, not its weights, are off by little on the samples (`rounding`).

    Parameters
    ----------
    calibration : path or mapping
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    policy : Policy
        Which layers get 4 bits.
    """

    def __init__(self, calibration: str | Mapping[str, np.ndarray], policy: Policy) -> None:
        self.calibration, self.policy = calibration, policy

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions' weights rounded."""
        samples = load_calibration(self.calibration, mod)
        result, origins = mod.clone(), lineage(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                plan = Plan(func, int8_layers(func, self.policy, origins, (W4A8,)))
                if plan.layers:
                    inputs = _inputs(func, samples)
                    result.update_func(gvar, _Rounding(func, plan.layers, inputs, kernels_of(mod)).function())
        return result


def _inputs(func: relax.Function, samples: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    found = list(batches(samples, func.params))
    macs = sum(ops.macs(b.value) for b in bindings(func))
    return spread(found, max(_LEAST, min(_MOST, int(_MACS / max(1, 2 * macs)))))


@dataclass
class _Rounding:
    """Walks a function as it was and as it becomes, and rounds layer by layer."""

    func: relax.Function
    layers: Mapping[Var, Call]
    inputs: Sequence[Mapping[str, np.ndarray]]
    library: tvm.runtime.Module | None

    def function(self) -> relax.Function:
        """Return the function with rounded weights."""
        exact, own = (Inferences(self.func, self.inputs, self.library) for _ in range(2))
        emitter, new = Emitter(), dict[Value, Value]()
        rng = np.random.default_rng(0)
        for binding in bindings(self.func):
            var, value = binding.var, binding.value
            call = substitute(value, new)
            if var in self.layers:
                codes, scale, axis = _codes(value, exact, own, rng)
                real = (codes * np.expand_dims(scale, [k for k in range(codes.ndim) if k != axis])).astype("float32")
                value = _with_weight(value, constant(real))
                zero = constant(np.zeros(len(scale), "int8"))
                weight = op.dequantize(constant(codes, "int8"), constant(scale), zero, axis=axis, out_dtype="float32")
                call = _with_weight(call, emitter.emit(weight))
            exact.compute(var, binding.value)
            own.compute(var, value)
            new[var] = emitter.emit(call, var.name)
        outputs = [substitute(out, new) for out in output_fields(self.func)]
        return emitter.finish(self.func.params, outputs, self.func.attrs)


def _with_weight(call: Call, weight: Value) -> Call:
    return Call(call.op, [call.args[0], weight, *call.args[2:]], call.attrs, call.ty_args, call.span, call.ty)


def _codes(
    call: Call, exact: Inferences, own: Inferences, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray, int]:
    """Return the codes of a layer's weights, a scale per index of an axis, and that axis."""
    filters: Filters = layer_of(call).filters
    common = filters.unpack(array(call.args[1]).astype("float64"))
    groups, outputs = common.shape[:2]
    weight = common.reshape(groups, outputs, -1)
    seen = _seen(call, exact, own, rng, weight.shape)
    power = np.ones((groups, weight.shape[2]))
    if seen is not None:
        gram, cross = seen
        weight = np.stack([towards(*each) for each in zip(weight, gram, cross, strict=True)])
        power = np.diagonal(gram, axis1=1, axis2=2)
    if filters.transposed:
        # The groups share what is one index of the weights.
        side_by_side = weight.swapaxes(0, 1).reshape(outputs, -1)
        scale = np.tile(best_scales(side_by_side, power.reshape(1, -1), LEVELS), (groups, 1))
    else:
        scale = np.stack([best_scales(w, p, LEVELS) for w, p in zip(weight, power, strict=True)])
    if seen is None:
        codes = nearest(weight, scale[..., None], LEVELS)
    else:
        codes = np.stack([rounded(*each, LEVELS) for each in zip(weight, seen[0], scale[..., None], strict=True)])
    scales = scale[0] if filters.transposed else scale.ravel()
    return filters.pack(codes.reshape(common.shape)).astype("int8"), scales, filters.outer


def _seen(
    call: Call, exact: Inferences, own: Inferences, rng: np.random.Generator, shape: tuple[int, ...]
) -> tuple[np.ndarray, np.ndarray] | None:
    """Return the sums of products of a layer's inputs as they became with each other, and of what they were with them.

    Both are ``[groups, n, n]``. None of a layer that can't say what it multiplies.
    """
    operator = ops.of(call)
    if operator is None or operator.rows is None:
        return None
    groups, outputs, size = shape
    everywhere = math.prod(static_shape(call)) // (groups * outputs)
    each = max(1, min(everywhere, -(-(_ROWS * size + _MORE_ROWS) // len(own.known))))
    gram, cross = np.zeros((2, groups, size, size))
    for before, after in zip(exact.known, own.known, strict=True):
        places = np.sort(rng.permutation(everywhere)[:each])
        was, became = (operator.rows(call, known[call.args[0]], places).astype("float64") for known in (before, after))
        gram += became.swapaxes(1, 2) @ became
        cross += was.swapaxes(1, 2) @ became
    return gram, cross


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    assert inputs.samples is not None
    return [Equalize(inputs.samples, inputs.policy, inputs.executor), FourBits(inputs.samples, inputs.policy)]


METHOD = Method(
    name="w4a8",
    activity="rounding weights to 4 bits",
    passes=_passes,
    precision=W4A8,
    remark="(weights of 4 bits)",
    samples="4 bits",
    # Integers follow, behind which both are trained.
    training=None,
)
