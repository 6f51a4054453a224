"""Recurrent layers of few steps, each step written out in Relax operators: they fuse and quantize like any other."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Node
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.recurrent.cell import Math
from nnfuze_tvm.graph.recurrent.form import Form


def run_steps(node: Node, form: Form, operands: Mapping[str, Value]) -> list[Value]:
    """Return all hidden states ``[T, D, B, H]``, the last ones and, of an LSTM, the cells' last states ``[D, B, H]``.

    Parameters
    ----------
    node : Node
        Where calls are bound.
    form : Form
        What is computed.
    operands : mapping of str to Expr
        The operands that `Form` states, by name.
    """
    _, batch, units = static_shape(operands["hidden"])
    rows, width = static_shape(operands["projection"])
    apart = node.emit(op.reshape(operands["projection"], [rows // batch, batch, width]))
    own = {**operands, "projection": apart}
    directions = [_Direction(node, form, own, n) for n in range(len(form.cells))]
    for direction in directions:
        direction.run()
    states = [[op.reshape(each, [1, 1, batch, units]) for each in direction.states] for direction in directions]
    everything = _joined([_joined(list(step), 1) for step in zip(*states, strict=True)], 0)
    last = [_joined([direction.hidden for direction in directions], 0)]
    if form.kind == "lstm":
        last.append(_joined([direction.cell for direction in directions], 0))
    return [everything, *last]


def _joined(parts: list[Value], axis: int) -> Value:
    return parts[0] if len(parts) == 1 else op.concat(parts, axis)


def _relax(node: Node, dtype: str) -> Math:
    """Return the functions of Relax expressions."""

    def number(value: float) -> Value:
        return constant(np.asarray(value, dtype))

    return Math(
        number=number,
        keep=node.emit,
        exp=op.exp,
        log=op.log,
        tanh=op.tanh,
        sigmoid=op.sigmoid,
        absolute=op.abs,
        maximum=op.maximum,
        minimum=op.minimum,
        divide=op.divide,
        below=lambda x, bound, yes, no: op.where(op.less(x, bound), yes, no),
    )


class _Direction:
    """One direction of a layer: its states ``[1, B, H]``, and what it does to them step by step.

    Its projection has steps and sequences apart.
    """

    def __init__(self, node: Node, form: Form, operands: Mapping[str, Value], direction: int) -> None:
        self.node, self.form, self.direction = node, form, direction
        self.equations = form.cells[direction]
        self.projection = operands["projection"]
        self.math = _relax(node, str(self.projection.ty.dtype))
        self.weights = self._matrix(operands["weights"])
        self.hidden = self._own(operands["hidden"])
        self.cell = self._own(operands["cell"]) if form.kind == "lstm" else self.hidden
        self.bias = self._own(operands["bias"]) if form.has_bias else None
        self.peepholes = self._pieces(self._own(operands["peepholes"]), 3) if form.peepholes else []
        self.states: list[Value] = []

    def _own(self, value: Value) -> Value:
        """Return the part ``[1, …]`` of ``[D, …]``."""
        if len(self.form.cells) == 1:
            return value
        return self.node.emit(op.strided_slice(value, [0], [self.direction], [self.direction + 1]))

    def _matrix(self, value: Value) -> Value:
        own = self._own(value)
        return self.node.emit(op.reshape(own, static_shape(own)[1:]))

    def _pieces(self, value: Value, count: int) -> list[Value]:
        """Split the last axis into equal parts."""
        shape = static_shape(value)
        size, axis = shape[-1] // count, len(shape) - 1
        if count == 1:
            return [value]
        return [self.node.emit(op.strided_slice(value, [axis], [n * size], [(n + 1) * size])) for n in range(count)]

    def run(self) -> None:
        """Compute all steps, `states` in the order of their time."""
        steps, _, width = static_shape(self.projection)
        own = width // len(self.form.cells)
        order = range(steps)
        reverse = self.form.reverse[self.direction]
        for step in reversed(order) if reverse else order:
            begin = [step, self.direction * own]
            inputs = self.projection
            if steps > 1 or own < width:
                inputs = self.node.emit(op.strided_slice(inputs, [0, 2], begin, [step + 1, begin[1] + own]))
            self._step(inputs)
            self.states.append(self.hidden)
        if reverse:
            self.states.reverse()

    def _step(self, inputs: Value) -> None:
        if self.form.waits:
            self.hidden = self._waiting(inputs)
            return
        m, emit, gates = self.math, self.node.emit, self.form.gates
        products = emit(op.matmul(self.hidden, self.weights))
        if self.form.kind == "gru":
            own, other = self._pieces(inputs, 3), self._pieces(products, 3)
            assert self.bias is not None
            update, reset = (self.equations.gate(m, op.add(own[n], other[n])) for n in range(2))
            total = own[2] + reset * op.add(other[2], self.bias)
            self.hidden = emit(self.equations.gru(m, update, total, self.hidden))
            return
        sums = self._pieces(emit(op.add(products, inputs)), gates)
        if self.form.kind == "lstm":
            hidden, self.cell = self.equations.lstm(m, sums, self.cell, self.peepholes)
            self.hidden = emit(hidden)
        else:
            self.hidden = emit(self.equations.rnn(m, sums[0]))

    def _waiting(self, inputs: Value) -> Value:
        """Return the state of a GRU whose gates come first."""
        m, emit = self.math, self.node.emit
        units = static_shape(self.hidden)[-1]
        spans = ((0, 2 * units), (2 * units, 3 * units))
        gate_weights, weights = (emit(op.strided_slice(self.weights, [1], [low], [high])) for low, high in spans)
        gate_inputs, own = (emit(op.strided_slice(inputs, [2], [low], [high])) for low, high in spans)
        update, reset = self._pieces(emit(op.add(op.matmul(self.hidden, gate_weights), gate_inputs)), 2)
        left = emit(self.equations.gate(m, reset) * self.hidden)
        total = op.add(op.matmul(left, weights), own)
        return emit(self.equations.gru(m, self.equations.gate(m, update), total, self.hidden))
