"""Recurrent layers: LSTM, GRU and plain ones, from the product of their input on, all steps in one call.

Relax has no operator for them: ``nnfuze.recurrence`` is our own, see `form.Form` for what it reads and makes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Op
from tvm.relax import op
from tvm.relax.transform.legalize_ops.common import register_legalize

from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.integers.context import Integers, Unsupported
from nnfuze_tvm.graph.integers.values import INT32_MAX
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.ops import _onnx_recurrence as onnx
from nnfuze_tvm.graph.ops.operator import Example, Operator, Recurs
from nnfuze_tvm.graph.recurrent.cell import Activation, Cell, Math, arrays, tensors
from nnfuze_tvm.graph.recurrent.form import LEVELS, Form, Sizes, operand_shapes, operand_types
from nnfuze_tvm.graph.recurrent.kernel import prim_func
from nnfuze_tvm.graph.recurrent.tile import Tile

_NAME = "relax.nnfuze.recurrence"


def recurrence(form: Form, operands: Sequence[Value]) -> Call:
    """Return a call of a recurrent layer.

    Parameters
    ----------
    form : Form
        What it computes.
    operands : sequence of Expr
        In the order of ``form.operands``.
    """
    return Call(Op.get(_NAME), list(operands), tvm.ir.make_node("ir.DictAttrs", **form.attributes()))


def _read(call: Call) -> tuple[Form, Sizes]:
    projection, _, hidden = call.args[:3]
    return Form.of(call.attrs), Sizes.of(static_shape(projection), static_shape(hidden), str(projection.ty.dtype))


def _infer(call: Call, _: relax.BlockBuilder) -> relax.TensorType:
    form, sizes = _read(call)
    wanted = list(operand_shapes(form, sizes).values())
    given, types = [static_shape(arg) for arg in call.args], [str(arg.ty.dtype) for arg in call.args]
    if given != wanted or types != list(operand_types(form, sizes).values()):
        raise ValueError(f"a recurrent layer of {form.kind} reads {wanted}, not {given} of {', '.join(types)}")
    return relax.TensorType(sizes.result(form), sizes.dtype)


def _legalize(builder: relax.BlockBuilder, call: Call) -> Call:
    form, sizes = _read(call)
    kernel = builder.add_func(prim_func(form, sizes, Tile()), form.kind)
    return relax.call_tir(kernel, list(call.args), call.ty)


def evaluate(call: Call, *operands: np.ndarray) -> np.ndarray:
    """Return all hidden states, step by step."""
    form, sizes = _read(call)
    named = dict(zip(form.operands, operands, strict=True))
    m = arrays(np.dtype(sizes.dtype))
    rows = [_run(form, sizes, d, m, named, partial(_product, form, named, d)) for d in range(sizes.directions)]
    return np.stack([np.stack(one) for one in rows], 1)


def _product(form: Form, named: dict[str, np.ndarray], d: int, states: np.ndarray, columns: slice) -> np.ndarray:
    """Return the product of states and some columns of a direction's weights."""
    weights = named["weights"][d, :, columns]
    if form.dynamic:
        return _dynamic_product(states, weights, named["scales"][d, columns])
    if not form.scale:
        return states @ weights
    codes = form.codes(states)
    if not form.integer:
        return codes * np.float32(form.scale) @ weights
    # Exact: no sum of int32 is beyond the whole numbers of float64.
    sums = codes.astype("float64") @ weights.astype("float64")
    return sums.astype("float32") * named["scales"][d, columns]


