"""The pass that moves factors between layers, before what they multiply becomes 8 bits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst, Var
from tvm.ir.transform import PassContext, module_pass
from tvm.relax import op

from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.channels import FIXED
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ir import lineage, static_shape
from nnfuze_tvm.passes.compress.calibration import Range, collect_ranges, load_calibration
from nnfuze_tvm.passes.compress.equalize.choose import Choice, Seen, Writer, reader_of
from nnfuze_tvm.passes.compress.equalize.free_factors import FreeFactors, FreeLayer, factor_of, free_factors
from nnfuze_tvm.passes.compress.plan import Plan
from nnfuze_tvm.passes.compress.quantizable import int8_layers

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import Policy


@module_pass(opt_level=0, name="Equalize")
class Equalize:
    """Multiply the channels of tensors that become 8 bits by factors, and divide them out in the layers behind.

    8 bits have one scale per tensor, so a channel whose values are small has few of the codes. The factors come from
    weights and biases of what makes a tensor and go into the weights of the layers that read it; on the way, they pass
    through what is homogeneous: rectifiers, pools, joins, sums of two. Bounds are multiplied, too. In real numbers the
    network computes what it did.

    A tensor that nothing before can scale, such as an input or what a sigmoid gates, is multiplied in front of its
    layers where its channels differ so much that this is worth the time.

    Parameters
    ----------
    calibration : path or mapping
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    policy : Policy
        Which layers get 8 bits.
    executor : callable
        Runs the float network; by default with NumPy.
    """

    def __init__(
        self, calibration: str | Mapping[str, np.ndarray], policy: Policy, executor: Executor = evaluate.executor
    ) -> None:
        self.calibration, self.policy, self.executor = calibration, policy, executor

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with its functions equalized."""
        samples = load_calibration(self.calibration, mod)
        result, origins = mod.clone(), lineage(mod)
        for gvar, func in mod.functions_items():
            if isinstance(func, relax.Function):
                asked = int8_layers(func, self.policy, origins)
                result.update_func(gvar, self._equalized(mod, func, asked, samples))
        return result

    def _equalized(
        self, mod: tvm.IRModule, func: relax.Function, asked: set[str], samples: Mapping[str, np.ndarray]
    ) -> relax.Function:
        prepared = _with_products(func, Plan(func, set(asked)), free_factors(func))
        plan, free = Plan(prepared, set(asked)), free_factors(prepared)
        points = [tensor for tensor in plan.points if _has_factors(free, tensor)]
        if not points:
            return func
        axes = {call.args[0]: free.free[layer].axis for layer, call in plan.layers.items()}
        axes |= {tensor: axis for tensor in points if (axis := free.axis(tensor)) is not None}
        ranges = collect_ranges(mod, prepared, axes, samples, self.executor)
        roots = free.channels.roots()
        classes, numbers = np.unique(roots, return_inverse=True)
        assert classes[0] == FIXED
        factors = _choice(plan, free, ranges, numbers).factors(len(classes))
        if np.all(factors == 1):
            return func
        return _Writer(free, factors[numbers]).rewrite()


def _has_factors(free: FreeFactors, tensor: Value) -> bool:
    return free.axis(tensor) is not None


def _with_products(func: relax.Function, plan: Plan, free: FreeFactors) -> relax.Function:
    """Return the function with products by one in front of layers whose data nothing before can scale."""
    wanted = {tensor for tensor in plan.points if _can_be_multiplied(plan, free, tensor)}
    products: dict[Value, Value] = {}
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        value = binding.value
        new = substitute(value, values)
        if binding.var in plan.layers and plan.source(value.args[0]) in wanted:
            data = value.args[0]
            if data not in products:
                axis = free.free[binding.var].axis
                ones = np.ones([size if n == axis else 1 for n, size in enumerate(static_shape(data))], "float32")
                products[data] = emitter.emit(op.multiply(new.args[0], constant(ones)))
            new = Call(new.op, [products[data], *new.args[1:]], new.attrs, new.ty_args, new.span)
        values[binding.var] = emitter.emit(new, binding.var.name)
    if not products:
        return func
    outputs = [substitute(out, values) for out in output_fields(func)]
    return emitter.finish(func.params, outputs, func.attrs)


def _can_be_multiplied(plan: Plan, free: FreeFactors, tensor: Value) -> bool:
    """Tell whether a tensor is computed in floats, and becomes 8 bits for layers only that all read it alike."""
    value = plan.made_by.get(tensor)
    if (
        _has_factors(free, tensor)
        or plan.points[tensor] is not tensor
        or sum(key.same_as(plan.points[tensor]) for key in plan.points.values()) != 1
    ):
        return False
    if value is not None and (tensor in plan.layers or ops.effect_of(value) not in ("maps", "mixes")):
        return False
    if value is not None and ops.proportional(value):
        return False
    seen, axes = [tensor], set[int]()
    for each in seen:
        for reader in plan.readers.get(each, []):
            if reader in plan.layers:
                axes.add(free.free[reader].axis)
            elif ops.effect_of(plan.made_by[reader]) == "moves":
                seen.append(reader)
    return len(axes) == 1


