"""Post-training quantization: writes quantize/dequantize into a float graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import Lineage, lineage, static_shape, with_float_layers
from nnfuze_tvm.passes.compress.calibration import (
    CALIBRATION_METHODS,
    CalibrationMethod,
    Range,
    collect_ranges,
    load_calibration,
)
from nnfuze_tvm.passes.compress.lone_sums import without_lone_sums
from nnfuze_tvm.passes.compress.method import Inputs, Method, Option, Precision
from nnfuze_tvm.passes.compress.quantizable import integer_layers, quantizable, why_not
from nnfuze_tvm.passes.compress.states import quantize_states
from nnfuze_tvm.passes.compress.stored_weights import Stored, with_constants

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy

# What is computed from codes and gives codes: values are moved, put side by side, or averaged.
_NARROW = ("moves", "joins", "averages")

INT8 = Precision(8, 8, "int")
_LEVELS = 127
# A bias is at most this large in units of the accumulator, and the scales of one layer differ at most so
# much: the scale of a channel that is almost off is raised, which nobody can see at its output.
_LARGEST_BIAS = 2**29
_SCALE_SPREAD = 2**14


@module_pass(opt_level=0, name="InsertQDQ")
class InsertQDQ:
    """Quantize the layers that a policy gives 8 bits for weights and activations.

    Weights become symmetric int8 constants per output channel, activations symmetric int8 per tensor; both
    keep float semantics through a dequantize, so that the module still runs as it is and simulates what
    ``RealizeInteger`` makes of it. Adds, concatenations, poolings and averages between quantized layers are quantized
    too. A layer's sums are quantized behind its bias, activation and residual. What a network returns stays float32.

    Parameters
    ----------
    calibration : path or mapping
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    policy : Policy
        Which layers get 8 bits.
    method : {"minmax", "percentile", "mse"}
        How the range of an activation follows from its samples: all of it, 99.99 % of its absolute values, or
        the range with the least mean squared error.
    bias_correction : bool
        Subtract from each bias the mean error that the rounded weights cause on the samples (Nagel et al.,
        "Data-Free Quantization Through Weight Equalization and Bias Correction", 2019).
    executor : callable
        Runs the float network; by default with NumPy.

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
        bias_correction: bool = False,
        executor: Executor = evaluate.executor,
    ) -> None:
        if method not in CALIBRATION_METHODS:
            known = ", ".join(CALIBRATION_METHODS)
            raise InputError(f"calibration method {method!r} is unknown; choose one of: {known}")
        self.calibration, self.policy, self.method = calibration, policy, method
        self.bias_correction, self.executor = bias_correction, executor

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions quantized."""
        samples = load_calibration(self.calibration, mod)
        result = mod.clone()
        origins, left = lineage(mod), dict[str, str]()
        for gvar, func in mod.functions_items():
            if not isinstance(func, relax.Function):
                continue
            asked = {b.var.name for b in bindings(func) if self._asks_for(b, origins)} - integer_layers(func)
            func, stored = with_constants(func, asked)
            func, asked = quantize_states(mod, func, asked, stored, samples, self.method, self.executor)
            plan = _Plan(func, asked)
            left |= {var.name: why_not(value) for var, value in plan.made_by.items() if var.name in asked - plan.names}
            if plan.layers:
                ranges = collect_ranges(mod, func, plan.observed(), samples, self.executor)
                func = _Writer(plan, ranges, stored, self.method, self.bias_correction).rewrite(func)
            result.update_func(gvar, func)
        return with_float_layers(result, left) if left else result

    def _asks_for(self, binding: relax.VarBinding, origins: Lineage) -> bool:
        """Return whether a binding is a layer of real numbers that gets 8 bits."""
        if not ops.is_layer(binding.value) or str(binding.value.ty.dtype) != "float32":
            return False
        return self.policy.for_layer(binding.var.name, origins).precision == INT8


def _layer(call: Call) -> ops.Layer:
    found = ops.layer(call)
    assert found is not None
    return found


def _effect(value: Value | None) -> str:
    return "" if value is None else ops.effect_of(value)


def _follows(value: Value) -> bool:
    """Tell whether an operator's result is made of 8 bits where all that it reads is."""
    operator = ops.of(value)
    return operator is not None and (_effect(value) in _NARROW or operator.bounds or op_name(value) == "add")


