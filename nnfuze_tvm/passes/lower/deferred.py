"""A layer whose result stands in other channels until an operator needs it as it was."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import numpy as np
from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.weights import known_values


class Form(Protocol):
    """How a result stands in the channels of another tensor, channels first in both."""

    def along_channels(self, values: np.ndarray) -> np.ndarray:
        """Return one value per channel of the result as one per channel of the tensor."""
        ...

    def restored(self, source: Value) -> Value:
        """Return the result; its operators but the last may be unbound calls."""
        ...


Layer = Callable[["Rewriter", Call, Var], "tuple[Call, Form] | None"]
"""From a call and the Var it is bound to, to what computes it in another form; None leaves it as it is."""


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
        self.pending: dict[Value, tuple[Value, Form]] = {}
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
            call, form = moved
            self.pending[var] = (self.emitter.emit(call, var.name), form)
            return
        self.values[var] = self.emitter.emit(self.read(value), var.name)

    def _element_by_element(self, var: Var, value: Value) -> tuple[Call, Form] | None:
        """Return an operator of each element in the form of its operands, if it can be computed there."""
        operator, pending = ops.of(value), [leaf for leaf in operands(value) if leaf in self.pending]
        if operator is None or operator.effect != "maps" or not pending:
            return None
        shape, form = static_shape(var), self.pending[pending[0]][1]
        if any(static_shape(leaf) != shape for leaf in pending):
            return None
        args: list[Value] = []
        for arg in value.args:
            if arg in self.pending and self.pending[arg][1] == form:
                args.append(self.pending[arg][0])
            elif isinstance(arg, Var | GenericConst):
                values = known_values(arg, self.bound)
                own = _in_channels(values, form, value, shape) if values is not None else None
                if own is None:
                    return None
                args.append(own)
            else:
                args.append(arg)
        return Call(value.op, args, value.attrs, value.ty_args, value.span), form

    def read(self, expr: Value) -> Value:
        """Return ``expr`` over the rebuilt function's variables, with the results it needs restored."""
        for leaf in operands(expr):
            if leaf in self.pending and leaf not in self.values:
                source, form = self.pending[leaf]
                self.values[leaf] = self.emitter.emit(form.restored(source))
        return substitute(expr, self.values)


def _in_channels(values: np.ndarray, form: Form, call: Call, result: tuple[int, ...]) -> GenericConst | None:
    """Return a constant operand of a call in a form, or None where it is not the same for a whole channel."""
    if values.size == 1:
        return constant(values)
    if op_name(call) in ("quantize", "dequantize"):  # one number per channel, which is no broadcast
        return constant(form.along_channels(values)) if int(call.attrs.axis) % len(result) == 1 else None
    rank = len(result)
    if values.size != result[1] or ((1,) * (rank - values.ndim) + values.shape)[1] != result[1]:
        return None
    return constant(form.along_channels(values.reshape(-1)).reshape([-1 if i == 1 else 1 for i in range(rank)]))
