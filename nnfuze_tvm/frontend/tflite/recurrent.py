"""Recurrent layers: LSTM, plain ones and SVDF, whose states are variables of the file.

Weights of 8 bits beside activations in floats are computed as the floats that they stand for.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from nnfuze_tvm.frontend import clipped_lstm
from nnfuze_tvm.frontend.tflite.file import Operator
from nnfuze_tvm.frontend.tflite.variables import keep, state
from nnfuze_tvm.frontend.tflite.writer import Writer

# ONNX's names of the schema's activations.
_FUNCTIONS: Mapping[int, tuple[str, dict[str, Any]]] = {0: ("Affine", {}), 1: ("Relu", {}), 4: ("Tanh", {})}
# Where an LSTM's gates are among those of the file (input, forget, cell, output): input, output, forget, cell.
_ORDER = (0, 3, 1, 2)


@dataclass(frozen=True)
class _Places:
    """Where the inputs of one direction of an LSTM are."""

    weights: int
    recurrent: int
    peepholes: int
    biases: int
    projection: int
    hidden: int
    cell: int


_FORWARD = _Places(1, 5, 9, 12, 16, 18, 19)
_BOTH = (_Places(1, 5, 9, 12, 16, 35, 36), _Places(18, 22, 26, 29, 33, 37, 38))


def _real(w: Writer, op: Operator, index: int) -> np.ndarray:
    """Return the floats that a constant stands for."""
    op.constant(index)
    return w.given(index).real


def _floats(w: Writer) -> None:
    if (dtype := w.given(0).dtype) != "float32":
        raise ValueError(f"its data are {dtype}: only floats are supported, with weights in floats or 8 bits")


def _function(op: Operator) -> tuple[str, float, float]:
    number = op.options.FusedActivationFunction()
    if number not in _FUNCTIONS:
        raise ValueError(f"its activation {number} is not supported")
    return _FUNCTIONS[number][0], 1.0, 0.0


def _begin(w: Writer, op: Operator) -> tuple[str, bool]:
    """Return the data, steps first, and whether they are so in the file."""
    first = len(w.given(0).shape) == 2 or bool(getattr(op.options, "TimeMajor", lambda: False)())
    if len(w.given(0).shape) == 2:
        return w.read(0, shape=[1, *w.given(0).shape]), True
    return w.read(0, None if first else (1, 0, 2)), first


def _states(w: Writer, places: tuple[int, ...]) -> list[str]:
    """Return states ``[1, sequences, units]``."""
    tensors = [w.given(place) for place in places]
    return [w.moved(state(w, tensor.number, tensor), shape=[1, *tensor.shape]) for tensor in tensors]


def _kept(w: Writer, places: tuple[int, ...], values: list[str]) -> None:
    for place, value in zip(places, values, strict=True):
        tensor = w.given(place)
        keep(w, tensor.number, tensor, w.moved(value, shape=tensor.shape))


def _finish(w: Writer, op: Operator, results: list[str], first: bool) -> None:
    """Write the states of all steps ``[steps, 1, sequences, units]`` of one direction, or of two."""
    flat = [w.add("Squeeze", [value, w.constant([1], "int64")]) for value in results]
    if len(flat) > 1 and op.options.MergeOutputs():
        flat = [w.add("Concat", flat, axis=2)]
    for n, value in enumerate(flat):
        if len(op.outputs[n].shape) == 2:
            w.write(value, n, shape=op.outputs[n].shape)
        else:
            w.write(value, n, None if first else (1, 0, 2))


def _lstm_direction(w: Writer, op: Operator, data: str, at: _Places, direction: str) -> str:
    if any(w.has(at.projection + n) for n in range(2)):
        raise ValueError("a projection of its states is not supported")

    def gates(start: int) -> list[np.ndarray]:
        own = [_real(w, op, start + n) if n or w.has(start) else None for n in range(4)]
        # Without an input gate, what is not forgotten is taken in: the sigmoid of the negative sum.
        return [-own[1] if own[n] is None else own[n] for n in _ORDER]  # type: ignore[operator,misc]

    units = op.constant(at.recurrent + 1).shape[1]
    peepholes = np.zeros(3 * units)
    if w.has(at.peepholes + 1):
        coupled = not w.has(at.peepholes)
        found = [_real(w, op, at.peepholes + n) if n or not coupled else np.zeros(0) for n in range(3)]
        found[0] = -found[1] if coupled else found[0]
        peepholes = np.concatenate([found[0], found[2], found[1]])
    weights, recurrent = (np.concatenate(gates(start))[None] for start in (at.weights, at.recurrent))
    biases = np.concatenate(gates(at.biases))
    constants = [w.constant(each, "float32") for each in (weights, recurrent)]
    constants.append(w.constant(np.concatenate([biases, np.zeros_like(biases)])[None], "float32"))
    places = (at.hidden, at.cell)
    name, alpha, beta = _function(op)
    states, seen = _states(w, places), w.constant(peepholes[None], "float32")
    if (bound := op.options.CellClip()) > 0:
        if name != "Tanh":
            raise ValueError("bounds of its cell are supported with tanh only")
        reverse = direction == "reverse"
        operands = [_reversed(w, data) if reverse else data, *constants, *states, seen, w.constant(bound, "float32")]
        result = w.add(clipped_lstm.NAME, operands, 3, domain=clipped_lstm.DOMAIN)
        result = [_reversed(w, result[0]) if reverse else result[0], *result[1:]]
    else:
        facts = {"activation_alpha": [alpha] * 3, "activation_beta": [beta] * 3, "hidden_size": units}
        operands = [data, *constants, "", *states, *([seen] if peepholes.any() else [])]
        result = w.add("LSTM", operands, 3, direction=direction, activations=["Sigmoid", name, name], **facts)
    _kept(w, places, result[1:])
    return result[0]


def _reversed(w: Writer, value: str) -> str:
    """Return steps from the last to the first."""
    bounds = [w.constant([n], "int64") for n in (-1, np.iinfo("int64").min, 0, -1)]
    return w.add("Slice", [value, *bounds])


def _lstm(w: Writer, op: Operator) -> None:
    _floats(w)
    if any(w.has(n) for n in range(20, 24)):
        raise ValueError("its gates are normalized, which is not supported")
    if op.kind == "LSTM" and op.options.KernelType():
        raise ValueError("the basic kernel of LSTM is not supported")
    data, first = _begin(w, op)
    output = _lstm_direction(w, op, data, _FORWARD, "forward")
    _finish(w, op, [output], first)


def _both_lstm(w: Writer, op: Operator) -> None:
    _floats(w)
    if any(w.has(n) for n in range(39, 48)):
        raise ValueError("auxiliary inputs are not supported")
    data, first = _begin(w, op)
    pairs = zip(_BOTH, ("forward", "reverse"), strict=True)
    _finish(w, op, [_lstm_direction(w, op, data, at, direction) for at, direction in pairs], first)


def _rnn_direction(w: Writer, op: Operator, data: str, start: int, direction: str) -> str:
    weights, recurrent, bias = (_real(w, op, start + n)[None] for n in range(3))
    constants = [w.constant(each, "float32") for each in (weights, recurrent)]
    constants.append(w.constant(np.concatenate([bias, np.zeros_like(bias)], 1), "float32"))
    places = (start + 3,)
    name, alpha, beta = _function(op)
    facts = {"activations": [name], "activation_alpha": [alpha], "activation_beta": [beta]}
    operands = [data, *constants, "", *_states(w, places)]
    result = w.add("RNN", operands, 2, hidden_size=recurrent.shape[-1], direction=direction, **facts)
    _kept(w, places, result[1:])
    return result[0]


def _rnn(w: Writer, op: Operator) -> None:
    _floats(w)
    data, first = _begin(w, op)
    _finish(w, op, [_rnn_direction(w, op, data, 1, "forward")], first)


def _both_rnn(w: Writer, op: Operator) -> None:
    _floats(w)
    if any(w.has(n) for n in range(9, 12)):
        raise ValueError("auxiliary inputs are not supported")
    data, first = _begin(w, op)
    pairs = ((1, "forward"), (5, "reverse"))
    _finish(w, op, [_rnn_direction(w, op, data, *each) for each in pairs], first)


def _svdf(w: Writer, op: Operator) -> None:
    """SVDF: filters of features, whose last results are kept, and filters of those in time.

    Its inputs are data ``[B, I]``, filters of features ``[F, I]`` and in time ``[F, M]``, biases ``[units]`` and the
    variable ``[B, F·M]``. F is the units' number times the rank.
    """
    kept, time = w.given(4), w.given(2).shape
    batch, filters, rank = w.given(0).shape[0], time[0], op.options.Rank()
    view = [batch, *time]
    if rank < 1 or filters % rank:
        raise ValueError(f"its {filters} filters have the rank {rank}")
    before = w.moved(state(w, kept.number, kept), shape=view)
    feature = w.add("MatMul", [w.read(0), w.read(1, (1, 0))])
    if kept.quantization is not None:
        feature = w.quantized(feature, kept)
    newest = w.moved(feature, shape=[batch, filters, 1])
    bounds = [w.constant([n], "int64") for n in (1, time[1], 2)]
    everything = w.add("Concat", [w.add("Slice", [before, *bounds]), newest], axis=2)
    keep(w, kept.number, kept, w.moved(everything, shape=kept.shape))
    products = w.add("Mul", [w.dequantized(everything, kept), w.read(2)])
    sums = w.moved(products, shape=[batch, filters // rank, rank * time[1]])
    result = w.add("ReduceSum", [sums, w.constant([2], "int64")], keepdims=0)
    if w.has(3):
        result = w.add("Add", [result, w.read(3)])
    # In integers the least code is the bound, as in TensorFlow Lite.
    w.write(result if kept.quantization is not None else w.activated(result, op.options.FusedActivationFunction()))


CONVERTERS: Mapping[str, Callable[[Writer, Operator], None]] = {
    "LSTM": _lstm,
    "UNIDIRECTIONAL_SEQUENCE_LSTM": _lstm,
    "BIDIRECTIONAL_SEQUENCE_LSTM": _both_lstm,
    "RNN": _rnn,
    "UNIDIRECTIONAL_SEQUENCE_RNN": _rnn,
    "BIDIRECTIONAL_SEQUENCE_RNN": _both_rnn,
    "SVDF": _svdf,
}
