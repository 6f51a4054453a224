"""Post-training quantization: writes quantize/dequantize into a float graph."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
import tvm
from pydantic import Field
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.contraction import FEW_PRODUCTS, MOST_WEIGHTS, most_of_few
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import lineage, with_float_layers
from nnfuze_tvm.passes.compress.bias_correction import Sums, correct_biases
from nnfuze_tvm.passes.compress.calibration import Range, batches, collect_ranges, load_calibration
from nnfuze_tvm.passes.compress.equalize.equalize import Equalize
from nnfuze_tvm.passes.compress.free_weights import with_free_weights
from nnfuze_tvm.passes.compress.magnitudes import CALIBRATION_METHODS, CalibrationMethod
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, Training
from nnfuze_tvm.passes.compress.plan import Plan, layer_of
from nnfuze_tvm.passes.compress.quantizable import INT8, INTEGER, W4A8, int8_layers
from nnfuze_tvm.passes.compress.states import quantize_states, recurrent_layers
from nnfuze_tvm.passes.compress.stored_weights import Stored, with_constants
from nnfuze_tvm.passes.compress.within_budget import QuantizeWithin

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

_LEVELS = 127
# A layer stays float where the 8 bits of its input are off by more than this part of the input's standard deviation on
# the samples (root mean square): 127 steps reach about a hundred standard deviations then.
_LARGEST_ERROR = 0.25
# A bias is at most this large in units of the accumulator, and the scales of one layer differ at most so
# much: the scale of a channel that is almost off is raised, which nobody can see at its output.
_LARGEST_BIAS = 2**29
_SCALE_SPREAD = 2**14


@dataclass
class Seen:
    """What passes with different policies can share: what they saw of one module on the same samples.

    Attributes
    ----------
    ranges
        By tensor.
    with_states
        By function and the recurrent layers that get 8 bits: the function in which they have them.
    """

    ranges: dict[Value, Range] = field(default_factory=dict)
    with_states: dict[tuple[relax.Function, frozenset[str]], relax.Function] = field(default_factory=dict)


@module_pass(opt_level=0, name="InsertQDQ")
class InsertQDQ:
    """Quantize the layers that a policy gives activations of 8 bits, and weights of 8 or, rounded before, 4.

    Weights become symmetric int8 constants per output channel, activations symmetric int8 per tensor; both
    keep float semantics through a dequantize, so that the module still runs as it is and simulates what
    ``RealizeInteger`` makes of it. Adds, concatenations, poolings and averages between quantized layers are quantized
    too. A layer's sums are quantized behind its bias, activation and residual. What a network returns stays float32.

    Layers stay float where a logarithm, a root or a quotient of their result follows (`delicate.Delicate`), and where
    8 bits of their input would be off by too much on the samples; the module attribute ``nnfuze.float_layers`` says so.

    Parameters
    ----------
    calibration : path or mapping
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    policy : Policy
        Which layers get 8 bits.
    method : {"minmax", "percentile", "mse", "kl", "average"}
        How the range of an activation follows from its samples: all of it, 99.99 % of its absolute values, the range
        with the least mean squared error or the least divergence of distributions (Kullback-Leibler), or the mean of
        the samples' largest values. Percentile, mse and kl leave samples out whose largest value is more than a
        hundred times the usual.
    bias_correction : bool
        Change biases so that the sums of each layer have the means that they have in the float network on the samples
        (`bias_correction.correct_biases`).
    executor : callable
        Runs the float network; by default with NumPy.
    seen : Seen, optional
        What other passes over the same module and samples saw, and what this one sees.

    Raises
    ------
    InputError
        If the samples do not fit the network, or the method is unknown.
    """

    def __init__(
        self,
        calibration: str | Mapping[str, np.ndarray],
        policy: Policy,
        method: CalibrationMethod = "minmax",
        bias_correction: bool = True,
        executor: Executor = evaluate.executor,
        seen: Seen | None = None,
    ) -> None:
        if method not in CALIBRATION_METHODS:
            known = ", ".join(CALIBRATION_METHODS)
            raise InputError(f"calibration method {method!r} is unknown; choose one of: {known}")
        self.calibration, self.policy, self.method = calibration, policy, method
        self.bias_correction, self.executor = bias_correction, executor
        self.seen = Seen() if seen is None else seen

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions quantized."""
        samples = load_calibration(self.calibration, mod)
        result = mod.clone()
        origins, left = lineage(mod), dict[str, str]()
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            asked = int8_layers(func, self.policy, origins)
            recurrent = recurrent_layers(func) & int8_layers(func, self.policy, origins, (W4A8,))
            left |= dict.fromkeys(recurrent, "a recurrent layer has no form with weights of 4 bits")
            asked -= recurrent
            func, stored = with_constants(func, asked)
            func, asked = self._with_states(mod, func, asked, stored, samples)
            plan, scales = self._planned(mod, func, asked, samples, left)
            if plan.layers:
                writer = _Writer(plan, scales, stored)
                exact, func = func, writer.rewrite(func)
                if self.bias_correction:
                    inferences = list(batches(samples, func.params))
                    func = correct_biases(exact, func, writer.sums, inferences, evaluate.kernels_of(mod))
            result.update_func(gvar, func)
        return with_float_layers(result, left) if left else result

    def _planned(
        self,
        mod: tvm.IRModule,
        func: relax.Function,
        asked: set[str],
        samples: Mapping[str, np.ndarray],
        left: dict[str, str],
    ) -> tuple[Plan, dict[Value, float]]:
        """Return a plan without layers that the samples' 8 bits would spoil, and the scales of its tensors."""
        ranges = self.seen.ranges
        while True:
            plan = Plan(func, asked)
            left |= plan.left
            unseen = {tensor: 0 for tensor in plan.points if tensor not in ranges}
            if unseen:
                ranges |= collect_ranges(mod, func, unseen, samples, self.executor)
            scales = _scales(plan, ranges, self.method)
            sources = {layer.name: plan.source(call.args[0]) for layer, call in plan.layers.items()}
            errors = {name: ranges[source].error(scales[source]) for name, source in sources.items()}
            spoiled = {name: error for name, error in errors.items() if error > _LARGEST_ERROR}
            if not spoiled:
                return plan, scales
            left |= {
                name: f"8 bits of its input are off by {error:.0%} of what it varies by on the samples"
                for name, error in spoiled.items()
            }
            asked = plan.names - spoiled.keys()

    def _with_states(
        self,
        mod: tvm.IRModule,
        func: relax.Function,
        asked: set[str],
        stored: Mapping[str, Stored],
        samples: Mapping[str, np.ndarray],
    ) -> tuple[relax.Function, set[str]]:
        """Return the function with the states of layers in 8 bits, and the names of the other layers."""
        key = func, frozenset(asked & recurrent_layers(func))
        if key not in self.seen.with_states:
            self.seen.with_states[key], _ = quantize_states(
                mod, func, asked, stored, samples, self.method, self.executor
            )
        return self.seen.with_states[key], asked - key[1]


