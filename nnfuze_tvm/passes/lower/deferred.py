"""A layer whose result stands in other tensors until an operator needs it as it was."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.ir import JOINED, static_shape
from nnfuze_tvm.passes.lower.weights import known_values


class Form(Protocol):
    """How a result stands in the channels of one other tensor or several of one shape."""

    @property
    def axis(self) -> int:
        """Return the axis of the channels, in all of them."""
        ...

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel of the result as one per channel of each tensor."""
        ...

    def restored(self, *sources: Value) -> Value:
        """Return the result; its operators but the last may be unbound calls."""
        ...


Layer = Callable[["Rewriter", Call, Var], "tuple[Sequence[Call], Form] | None"]
"""From a call and the Var it is bound to, to what computes it in another form, a call per tensor of the form; None
leaves it as it is."""


class Rewriter:
    """Rebuild a straight-line function.

    What follows a layer in another form element by element (a bias, an activation, a quantization) is computed in that
    form, where its constants are the same for a whole channel.

    Parameters
    ----------
    layer : callable
        Which layers, and how.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer
        self.emitter = Emitter()
        self.values: dict[Value, Value] = {}
        self.pending: dict[Value, tuple[list[Value], Form]] = {}
        self.bound: dict[Value, Value] = {}

    def rewrite(self, func: relax.Function) -> relax.Function:
        """Return ``func`` with its layers in other forms."""
        for binding in bindings(func):
            self._bind(binding.var, binding.value)
        outputs = [self.read(field) for field in output_fields(func)]
        return self.emitter.finish(func.params, outputs, func.attrs)

    def _bind(self, var: Var, value: Value) -> None:
        self.bound[var] = value
        if isinstance(value, Var) and value in self.pending:
            self.pending[var] = self.pending[value]
            return
        moved = self.layer(self, value, var) if op_name(value) else None
        moved = moved or self._element_by_element(var, value)
        if moved is not None:
            calls, form = moved
            # All are the layer, and no two Vars have one name.
            names = [var.name, *(f"{var.name}{JOINED}{n}" for n in range(1, len(calls)))]
            sources = [self.emitter.emit(call, name) for call, name in zip(calls, names, strict=True)]
            self.pending[var] = (sources, form)
            return
        self.values[var] = self.emitter.emit(self.read(value), var.name)

    def _element_by_element(self, var: Var, value: Value) -> tuple[Sequence[Call], Form] | None:
        """Return an operator of each element in the form of its operands, if it can be computed there."""
        operator, pending = ops.of(value), [leaf for leaf in operands(value) if leaf in self.pending]
        if operator is None or operator.effect != "maps" or not pending:
            return None
        shape, (sources, form) = static_shape(var), self.pending[pending[0]]
        if any(static_shape(leaf) != shape for leaf in pending):
            return None
        # Per operand, what it is for each of the form's tensors.
        args: list[Sequence[Value]] = []
        for arg in value.args:
            if arg in self.pending and self.pending[arg][1] == form:
                args.append(self.pending[arg][0])
            elif isinstance(arg, Var | GenericConst):
                values = known_values(arg, self.bound)
                rank = len(static_shape(sources[0]))
                own = _in_channels(values, form, value, shape, rank) if values is not None else None
                if own is None:
                    return None
                args.append([own] * len(sources))
            else:
                args.append([arg] * len(sources))
        calls = [Call(value.op, list(own), value.attrs, value.ty_args, value.span) for own in zip(*args, strict=True)]
        return calls, form

    def read(self, expr: Value) -> Value:
        """Return ``expr`` over the rebuilt function's variables, with the results it needs restored."""
        for leaf in operands(expr):
            if leaf in self.pending and leaf not in self.values:
                sources, form = self.pending[leaf]
                self.values[leaf] = self.emitter.emit(form.restored(*sources))
        return substitute(expr, self.values)


def _in_channels(values: np.ndarray, form: Form, call: Call, result: tuple[int, ...], axes: int) -> GenericConst | None:
    """Return a constant operand of a call in a form of so many axes, None where it is not the same per channel."""
    if values.size == 1:
        return constant(values)
    rank = len(result)
    if axes != rank and hasattr(call.attrs, "axis"):
        return None
    axis = form.axis % rank
    if op_name(call) in ("quantize", "dequantize"):  # one number per channel, which is no broadcast
        return constant(form.along_channels(values)) if int(call.attrs.axis) % rank == axis else None
    if values.size != result[axis] or ((1,) * (rank - values.ndim) + values.shape)[axis] != result[axis]:
        return None
    shape = [-1 if i == axis - rank else 1 for i in range(-axes, 0)]
    return constant(form.along_channels(values.reshape(-1)).reshape(shape))