def _choice(plan: Plan, free: FreeFactors, ranges: Mapping[Value, Range], numbers: np.ndarray) -> Choice:
    """Return what the factors are chosen by."""

    def seen(tensor: Value) -> Seen:
        axis, found = free.axis(tensor), ranges[tensor]
        assert axis is not None
        return Seen(numbers[free.tensor(tensor)[axis]], found.peaks, found.powers, found.mean, found.count)

    keys = list({id(key): key for key in plan.points.values()}.values())
    groups: list[list[Seen]] = [[] for _ in keys]
    place = {key: n for n, key in enumerate(keys)}
    for tensor, key in plan.points.items():
        if _has_factors(free, tensor):
            groups[place[key]].append(seen(tensor))
    readers = []
    for layer, call in plan.layers.items():
        own = free.free.get(layer)
        if own is not None and _has_factors(free, call.args[0]):
            group = place[plan.points[plan.source(call.args[0])]]
            readers.append(reader_of(own.filters.unpack(array(call.args[1])), seen(call.args[0]), group))
    writers = [
        Writer(
            numbers[free.free[layer].outputs], _deviations(free.free[layer], call.args[1], ranges[call.args[0]].powers)
        )
        for layer, call in plan.layers.items()
    ]
    return Choice(groups, readers, writers)


def _deviations(layer: FreeLayer, weight: GenericConst, powers: np.ndarray) -> np.ndarray:
    """Return about how much each channel of a layer's result varies, by the mean squares of its data's channels."""
    filters = layer.filters.unpack(array(weight).astype("float64"))
    groups, outputs, inputs = filters.shape[:3]
    squares = np.square(filters.reshape(groups, outputs, inputs, -1)).sum(3)
    return np.sqrt((squares * powers.reshape(groups, 1, inputs)).sum(2)).ravel()


class _Writer:
    """Writes factors into a function."""

    def __init__(self, free: FreeFactors, factors: np.ndarray) -> None:
        self.free, self.factors = free, factors
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}

    def rewrite(self) -> relax.Function:
        """Return the function with its constants scaled."""
        func = self.free.func
        for binding in bindings(func):
            var, value = binding.var, binding.value
            new = self._scaled(var, value, substitute(value, self.values))
            self.values[var] = self.emitter.emit(new, var.name)
        outputs = [substitute(out, self.values) for out in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _of(self, tensor: Value) -> tuple[int, np.ndarray] | None:
        """Return the axis and the factors of a tensor that has any but one."""
        axis = self.free.axis(tensor)
        if axis is None:
            return None
        factors = self.factors[self.free.tensor(tensor)[axis]]
        return None if np.all(factors == 1) else (axis, factors)

    def _scaled(self, var: Var, old: Value, new: Value) -> Value:
        """Return a call on scaled operands whose result has its factors."""
        if var in self.free.free:
            return self._layer(var, new)
        operator = ops.of(old)
        if var in self.free.gains:
            return self._gain(var, old, new)
        found = self._of(var) if isinstance(var.ty, relax.TensorType) else None
        if found is None or operator is None:
            return new
        if operator.limits is not None:
            return self._bounded(new.args[0], operator.limits(old), var, found)
        together = ops.proportional(old) if operator.effect == "maps" else ()
        args = [
            self._times(arg, var, found) if n in together and isinstance(arg, GenericConst) else arg
            for n, arg in enumerate(new.args)
        ]
        if all(arg.same_as(other) for arg, other in zip(args, new.args, strict=True)):
            return new
        return Call(new.op, args, new.attrs, new.ty_args, new.span)

    def _layer(self, var: Var, call: Call) -> Call:
        own = self.free.free[var]
        weight = array(call.args[1])
        filters = own.filters.unpack(weight.astype("float64"))
        rows, columns = self.factors[own.outputs], self.factors[own.inputs]
        if np.all(rows == 1) and np.all(columns == 1):
            return call
        groups, outputs, inputs = filters.shape[:3]
        ones = [1] * (filters.ndim - 3)
        filters = filters * rows.reshape(groups, outputs, 1, *ones) / columns.reshape(groups, 1, inputs, *ones)
        new = constant(own.filters.pack(filters), weight.dtype)
        return Call(call.op, [call.args[0], new], call.attrs, call.ty_args, call.span)

    def _gain(self, var: Var, old: Call, new: Call) -> Value:
        """Return a product by a constant, or a normalization, that brings factors in."""
        found, operator = self._of(var), ops.of(old)
        assert operator is not None
        if operator.gains is not None:
            _, constants = operator.gains(old)
            if found is None:
                return new
            args = [
                constant(array(arg) * found[1], array(arg).dtype) if n in constants else arg
                for n, arg in enumerate(new.args)
            ]
            return Call(new.op, args, new.attrs, new.ty_args, new.span)
        product = factor_of(old)
        assert product is not None
        data = self.values.get(product[0], product[0])
        if found is None:
            return data if np.all(product[2] == 1) and static_shape(data) == static_shape(var) else new
        return op.multiply(data, self._times(constant(product[2], "float32"), var, found))

    def _times(self, const: GenericConst, var: Var, found: tuple[int, np.ndarray]) -> GenericConst:
        """Return a constant, as it is broadcast to a tensor, times the tensor's factors; zeros stay as they are."""
        value, rank = array(const), len(static_shape(var))
        if not value.any():
            return const
        axis, factors = found
        along = factors.reshape([-1 if n == axis else 1 for n in range(rank)])
        product = value.astype("float64").reshape((1,) * (rank - value.ndim) + value.shape) * along
        return constant(product.reshape(product.shape[min(axis, rank - value.ndim) :]), value.dtype)

    def _bounded(self, data: Value, limits: tuple[float, float], var: Var, found: tuple[int, np.ndarray]) -> Value:
        low, high = (constant(np.array(limit), "float32") for limit in limits)
        if limits[0] == 0:
            data = op.nn.relu(data)
        elif limits[0] > -np.inf:
            data = op.maximum(data, self._times(low, var, found))
        if limits[1] < np.inf:
            data = op.minimum(data, self._times(high, var, found))
        return data