def _scales(plan: Plan, ranges: Mapping[Value, Range], method: CalibrationMethod) -> dict[Value, float]:
    """Return the scale of every tensor that becomes 8 bits."""
    limits: dict[Value, float] = {}
    for tensor, key in plan.points.items():
        limits[key] = max(limits.get(key, 0.0), ranges[tensor].limit(method))
    return {tensor: float(np.float32((limits[key] or 1.0) / _LEVELS)) for tensor, key in plan.points.items()}


class _Writer:
    """Writes a plan into its function."""

    def __init__(
        self,
        plan: Plan,
        scales: Mapping[Value, float],
        stored: Mapping[str, Stored],
    ) -> None:
        self.plan, self.stored, self.scales = plan, stored, scales
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}
        self.biases: dict[Var, tuple[GenericConst, GenericConst, str]] = {}
        self.sums: dict[str, Sums] = {}

    def rewrite(self, func: relax.Function) -> relax.Function:
        """Return the function with quantize and dequantize in it."""
        quantized: dict[Value, Value] = {}
        for param in func.params:
            if param in self.plan.points:
                quantized[param] = self._point(param, param)
        for binding in bindings(func):
            value = binding.value
            if binding.var in self.plan.layers:
                new = self._layer(binding.var, value, quantized)
            else:
                if binding.var in self.biases:
                    old, bias, layer = self.biases[binding.var]
                    args = [bias if arg.same_as(old) else arg for arg in value.args]
                    value = Call(value.op, args, value.attrs, value.ty_args, value.span)
                reads = {k: v for k, v in quantized.items() if self.plan.reads_codes(binding.var, k)}
                new = self.emitter.emit(substitute(value, {**self.values, **reads}), binding.var.name)
                if binding.var in self.biases:
                    self.sums[layer] = replace(self.sums[layer], bias=new.name)
            self.values[binding.var] = new
            if binding.var in self.plan.points:
                quantized[binding.var] = self._point(binding.var, new)
        reads = {k: v for k, v in quantized.items() if k not in func.params}
        outputs = [substitute(out, {**self.values, **reads}) for out in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _point(self, tensor: Value, value: Value) -> Value:
        scale, zero = relax.const(np.float32(self.scales[tensor])), relax.const(np.int8(0))
        codes = self.emitter.emit(op.quantize(value, scale, zero, axis=0, out_dtype="int8"))
        return self.emitter.emit(op.dequantize(codes, scale, zero, axis=0, out_dtype="float32"))

    def _layer(self, layer: Var, call: Call, quantized: Mapping[Value, Value]) -> Value:
        weight, where = array(call.args[1]).astype("float64"), layer_of(call)
        filters, source, bias = where.filters, self.plan.source(call.args[0]), self.plan.bias(layer)
        # One scale per index of the weights' output axis: of a transposed convolution, the groups share them.
        count = weight.shape[filters.outer]
        rows = np.moveaxis(weight, filters.outer, 0).reshape(count, -1)
        outputs = count * filters.groups if filters.transposed else count
        offsets = np.zeros(outputs)
        if bias is not None and array(bias[1]).size in (1, outputs):
            offsets = offsets + array(bias[1]).astype("float64").ravel()
        kept = self.stored[layer.name].per_row(filters.outer) if layer.name in self.stored else None
        if kept is None:
            scale = self._weight_scale(rows, np.abs(offsets).reshape(-1, count).max(0), source)
            scale = _fitting_scale(filters.unpack(weight), scale)
        else:
            scale = kept[1]
        wide = scale.astype("float64").reshape([-1 if k == filters.outer else 1 for k in range(weight.ndim)])
        codes = np.clip(np.rint(weight / wide), -_LEVELS, _LEVELS) if kept is None else kept[0]
        constant = op.dequantize(
            relax.const(codes.astype("int8")),
            relax.const(scale),
            relax.const(np.zeros(count, "int8")),
            axis=filters.outer,
            out_dtype="float32",
        )
        data = {**self.values, **quantized}.get(call.args[0], call.args[0])
        new = Call(call.op, [data, self.emitter.emit(constant)], call.attrs, call.ty_args, call.span)
        result = self.emitter.emit(new, layer.name)
        # The bias as the integers will have it, so that the simulation and they round alike.
        unit = np.tile(scale.astype("float64") * self.scales[source], outputs // count)
        if bias is not None and array(bias[1]).size == outputs:
            rounded = (np.rint(offsets / unit) * unit).astype("float32")
            self.biases[bias[0]] = (bias[1], relax.const(rounded.reshape(array(bias[1]).shape)), result.name)
        if bias is None or bias[0] in self.biases:
            self.sums[result.name] = Sums(where.result, unit, None)
        return result

    def _weight_scale(self, rows: np.ndarray, offsets: np.ndarray, source: Value) -> np.ndarray:
        """Return the scale of each row of weights, float32, large enough for its bias to fit the sums."""
        scale = np.abs(rows).max(1) / _LEVELS
        scale = np.maximum(scale, max(scale.max(), 1e-30) / _SCALE_SPREAD)
        return np.maximum(scale, offsets / (self.scales[source] * _LARGEST_BIAS)).astype("float32")


def _fitting_scale(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Return scales of output channels with which eight products at a time fit in int16, a few percent larger.

    CPUs without dot products add as many there then before they go on in int32, which saves them a sixth (NEON) to a
    quarter (AVX2) of the instructions. Scales are the same for all CPUs, so that results are.

    Parameters
    ----------
    weight : np.ndarray
        Weights in the common form of `Filters`.
    scale : np.ndarray
        float32, one per output channel, such that codes are at most 127.
    """
    groups, outputs, inputs, *_ = weight.shape
    if inputs % FEW_PRODUCTS or scale.size != groups * outputs:
        return scale
    rows = np.moveaxis(weight, 2, -1).reshape(groups * outputs, -1)
    while True:
        over = most_of_few(np.rint(rows / scale.astype("float64")[:, None])) / MOST_WEIGHTS
        if not (over > 1).any():  # nor of weights that are no numbers
            return scale
        scale = (scale * np.fmax(over, 1)).astype("float32")


_CALIBRATION_METHOD = Option(
    name="calibration_method",
    type=CalibrationMethod,
    default="minmax",
    help="Ranges from samples: minmax, percentile, mse, kl or average.",
)


_MAX_ERROR = Option(
    name="max_error",
    type=Annotated[float, Field(gt=0, allow_inf_nan=False)],
    default=0.1,
    help="auto: largest error of an output on the samples, a part of its standard deviation.",
    variant=True,
)


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    samples = inputs.samples
    assert samples is not None
    method = inputs.value(_CALIBRATION_METHOD)

    def quantizer(samples: Mapping[str, np.ndarray], corrects: bool) -> Callable[[Policy], tvm.transform.Pass]:
        return partial(
            InsertQDQ, samples, method=method, bias_correction=corrects, executor=inputs.executor, seen=Seen()
        )

    def equalize(policy: Policy) -> tvm.transform.Pass:
        return Equalize(samples, policy, inputs.executor)

    if inputs.options.get("quantize") != METHOD.variant:
        return [equalize(inputs.policy), quantizer(samples, True)(inputs.policy)]
    limit = inputs.value(_MAX_ERROR)
    return [QuantizeWithin(quantizer, inputs.policy, INT8, samples, limit, inputs.announce, equalize)]


METHOD = Method(
    name="int8",
    activity="quantizing",
    passes=_passes,
    precision=INT8,
    wants=lambda layer: layer.precision in INTEGER,
    options=(_CALIBRATION_METHOD, _MAX_ERROR),
    remark="(auto: where --max-error allows it)",
    variant="auto",
    samples="8 bits",
    training=Training(with_free_weights, rate=0.1),
)
