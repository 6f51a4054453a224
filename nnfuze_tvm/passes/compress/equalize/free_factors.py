"""Which channels of which tensors can be multiplied by which positive factors without changing what a network computes.

Every index of every axis of every tensor has a label (`graph.channels`), as for pruning, but equal labels mean equal
factors here: a layer divides its weights by the factors of its input and multiplies them by those of its result, so
that both are free, and operators that are positively homogeneous hand factors on (Nagel et al., "Data-Free
Quantization Through Weight Equalization and Bias Correction", ICCV 2019). At most one axis of a tensor has factors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.channels import FIXED, Coupling, Filters, Labels, arrays, fixed
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields
from nnfuze_tvm.graph.ir import static_shape


@dataclass(frozen=True)
class FreeLayer:
    """A layer whose input channels and output channels may have factors.

    Attributes
    ----------
    axis : int
        The axis of the channels in what it reads.
    filters : Filters
        How its weights are laid out.
    inputs, outputs : np.ndarray
        The labels of its channels.
    """

    axis: int
    filters: Filters
    inputs: np.ndarray
    outputs: np.ndarray


class FreeFactors(Coupling):
    """The factors that the tensors of a straight-line function may have.

    Parameters
    ----------
    func : relax.Function
        The function.
    stuck : set of Var
        Tensors known to have no factors, because operators that are not homogeneous read them: a product by a constant
        makes factors of its own then. `free_factors` finds them.

    Attributes
    ----------
    free : dict of Var to FreeLayer
        The layers.
    gains : dict of Var to int
        Products by constants and normalizations whose constants bring the factors in, each with the axis.
    """

    def __init__(self, func: relax.Function, stuck: set[Value]) -> None:
        super().__init__()
        self.func, self.stuck = func, stuck
        self.free: dict[Value, FreeLayer] = {}
        self.gains: dict[Value, int] = {}
        self.wanted = _channel_axes(func)
        self.readers: dict[Value, list[Value]] = {}
        for binding in bindings(func):
            for leaf in operands(binding.value):
                self.readers.setdefault(leaf, []).append(binding.value)
        for param in func.params:
            self.labels[param] = fixed(param.ty)
        for binding in bindings(func):
            self.labels[binding.var] = self._of_result(binding.var, binding.value)
        for output in output_fields(func):
            self.fix(self.of(output))

    def axis(self, value: Value) -> int | None:
        """Return the axis along which a tensor has factors."""
        labels = self.of(value)
        if not isinstance(labels, list):
            return None
        return next((n for n, each in enumerate(labels) if self.channels.roots(each).any()), None)

    def _of_result(self, var: Var, value: Value) -> Labels | tuple:
        if isinstance(value, relax.TupleGetItem):
            fields = self.of(value.tuple_value)
            return fields[value.index] if isinstance(fields, tuple) else fixed(var.ty)
        if isinstance(value, relax.Tuple):
            return self.of(value)
        if isinstance(value, Call) and isinstance(var.ty, relax.TensorType | relax.TupleType):
            for rule in (self._of_layer, self._of_gain, self._of_product, self._of_homogeneous):
                labels = rule(var, value)
                if labels is not None:
                    return labels
        for arg in getattr(value, "args", ()):
            self.fix(self.of(arg))
        return fixed(var.ty)

    def _of_layer(self, var: Var, value: Call) -> Labels | None:
        where = ops.layer(value)
        if where is None or str(value.args[1].ty.dtype) != "float32" or str(var.ty.dtype) != "float32":
            return None
        data = self.tensor(value.args[0])
        for axis, labels in enumerate(data):
            if axis != where.data:
                self.channels.fix(labels)
        result = self._with_own(var, where.result)
        self.free[var] = FreeLayer(where.data, where.filters, data[where.data], result[where.result])
        return result

    def _with_own(self, var: Var, axis: int) -> Labels:
        """Return labels of which those along one axis are new."""
        shape = static_shape(var)
        return [self.channels.fresh(size) if n == axis else np.full(size, FIXED) for n, size in enumerate(shape)]

    def _of_gain(self, var: Var, value: Call) -> Labels | None:
        """Return new labels where a constant of the call can hold the factors, and its operand has none to hand on."""
        operator = ops.of(value)
        if operator is None or not isinstance(var.ty, relax.TensorType) or str(var.ty.dtype) != "float32":
            return None
        if operator.gains is not None:
            axis, constants = operator.gains(value)
            if not constants or not all(isinstance(value.args[n], GenericConst) for n in constants):
                return None
        else:
            factor = factor_of(value)
            axis = self.wanted.get(var, -1)
            if factor is None or axis < 0 or not _only_along(array(factor[1]), static_shape(var), axis):
                return None
            if factor[0] not in self.stuck and self.axis(factor[0]) is not None:
                return None
            # Bounds and sums behind it would need constants per channel, too.
            if any(op_name(r) in ("add", "subtract") or getattr(ops.of(r), "bounds", False) for r in self.readers[var]):
                return None
        self.fix(self.of(value.args[0]))
        self.fix(self.of(value.args[1]))
        self.gains[var] = axis
        return self._with_own(var, axis)

    def _of_product(self, var: Var, value: Call) -> Labels | None:
        """Return the labels of a product or quotient: one operand may have factors."""
        name = op_name(value)
        if name not in ("multiply", "divide"):
            return None
        left, right = value.args
        kept = left
        if isinstance(left, GenericConst):
            kept = right
        elif not isinstance(right, GenericConst):
            kept = self._kept(left, right)
        if name == "divide" and not kept.same_as(left):
            return None
        if not left.same_as(right):
            self.fix(self.of(right if kept.same_as(left) else left))
            return self._aligned(var, [kept])
        return None

    def _kept(self, left: Value, right: Value) -> Value:
        """Return the operand of a product that keeps its factors: a whole one, what had any, or what was made last."""

        def rank(value: Value) -> tuple[bool, bool, int]:
            labels = [self.channels.roots(each) for each in arrays(self.of(value))]
            size = int(np.prod(static_shape(value)))
            return (
                value not in self.stuck,
                size == largest,
                max((int(each.max(initial=0)) for each in labels), default=0),
            )

        largest = max(int(np.prod(static_shape(each))) for each in (left, right))
        return max((left, right), key=rank)

    def _of_homogeneous(self, var: Var, value: Call) -> Labels | tuple | None:
        operator, together = ops.of(value), ops.proportional(value)
        if operator is None or operator.couple is None:
            return None
        if operator.limits is not None:
            return self._aligned(var, [value.args[0]])
        if not together:
            return None
        for n, arg in enumerate(value.args):
            if n not in together and not isinstance(arg, GenericConst) and isinstance(arg.ty, relax.TensorType):
                self.fix(self.of(arg))
        tensors = [value.args[n] for n in together if not isinstance(value.args[n], GenericConst)]
        if operator.effect == "maps":
            return self._aligned(var, tensors)
        return operator.couple(self, var, value)

    def _aligned(self, var: Var, tensors: Sequence[Value]) -> Labels:
        """Return the labels of what is computed element by element from tensors that have all the same factors."""
        shape = static_shape(var)
        own = [self.tensor(each) for each in tensors]
        result = [np.full(size, FIXED) for size in shape]
        for axis, size in enumerate(shape):
            each = [
                labels[axis - len(shape)] if len(labels) >= len(shape) - axis else np.zeros(0, int) for labels in own
            ]
            if all(len(labels) == size for labels in each):
                for other in each[1:]:
                    self.channels.tie(each[0], other)
                result[axis] = each[0]
            else:
                for labels in each:
                    self.channels.fix(labels)
        return result


def free_factors(func: relax.Function) -> FreeFactors:
    """Return the factors that the tensors of a function may have."""
    first = FreeFactors(func, set())
    stuck = {var for var in first.labels if isinstance(first.of(var), list) and first.axis(var) is None}
    return FreeFactors(func, stuck)


def factor_of(value: Value) -> tuple[Value, GenericConst, np.ndarray] | None:
    """Return the tensor that a call multiplies by a constant, the constant, and what by: for ``x / c``, ``1 / c``."""
    operator = ops.of(value)
    if operator is None or operator.affine is None or len(value.args) != 2:
        return None
    left, right = value.args
    if isinstance(left, GenericConst) == isinstance(right, GenericConst):
        return None
    swapped = isinstance(left, GenericConst)
    data, const = (right, left) if swapped else (left, right)
    scale, shift = operator.affine(array(const).astype("float64"), swapped) or (None, None)
    return None if scale is None or shift is not None else (data, const, scale)


def _only_along(value: np.ndarray, shape: Sequence[int], axis: int) -> bool:
    """Tell whether a constant, broadcast to a shape, varies along one axis only."""
    padded = (1,) * (len(shape) - value.ndim) + value.shape
    return value.ndim <= len(shape) and all(size == 1 for n, size in enumerate(padded) if n != axis)


def _channel_axes(func: relax.Function) -> Mapping[Value, int]:
    """Return the axis of each tensor that layers behind it take for its channels, as far as it is known."""
    found: dict[Value, int] = {}
    for binding in reversed(bindings(func)):
        value = binding.value
        where = ops.layer(value)
        if where is not None:
            found.setdefault(value.args[0], where.data)
            continue
        axis = found.get(binding.var)
        if axis is None or not isinstance(value, Call):
            continue
        shape = static_shape(binding.var)
        for arg in operands(value):
            if isinstance(arg.ty, relax.TensorType) and len(static_shape(arg)) == len(shape):
                if static_shape(arg)[axis] == shape[axis]:
                    found.setdefault(arg, axis)
    return found
