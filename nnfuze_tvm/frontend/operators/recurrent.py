"""LSTM, GRU and RNN: the product of all steps' inputs as one matrix product, then the recurrence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from tvm.ir import Call
from tvm.relax import op

from nnfuze_tvm.frontend import clipped_lstm
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.quantized import dynamic_product
from nnfuze_tvm.frontend.operators.recurrent_steps import run_steps
from nnfuze_tvm.frontend.operators.values import fixed, required
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops.recurrence import recurrence
from nnfuze_tvm.graph.recurrent.cell import DEFAULTS, GATES, Activation, Cell, Kind
from nnfuze_tvm.graph.recurrent.form import LEVELS, Form

_DIRECTIONS = {"forward": (False,), "reverse": (True,), "bidirectional": (False, True)}
# What each cell computes with unless it is told otherwise.
_USUAL = {"lstm": ("Sigmoid", "Tanh", "Tanh"), "gru": ("Sigmoid", "Tanh"), "rnn": ("Tanh",)}
# So few steps are written out: their products are layers like any other.
_WRITTEN_OUT = 2


def _convert(kind: Kind, node: Node, inputs: Operands) -> list[Value | None]:
    """Convert a recurrent layer in either layout and of float16, float32 or float64."""
    dtype, rank = str(inputs[0].ty.dtype), len(static_shape(inputs[0]))
    if rank != 3:
        raise ValueError(f"its input has {rank} axes instead of 3")
    if dtype not in ("float16", "float32", "float64"):
        raise ValueError(f"type {dtype} is not supported")
    layout = int(node.attributes.get("layout", 0))
    if layout not in (0, 1):
        raise ValueError(f"layout {layout} is not supported")
    operands = [inputs[n] for n in range(8)]
    if dtype == "float16":
        operands = [each if each is None or n == 4 else op.astype(each, "float32") for n, each in enumerate(operands)]
    if layout == 1:
        operands = [_swapped(each) if n in (0, 5, 6) and each is not None else each for n, each in enumerate(operands)]
    layer = _Layer(kind, node, [node.emit(each) if isinstance(each, Call) else each for each in operands])
    results = [node.emit(each) for each in layer.results()]
    if layout == 1:
        # Directions come last of the first three axes in all steps' states, second in the last ones.
        results = [op.permute_dims(results[0], [2, 0, 1, 3]), *map(_swapped, results[1:])]
    if dtype == "float16":
        results = [op.astype(each, "float16") for each in results]
    return results


def _swapped(value: Value) -> Value:
    """Swap the first two of three axes."""
    shape = static_shape(value)
    if 1 in shape[:2]:
        return op.reshape(value, [shape[1], shape[0], shape[2]])
    return op.permute_dims(value, [1, 0, 2])


class _Layer:
    """One recurrent layer with its sizes and operands, steps first."""

    def __init__(self, kind: Kind, node: Node, operands: Operands) -> None:
        self.kind, self.node = kind, node
        self.data, self.weights, self.recurrent, self.bias, lengths, self.hidden, self.cell, self.peepholes = operands
        if kind != "lstm":
            self.cell = self.peepholes = None
        self.steps, self.batch, self.width = static_shape(self.data)
        direction = node.text("direction", "forward").lower()
        if direction not in _DIRECTIONS:
            raise ValueError(f"direction {direction!r} is not supported")
        self.reverse = _DIRECTIONS[direction]
        self.units = static_shape(self.recurrent)[-1]
        self.dtype = str(self.data.ty.dtype)
        self._check()
        self.lengths = self._lengths(lengths)
        self.form = Form(self._cells(), self.reverse, self.peepholes is not None)

    def _check(self) -> None:
        count, rows = len(self.reverse), GATES[self.kind] * self.units
        if int(self.node.attributes.get("hidden_size", self.units)) != self.units:
            raise ValueError(f"hidden_size is not that of its weights, {self.units}")
        if 0 in (self.steps, self.batch, self.units, self.width):
            raise ValueError("it has no steps, no sequences or no units, which is not supported")
        states = (count, self.batch, self.units)
        wanted = {
            "W": (self.weights, (count, rows, self.width)),
            "R": (self.recurrent, (count, rows, self.units)),
            "B": (self.bias, (count, 2 * rows)),
            "initial_h": (self.hidden, states),
            "initial_c": (self.cell, states),
            "P": (self.peepholes, (count, 3 * self.units)),
        }
        for name, (value, shape) in wanted.items():
            if value is not None and static_shape(value) != shape:
                raise ValueError(f"{name} has shape {static_shape(value)}, expected {shape}")

    def _lengths(self, given: Value | None) -> list[int] | None:
        """Return the number of steps of each sequence, None if it is all steps."""
        if given is None:
            return None
        values = known(given)
        if values is None:
            raise ValueError("sequence_lens that is no constant is not supported")
        lengths = [int(each) for each in values.reshape(-1)]
        if len(lengths) != self.batch or not all(0 <= each <= self.steps for each in lengths):
            raise ValueError(f"sequence_lens {lengths} does not fit {self.batch} sequences of {self.steps} steps")
        return None if set(lengths) == {self.steps} else lengths

    def _cells(self) -> tuple[Cell, ...]:
        attributes, usual = self.node.attributes, _USUAL[self.kind]
        names = [each.decode() if isinstance(each, bytes) else each for each in attributes.get("activations", ())]
        names = names or [*usual] * len(self.reverse)
        if len(names) != len(usual) * len(self.reverse):
            raise ValueError(f"{len(names)} activations instead of {len(usual) * len(self.reverse)}")
        parameters = [iter(attributes.get(f"activation_{name}", ())) for name in ("alpha", "beta")]
        functions = [_activation(name.lower(), *parameters) for name in names]
        clip = float(attributes.get("clip", 0.0))
        coupled = self.kind == "lstm" and bool(attributes.get("input_forget", 0))
        linear = self.kind == "gru" and bool(attributes.get("linear_before_reset", 0))
        count = len(usual)
        return tuple(
            Cell(self.kind, tuple(functions[n : n + count]), clip, coupled, linear) for n in range(0, len(names), count)
        )

    # What is computed.

    def results(self) -> list[Value]:
        """Return all hidden states, the last ones and, of an LSTM, the cells' last states."""
        projection = self._projection()
        zeros = constant(np.zeros((len(self.reverse), self.batch, self.units), self.dtype))
        hidden = zeros if self.hidden is None else self.hidden
        cell = (zeros if self.cell is None else self.cell) if self.kind == "lstm" else None
        if self.lengths is None:
            return self._run(projection, hidden, cell)
        # Sequences of several lengths are computed one by one.
        parts = [self._sequence(n, length, projection, hidden, cell) for n, length in enumerate(self.lengths)]
        count = min(map(len, parts))
        return [op.concat([part[n] for part in parts], 1 if n else 2) for n in range(count)]

    def _sequence(self, n: int, length: int, projection: Value, hidden: Value, cell: Value | None) -> list[Value]:
        """Return the results of one sequence, zeros behind its end; of an empty one there is nothing else."""
        count = len(self.reverse)
        rest = constant(np.zeros((self.steps - length, count, 1, self.units), self.dtype))
        if length == 0:
            return [rest, *[constant(np.zeros((count, 1, self.units), self.dtype))] * (2 if self.kind == "lstm" else 1)]
        emit = self.node.emit
        states = [emit(op.strided_slice(each, [1], [n], [n + 1])) for each in (hidden, cell) if each is not None]
        width = static_shape(projection)[1]
        steps = op.reshape(projection, [self.steps, self.batch, width])
        own = op.reshape(op.strided_slice(steps, [0, 1], [0, n], [length, n + 1]), [length, width])
        everything, *last = self._run(emit(own), *states)
        return [op.concat([everything, rest], 0) if length < self.steps else everything, *last]

    def _projection(self) -> Value:
        """Return what each gate of each step adds up of input and biases ``[T·B, D·G·H]``."""
        count, rows = len(self.reverse), GATES[self.kind] * self.units
        matrix = op.permute_dims(op.reshape(self.weights, [count * rows, self.width]), [1, 0])
        flat = op.reshape(self.data, [self.steps * self.batch, self.width])
        product = self.node.emit(op.matmul(flat, matrix))
        if self.bias is not None:
            inputs, hidden = (op.strided_slice(self.bias, [1], [n * rows], [(n + 1) * rows]) for n in range(2))
            if self.form.has_bias:
                # What is reset keeps its own bias.
                kept = op.strided_slice(hidden, [1], [0], [2 * self.units])
                none = constant(np.zeros((count, self.units), self.dtype))
                hidden = op.concat([kept, none], 1)
            product = op.add(product, op.reshape(op.add(inputs, hidden), [count * rows]))
        return self.node.emit(product)

    def _operands(self, projection: Value, hidden: Value, cell: Value | None) -> dict[str, Value]:
        found = {
            "projection": projection,
            **self._recurrent_operands(),
            "hidden": hidden,
            "cell": cell,
            "peepholes": self.peepholes,
        }
        if self.form.has_bias:
            rows = GATES[self.kind] * self.units
            found["bias"] = constant(np.zeros((len(self.reverse), self.units), self.dtype))
            if self.bias is not None:
                found["bias"] = op.strided_slice(self.bias, [1], [2 * rows - self.units], [2 * rows])
        return {name: self.node.emit(found[name]) for name in self.form.operands}

    def _recurrent_operands(self) -> dict[str, Value]:
        """Return what has to do with the weights of hidden states."""
        return {"weights": op.permute_dims(self.recurrent, [0, 2, 1])}

    def _run(self, projection: Value, hidden: Value, cell: Value | None = None) -> list[Value]:
        """Return the same as `results` for sequences of equal length."""
        node, steps = self.node, static_shape(projection)[0] // static_shape(hidden)[1]
        operands = self._operands(projection, hidden, cell)
        if steps <= _WRITTEN_OUT and not self.form.integer:
            return run_steps(node, self.form, operands)
        keeps = self.kind == "lstm" and len(node.proto.output) > 2 and bool(node.proto.output[2])
        form = replace(self.form, keeps_cell=keeps)
        states = node.emit(recurrence(form, list(operands.values())))
        last = [_row(states, 0 if reverse else steps - 1, n) for n, reverse in enumerate(self.reverse)]
        results = [states, op.concat(last, 0) if len(last) > 1 else last[0]]
        if keeps:
            results[0] = op.strided_slice(states, [0], [0], [steps])
            row = op.strided_slice(states, [0], [steps], [steps + 1])
            results.append(op.reshape(row, static_shape(hidden)))
        return results