def _dynamic_product(states: np.ndarray, weights: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """Return the product of codes of states by their range and codes of weights, as float32."""
    high, low = np.float32(states.max(initial=0)), np.float32(states.min(initial=0))
    scale = (high - low) / np.float32(255) or np.float32(1)
    zero = np.rint(np.clip(-low / scale, 0, 255))
    codes = np.rint(np.clip(states / scale, -zero, 255 - zero))
    sums = codes.astype("int64") @ weights.astype("int64")
    return sums.astype("float32") * (scale * scales)


def _parts(values: Any, count: int) -> list[Any]:
    """Return the last axis in equal parts."""
    width = values.shape[-1] // count
    return [values[..., part * width : (part + 1) * width] for part in range(count)]


def _run(form: Form, sizes: Sizes, d: int, m: Math, named: Mapping[str, Any], product: Callable[..., Any]) -> list[Any]:
    """Return the hidden states of one direction by step, and the last state of the cell where that is kept."""
    cell, units = form.cells[d], sizes.hidden
    hidden = named["hidden"][d]
    state = named["cell"][d] if form.kind == "lstm" else hidden
    peepholes = _parts(named["peepholes"][d], 3) if form.peepholes else []
    projection, width = named["projection"].reshape(sizes.steps, sizes.batch, -1), form.gates * sizes.hidden
    result: dict[int, Any] = {}
    steps = range(sizes.steps)
    for step in reversed(steps) if form.reverse[d] else steps:
        inputs = projection[step, :, d * width : (d + 1) * width]
        products = product(hidden, slice(None))
        if form.kind == "rnn":
            hidden = cell.rnn(m, inputs + products)
        elif form.kind == "lstm":
            hidden, state = cell.lstm(m, _parts(inputs + products, 4), state, peepholes)
        else:
            own, gates = _parts(inputs, 3), _parts(products, 3)
            update, reset = (cell.gate(m, own[n] + gates[n]) for n in range(2))
            if form.waits:
                total = own[2] + product(reset * hidden, slice(2 * units, None))
            else:
                total = own[2] + reset * (gates[2] + named["bias"][d])
            hidden = cell.gru(m, update, total, hidden)
        result[step] = hidden
    rows = [result[step] for step in steps]
    return [*rows, state] if form.keeps_cell else rows


def train(torch: Any, call: Call, *operands: Any) -> Any:
    """Return what `evaluate` does; rounding of states to codes has the gradient one."""
    form, sizes = _read(call)
    if form.integer:
        raise NNFuzeError("a recurrent layer of integers can't be trained: give the network in float32")
    named = dict(zip(form.operands, operands, strict=True))

    def product(d: int, states: Any, columns: slice) -> Any:
        if form.scale:
            exact = torch.clamp(states / form.scale, -LEVELS, LEVELS)
            states = (exact + (torch.round(exact) - exact).detach()) * form.scale
        return states @ named["weights"][d, :, columns]

    rows = [_run(form, sizes, d, tensors(torch), named, partial(product, d)) for d in range(sizes.directions)]
    return torch.stack([torch.stack(one) for one in rows], 1)


def macs(call: Call) -> int:
    """Return the multiply-accumulates of all steps; the input's product is another layer."""
    form, s = _read(call)
    return s.steps * s.directions * s.batch * form.gates * s.hidden * s.hidden


def integer(context: Integers, call: Call, name: str) -> Value | None:
    """Multiply codes of the states by int8 weights; everything else stays in float32."""
    form, _ = _read(call)
    if form.integer:
        return None
    if not form.scale:
        raise Unsupported("its states are not quantized")
    weights = context.weight(call.args[1], None)
    assert weights.codes is not None and weights.scale is not None
    if weights.scale.shape[1] != 1 or weights.codes.min(initial=0) == -128:
        raise Unsupported("its weights are not symmetric along its units")
    count, _, columns = weights.codes.shape
    totals, bound = weights.codes.sum(1), LEVELS * np.abs(weights.codes).sum(1).max(initial=0)
    if bound > INT32_MAX:
        raise Unsupported("its sums do not fit int32")
    scales = np.broadcast_to(weights.scale[:, 0] * np.float32(form.scale), (count, columns))
    added = [constant(scales, "float32"), constant(totals, "int32")]
    operands = [context.as_float(arg) for arg in call.args]
    operands[1] = constant(weights.codes, "int8")
    return context.emit(recurrence(replace(form, codes_in="int8"), [*operands, *added]), name)


def in_8_bits(
    call: Call, limit: float, stored: tuple[np.ndarray, np.ndarray] | None, emit: Callable[[Value], Value]
) -> Call:
    """Return the call with its states rounded to multiples of ``limit / 127`` and weights in int8, a scale per sum."""
    form, s = _read(call)
    rows = array(call.args[1]).transpose(0, 2, 1).reshape(-1, s.hidden)
    scale = np.maximum(np.abs(rows).max(1) / LEVELS, 1e-30).astype("float32")
    if stored is not None and np.abs(stored[0]).max(initial=0) <= LEVELS and stored[1].shape[1] == 1:
        columns = (s.directions, 1, form.gates * s.hidden)
        scale = np.broadcast_to(stored[1], columns).reshape(-1).astype("float32")
    codes = np.clip(np.rint(rows / scale[:, None]), -LEVELS, LEVELS).astype("int8")
    zeros = constant(np.zeros(len(rows), "int8"))
    wide = emit(op.dequantize(constant(codes), constant(scale), zeros, axis=0, out_dtype="float32"))
    wide = emit(op.permute_dims(emit(op.reshape(wide, [s.directions, -1, s.hidden])), [0, 2, 1]))
    return recurrence(
        replace(form, scale=float(np.float32((limit or 1.0) / LEVELS))), [call.args[0], wide, *call.args[2:]]
    )


def _in_integers(call: Call) -> bool:
    form, _ = _read(call)
    return form.integer or bool(form.scale)


def states(call: Call) -> tuple[Value, float]:
    """Return the hidden states at the beginning, and what those of all steps are within, as far as that is known."""
    form, _ = _read(call)
    bounded = form.kind == "lstm" and all(
        cell.activations[0].name == "sigmoid" and cell.activations[2].name == "tanh" for cell in form.cells
    )
    return call.args[2], 1.0 if bounded else math.inf


def _example(form: Form, sizes: Sizes, constant: bool = True) -> Example:
    """Return a call of which the weights, an example's last operand, may be a constant."""
    shapes = operand_shapes(form, sizes)
    given = [name for name in shapes if name != "weights"] + ["weights"]

    def call(*operands: Any) -> Call:
        named = dict(zip(given, operands, strict=True))
        return recurrence(form, [named[name] for name in form.operands])

    return Example(tuple(shapes[name] for name in given), call, constants=int(constant), low=-0.5, high=0.5)


def _form(kind: Any, *names: str, reverse: tuple[bool, ...] = (False,), **facts: Any) -> Form:
    functions = tuple(Activation(name, 1.0, 0.0) for name in names)
    peepholes, keeps = facts.pop("peepholes", False), facts.pop("keeps_cell", False)
    return Form((Cell(kind, functions, **facts),) * len(reverse), reverse, peepholes, keeps)


_LSTM = ("sigmoid", "tanh", "tanh")
_EXAMPLES = (
    _example(_form("lstm", *_LSTM, keeps_cell=True), Sizes(5, 1, 1, 24, "float32")),
    _example(_form("lstm", *_LSTM, reverse=(False, True), peepholes=True, bound=0.3), Sizes(3, 2, 2, 10, "float32")),
    _example(_form("lstm", *_LSTM), Sizes(3, 1, 1, 8, "float32"), constant=False),
    _example(_form("gru", "sigmoid", "tanh", linear_before_reset=True), Sizes(5, 1, 1, 16, "float32")),
    _example(_form("gru", "sigmoid", "tanh"), Sizes(4, 1, 2, 20, "float32")),
    _example(_form("rnn", "tanh", reverse=(True,)), Sizes(4, 1, 3, 33, "float32")),
)


def _register() -> None:
    """Make the operator known to TVM."""
    tvm.ir._ffi_api.RegisterOp(_NAME, "A recurrent layer from the product of its input on.")
    operator = Op.get(_NAME)
    operator.set_attr("FInferType", _infer)
    operator.set_attr("FPurity", True)
    register_legalize(_NAME, _legalize)


_register()

OPERATORS = {
    "nnfuze.recurrence": Operator(
        effect="layer",
        evaluate=evaluate,
        train=train,
        examples=_EXAMPLES,
        macs=macs,
        degrees=lambda call: [None] * len(call.args),
        quantizes=True,
        integer=integer,
        recurs=Recurs(states, in_8_bits, _in_integers),
        kernels=("recurrence",),
    ),
}

ONNX = {"nnfuze.recurrence": onnx.recurrence}