@dataclass
class _Plan:
    """Decides which tensors of a function become 8 bits, without looking at any numbers.

    Attributes
    ----------
    layers
        The calls of the layers that become integer.
    points
        Tensors that get a quantize and a dequantize, each with the representative of those it shares its
        scale with.
    """

    func: relax.Function
    names: set[str]
    layers: dict[Var, Call] = field(default_factory=dict)
    points: dict[Value, Value] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.made_by = {b.var: b.value for b in bindings(self.func)}
        self.order = {var: k for k, var in enumerate(self.made_by)}
        self.readers: dict[Value, list[Var]] = {}
        for var, value in self.made_by.items():
            for leaf in operands(value):
                self.readers.setdefault(leaf, []).append(var)
        self.outputs = {leaf for out in output_fields(self.func) for leaf in operands(out)}
        self.layers = {
            var: value for var, value in self.made_by.items() if var.name in self.names and quantizable(value)
        }
        self.names = {var.name for var in self.layers}
        self._same: dict[Value, Value] = {}
        integer = without_lone_sums(self._integer(), self.made_by, self.readers)
        for var in self.made_by:
            if var in integer:
                self._demand(var, self.made_by[var])
        self.points = {tensor: self._representative(tensor) for tensor in self.points}

    def observed(self) -> dict[Value, int]:
        """Return the tensors whose ranges are needed, each with its channel axis."""
        wanted = dict.fromkeys(self.points, 0)
        for call in self.layers.values():
            wanted[call.args[0]] = _layer(call).data
        return wanted

    def bias(self, layer: Var) -> tuple[Var, GenericConst] | None:
        """Return the add behind a layer and its constant, if the layer has a bias."""
        readers = self.readers.get(layer, [])
        if len(readers) == 1 and layer not in self.outputs and op_name(self.made_by[readers[0]]) == "add":
            for arg in self.made_by[readers[0]].args:
                if isinstance(arg, GenericConst):
                    return readers[0], arg
        return None

    def _integer(self) -> set[Value]:
        """Return the Vars that are computed from 8-bit tensors."""
        found: set[Value] = set()
        for var, value in self.made_by.items():
            name = op_name(value)
            tensors = [leaf for leaf in operands(value) if isinstance(leaf, Var)]
            known = [leaf in found for leaf in tensors]
            if (
                var in self.layers
                or (_follows(value) and known and all(known))
                or (isinstance(value, relax.TupleGetItem) and all(known))
                or (name == "multiply" and len(tensors) == 2 and any(known) and all(map(static_shape, tensors)))
                or (name == "multiply" and len(tensors) == 1 and all(known))
            ):
                found.add(var)
        return found

    def _demand(self, var: Var, value: Value) -> None:
        """Note what an integer operator wants of its operands."""
        name = op_name(value)
        tensors = [leaf for leaf in operands(value) if isinstance(leaf, Var)]
        if var in self.layers or _effect(value) == "averages":
            self._quantize(tensors[0])
        elif _effect(value) == "joins":
            for tensor in tensors:
                self._quantize(tensor)
                self._join(self._source(tensors[0]), self._source(tensor))
        elif name in ("add", "multiply") and len(tensors) == 2:
            summed = self._summed(tensors) if name == "add" else None
            for tensor in tensors:
                if summed is None or not tensor.same_as(summed):
                    self._quantize(tensor)

    def _summed(self, tensors: list[Value]) -> Value | None:
        """Return the operand of an add that stays a sum in int32, because a layer makes it for this add only.

        Of two such layers it is the first: kernels are fused in this order, so the add joins that one.
        """
        own = [tensor for tensor in tensors if len(self.readers[tensor]) == 1 and self._is_sum(tensor)]
        return min(own, key=lambda tensor: self.order[tensor]) if own else None

    def _is_sum(self, tensor: Value) -> bool:
        if tensor in self.outputs:
            return False
        if tensor in self.layers:
            return True
        value = self.made_by.get(tensor)
        leaves = [leaf for leaf in operands(value) if isinstance(leaf, Var)] if value is not None else []
        return (
            op_name(value) == "add"
            and len(leaves) == 1
            and self.readers[leaves[0]] == [tensor]
            and self._is_sum(leaves[0])
        )

    def _source(self, tensor: Value) -> Value:
        """Return the tensor whose numbers these are, before they were moved about."""
        value = self.made_by.get(tensor)
        while _effect(value) in ("moves", "joins") or self._is_piece(value):
            tensor = next(leaf for leaf in operands(value) if isinstance(leaf, Var))
            value = self.made_by.get(tensor)
        return tensor

    def _is_piece(self, value: Value | None) -> bool:
        """Tell whether a value is one of the parts that something was split into."""
        return isinstance(value, relax.TupleGetItem) and _effect(self.made_by.get(value.tuple_value)) == "moves"

    def _quantize(self, tensor: Value) -> None:
        """Make a tensor 8 bits: at its source, and for a concatenation at all of its sources."""
        value = self.made_by.get(tensor)
        if _effect(value) == "joins":
            leaves = [leaf for leaf in operands(value) if isinstance(leaf, Var)]
            for leaf in leaves:
                self._quantize(leaf)
                self._join(self._source(leaves[0]), self._source(leaf))
        elif _effect(value) == "moves" or self._is_piece(value):
            self._quantize(next(leaf for leaf in operands(value) if isinstance(leaf, Var)))
        else:
            self.points.setdefault(tensor, tensor)

    def _representative(self, tensor: Value) -> Value:
        while tensor in self._same:
            tensor = self._same[tensor]
        return tensor

    def _join(self, first: Value, second: Value) -> None:
        first, second = self._representative(first), self._representative(second)
        if not first.same_as(second):
            self._same[second] = first