def _row(states: Value, step: int, direction: int) -> Value:
    """Return the states ``[1, B, H]`` of a step in a direction."""
    _, _, batch, units = static_shape(states)
    row = op.strided_slice(states, [0, 1], [step, direction], [step + 1, direction + 1])
    return op.reshape(row, [1, batch, units])


def _activation(name: str, alphas: Any, betas: Any) -> Activation:
    """Return an activation function; it takes the next parameters that are given, as far as it has any."""
    if name not in DEFAULTS:
        raise ValueError(f"activation {name!r} is not supported")
    values = []
    for parameter, given, usual in zip(("alpha", "beta"), (alphas, betas), DEFAULTS[name], strict=False):
        value = next(given, usual)
        if value is None:
            raise ValueError(f"activation {name!r} without activation_{parameter} is not supported")
        values.append(float(value))
    return Activation(name, *values, *[0.0] * (2 - len(values)))


def _lstm(node: Node, inputs: Operands) -> Sequence[Value | None]:
    return _convert("lstm", node, inputs)


def _gru(node: Node, inputs: Operands) -> Sequence[Value | None]:
    return _convert("gru", node, inputs)


def _rnn(node: Node, inputs: Operands) -> Sequence[Value | None]:
    return _convert("rnn", node, inputs)


class _Codes:
    """Weights of one direction that are 8-bit codes: without their zero point, and what one unit stands for."""

    def __init__(self, codes: Value, scale: Value, zero: Value | None, direction: int) -> None:
        matrices, scales = required(codes, "constant weights"), required(scale, "constant scale of weights")
        point = fixed(zero, "zero points")
        below = np.zeros(scales.shape, "int16") if point is None else point.astype("int16")
        count, _, columns = matrices.shape
        if not {scales.shape, below.shape} <= {(count,), (count, columns)}:
            raise ValueError(f"scales or zero points of shape {scales.shape}, {below.shape} are not supported")
        self.matrix, self.scale = matrices[direction].astype("int16") - below[direction], scales[direction]


