"""A tensor with its channels in another order than what reads it was made for, and what reads it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, GenericConst
from tvm.relax import op

from nnfuze_tvm.graph import dataflow, ops
from nnfuze_tvm.graph.channels import FIXED, Coupling
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape

Order = Mapping[int, np.ndarray]
"""By axis: where each index that readers mean is."""


@dataclass
class Rearranged:
    """Emits what reads tensors of other orders, so that it computes what it was made for.

    Layers get other weights, which cost nothing; what treats all channels alike (activations, pooling, reshapes) hands
    the order on; anything else is handed the channels in the order that it wants.

    Attributes
    ----------
    emitter : dataflow.Emitter
        Where the function is made.
    values : dict
        By the old Vars: the new ones.
    orders : dict
        By the old Vars: the orders of new ones that have others.
    """

    emitter: dataflow.Emitter
    values: dict[Value, Value]
    orders: dict[Value, Order]

    def emit(self, binding: relax.VarBinding) -> None:
        """Bind what a binding of the old function binds."""
        old = binding.value
        read = [leaf for leaf in dataflow.operands(old) if leaf in self.orders]
        if len(read) == 1:
            new = dataflow.substitute(old, self.values)
            weights = _picking(old, self.orders[read[0]])
            if weights is not None:
                new = Call(new.op, [new.args[0], weights], new.attrs, new.ty_args, new.span)
                self.values[binding.var] = self.emitter.emit(new, binding.var.name)
                return
            order = _handed_on(binding.var, old, self.orders[read[0]])
            if order is not None:
                self.orders[binding.var] = order
                self.values[binding.var] = self.emitter.emit(new, binding.var.name)
                return
        for leaf in read:
            self.ordered(leaf)
        self.values[binding.var] = self.emitter.emit(dataflow.substitute(old, self.values), binding.var.name)

    def ordered(self, value: Value) -> Value:
        """Return the new function's value of an old one or of a tuple of such, in the order that is meant."""
        for leaf in dataflow.operands(value):
            for axis, indices in self.orders.pop(leaf, {}).items():
                self.values[leaf] = self.emitter.emit(op.take(self.values[leaf], constant(indices, "int64"), axis))
        return dataflow.substitute(value, self.values)


def _picking(value: Value, order: Order) -> GenericConst | None:
    """Return the weights of a layer over channels in another order; None for what can't have them in its weights."""
    where = ops.layer(value)
    if where is None or where.filters.groups > 1 or list(order) != [where.data]:
        return None
    filters = where.filters.unpack(array(value.args[1]))
    summed = np.zeros_like(filters)
    for number, source in enumerate(order[where.data]):
        summed[:, :, source] += filters[:, :, number]
    return constant(where.filters.pack(summed))


def _handed_on(var: tvm.ir.Var, value: Value, order: Order) -> Order | None:
    """Return the order of a call's result if it treats all channels alike, and reads nothing else."""
    operator = ops.of(value)
    if operator is None or operator.couple is None or operator.effect == "layer" or len(order) != 1:
        return None
    if len(dataflow.operands(value)) != 1 or not isinstance(var.ty, relax.TensorType):
        return None
    coupling, (data,) = Coupling(), dataflow.operands(value)
    ((axis, indices),) = order.items()
    own = coupling.channels.fresh(len(indices))
    coupling.labels[data] = [own if n == axis else np.full(size, FIXED) for n, size in enumerate(static_shape(data))]
    result = operator.couple(coupling, var, value)
    if not isinstance(result, list) or not np.array_equal(coupling.channels.roots(own), own):
        return None
    orders = {n: _along(labels, own, indices) for n, labels in enumerate(result) if labels.any()}
    found = {n: each for n, each in orders.items() if each is not None}
    return found if found and len(found) == len(orders) else None


def _along(labels: np.ndarray, own: np.ndarray, indices: np.ndarray) -> np.ndarray | None:
    """Return the order of an axis that has each channel so many times; None where it has something else, too."""
    place = np.argsort(labels, kind="stable")
    if len(labels) % len(own) or not np.array_equal(labels[place], np.repeat(own, len(labels) // len(own))):
        return None
    places = place.reshape(len(own), -1)
    found = np.empty(len(labels), "int64")
    found[places] = places[indices]
    return found