class _Writer:
    """Writes a plan into its function."""

    def __init__(
        self,
        plan: _Plan,
        ranges: Mapping[Value, Range],
        stored: Mapping[str, Stored],
        method: CalibrationMethod,
        correct: bool,
    ) -> None:
        self.plan, self.ranges, self.stored, self.correct = plan, ranges, stored, correct
        limits: dict[Value, float] = {}
        for tensor, key in plan.points.items():
            limits[key] = max(limits.get(key, 0.0), ranges[tensor].limit(method))
        self.scales = {tensor: float(np.float32((limits[key] or 1.0) / _LEVELS)) for tensor, key in plan.points.items()}
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}
        self.biases: dict[Var, tuple[GenericConst, GenericConst]] = {}

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
                    old, bias = self.biases[binding.var]
                    args = [bias if arg.same_as(old) else arg for arg in value.args]
                    value = Call(value.op, args, value.attrs, value.ty_args, value.span)
                # A float operator reads the caller's own numbers; of an inner one only the 8 bits are kept.
                wide = _effect(value) not in _NARROW and op_name(value) not in ("add", "multiply")
                reads = {k: v for k, v in quantized.items() if not (wide and k in func.params)}
                new = self.emitter.emit(substitute(value, {**self.values, **reads}), binding.var.name)
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
        weight, where = array(call.args[1]).astype("float64"), _layer(call)
        filters, source, bias = where.filters, self.plan._source(call.args[0]), self.plan.bias(layer)
        # One scale per index of the weights' output axis: of a transposed convolution, the groups share them.
        count = weight.shape[filters.outer]
        rows = np.moveaxis(weight, filters.outer, 0).reshape(count, -1)
        outputs = count * filters.groups if filters.transposed else count
        offsets = np.zeros(outputs)
        if bias is not None and array(bias[1]).size in (1, outputs):
            offsets = offsets + array(bias[1]).astype("float64").ravel()
        kept = self.stored[layer.name].per_row(filters.outer) if layer.name in self.stored else None
        scale = self._weight_scale(rows, np.abs(offsets).reshape(-1, count).max(0), source) if kept is None else kept[1]
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
        error = self._mean_error(call, codes * wide - weight) if self.correct else np.zeros(outputs)
        # The bias as the integers will have it, so that the simulation and they round alike.
        unit = np.tile(scale.astype("float64") * self.scales[source], outputs // count)
        shift = (np.rint((offsets - error) / unit) * unit).astype("float32")
        if bias is not None and array(bias[1]).size == outputs:
            self.biases[bias[0]] = (bias[1], relax.const(shift.reshape(array(bias[1]).shape)))
        elif self.correct and bias is None:
            shape = [outputs if k == where.result else 1 for k in range(len(static_shape(layer)))]
            return self.emitter.emit(op.add(result, relax.const(shift.reshape(shape))))
        return result

    def _weight_scale(self, rows: np.ndarray, offsets: np.ndarray, source: Value) -> np.ndarray:
        """Return the scale of each row of weights, float32, large enough for its bias to fit the sums."""
        scale = np.abs(rows).max(1) / _LEVELS
        scale = np.maximum(scale, max(scale.max(), 1e-30) / _SCALE_SPREAD)
        return np.maximum(scale, offsets / (self.scales[source] * _LARGEST_BIAS)).astype("float32")

    def _mean_error(self, call: Call, difference: np.ndarray) -> np.ndarray:
        """Return the mean error of each output channel for a change of the weights."""
        filters = _layer(call).filters
        common = filters.unpack(difference)
        per_input = common.reshape(*common.shape[:3], -1).sum(3)
        return (per_input * self.ranges[call.args[0]].mean.reshape(filters.groups, 1, -1)).sum(2).ravel()


_CALIBRATION_METHOD = Option(
    name="calibration_method",
    type=CalibrationMethod,
    default="minmax",
    help="Ranges from samples: minmax, percentile or mse.",
)


def _passes(inputs: Inputs) -> list[tvm.transform.Pass]:
    assert inputs.samples is not None
    method = inputs.value(_CALIBRATION_METHOD)
    return [InsertQDQ(inputs.samples, inputs.policy, method=method, executor=inputs.executor)]


METHOD = Method(
    name="int8",
    activity="quantizing",
    passes=_passes,
    precision=INT8,
    options=(_CALIBRATION_METHOD,),
    samples="8 bits",
)