class _QuantizedLayer(_Layer):
    """Microsoft's LSTM of 8-bit weights.

    As in ONNX Runtime on one thread, the input of all steps is quantized by its range, and in each step the hidden
    states of all sequences are by theirs. Weights are ``[D, I, 4·H]`` and ``[D, H, 4·H]``, their scales and zero points
    ``[D]`` or ``[D, 4·H]``.
    """

    def __init__(self, node: Node, inputs: Operands) -> None:
        # As if they were floats: shapes are what is asked of them.
        weights = [constant(required(inputs[n], "constant weights").transpose(0, 2, 1)) for n in (1, 2)]
        super().__init__("lstm", node, [inputs[0], *weights, *(inputs[n] for n in range(3, 8))])
        if self.lengths is not None and self.batch > 1:
            raise ValueError("sequences of several lengths, which are quantized together, are not supported")
        self.codes, own = (
            [_Codes(inputs[place], inputs[scale], inputs[scale + 1], n) for n in range(len(self.reverse))]
            for place, scale in ((1, 8), (2, 10))
        )
        self.matrices = np.stack([each.matrix for each in own])
        self.scales = np.stack([np.broadcast_to(each.scale, self.matrices.shape[2:]) for each in own])
        self.form = replace(self.form, codes_in="int8" if np.abs(self.matrices).max() <= LEVELS else "int16")

    def _projection(self) -> Value:
        data = self.node.emit(op.reshape(self.data, [self.steps * self.batch, self.width]))
        parts = []
        for own in self.codes:
            fits = -128 <= own.matrix.min() and own.matrix.max() <= 127
            matrix, scale = constant(own.matrix, "int8" if fits else "int16"), constant(own.scale)
            parts.append(self.node.emit(dynamic_product(self.node, data, matrix, scale, None)[0]))
        product = parts[0] if len(parts) == 1 else self.node.emit(op.concat(parts, 1))
        if self.bias is None:
            return product
        biases = required(self.bias, "constant biases").reshape(len(self.reverse), 2, -1)
        return self.node.emit(op.add(product, constant(biases.sum(1).reshape(-1))))

    def _recurrent_operands(self) -> dict[str, Value]:
        return {
            "weights": constant(self.matrices, self.form.codes_in),
            "scales": constant(self.scales, "float32"),
            "totals": constant(self.matrices.sum(1, dtype="int32")),
        }


def _quantized_lstm(node: Node, inputs: Operands) -> Sequence[Value | None]:
    return _QuantizedLayer(node, inputs).results()


def _clipped_lstm(node: Node, inputs: Operands) -> Sequence[Value | None]:
    """Convert what `clipped_lstm` says."""
    peepholes = required(inputs[6], "constant peepholes")
    layer = _Layer("lstm", node, [*inputs[:4], None, *inputs[4:6], inputs[6] if peepholes.any() else None])
    bound = float(required(inputs[7], "a constant bound"))
    layer.form = replace(layer.form, cells=tuple(replace(cell, bound=bound) for cell in layer.form.cells))
    return layer.results()


CONVERTERS: dict[str, Converter] = {
    "LSTM": _lstm,
    "GRU": _gru,
    "RNN": _rnn,
    f"{clipped_lstm.DOMAIN}.{clipped_lstm.NAME}": _clipped_lstm,
    "com.microsoft.DynamicQuantizeLSTM": _quantized_lstm,
}
