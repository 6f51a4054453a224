"""The ONNX form of recurrent layers."""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm.ir import Call

from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.graph.onnx_form import Writer, dtype_of, require
from nnfuze_tvm.graph.recurrent.cell import DEFAULTS
from nnfuze_tvm.graph.recurrent.form import Form, Sizes

_NAMES = {
    "leakyrelu": "LeakyRelu",
    "thresholdedrelu": "ThresholdedRelu",
    "scaledtanh": "ScaledTanh",
    "hardsigmoid": "HardSigmoid",
}
_DIRECTIONS = {(False,): "forward", (True,): "reverse", (False, True): "bidirectional"}


def recurrence(write: Writer, call: Call, *operands: str) -> str:
    """Run a recurrent layer."""
    form = Form.of(call.attrs)
    sizes = Sizes.of(static_shape(call.args[0]), static_shape(call.args[2]), dtype_of(call.args[0]))
    require(not form.scale and not form.integer, "has states in 8 bits, for which ONNX has no operator")
    require(not form.cells[0].bound, "has a cell with bounds, for which ONNX has no operator")
    require(form.reverse in _DIRECTIONS, "has directions in another order than ONNX's")
    own, width = dict(zip(form.operands, operands, strict=True)), form.gates * sizes.hidden
    rows, weights, bias = _input(write, own["projection"], sizes, width)
    inputs = [
        write.reshaped(rows, [sizes.steps, sizes.batch, weights.shape[-1]]),
        write.constant(weights, sizes.dtype),
        write("Transpose", own["weights"], perm=[0, 2, 1]),
        _bias(write, own.get("bias"), bias, sizes),
        "",
        own["hidden"],
    ]
    if form.kind == "lstm":
        inputs += [own["cell"], *([own["peepholes"]] if form.peepholes else [])]
    kept = 3 if form.keeps_cell else 1
    found = write.several(form.kind.upper(), inputs, kept, **_cell_facts(form, sizes))
    if not form.keeps_cell:
        return found[0]
    return write("Concat", found[0], write("Unsqueeze", found[2], write.integers([0])), axis=0)


def _input(write: Writer, projection: str, sizes: Sizes, width: int) -> tuple[str, np.ndarray, np.ndarray]:
    """Return what ONNX's layer multiplies itself ``[T·B, I]``, by what ``[D, G·H, I]``, and what it adds ``[D, G·H]``.

    Where the projection is no product with constant weights, it is taken as it is, and each direction picks its part.
    """
    columns = sizes.directions * width
    bias, product = np.zeros(columns), projection
    if (added := write.maker(product, "Add")) and write.shape(added.inputs[1]) == (columns,):
        product, bias = added.inputs[0], write.constants[added.inputs[1]]
    multiplied = write.maker(product, "MatMul")
    if multiplied and len(write.shape(multiplied.inputs[1])) == 2:
        rows, weights = multiplied.inputs[0], write.constants[multiplied.inputs[1]].T
    else:
        rows, weights, bias = projection, np.eye(columns), np.zeros(columns)
    return rows, weights.reshape(sizes.directions, width, -1), bias.reshape(sizes.directions, width)


def _bias(write: Writer, kept: str | None, bias: np.ndarray, sizes: Sizes) -> str:
    """Return what is added ``[D, 2·G·H]``: to the input's product, then what a GRU resets with the state's."""
    inner = np.zeros_like(bias)
    if kept is None or kept in write.constants:
        if kept is not None:
            inner[:, -sizes.hidden :] = write.constants[kept]
        return write.constant(np.concatenate([bias, inner], 1), sizes.dtype) if bias.any() or inner.any() else ""
    gates = write.constant(inner[:, : -sizes.hidden], sizes.dtype)
    return write("Concat", write.constant(bias, sizes.dtype), gates, kept, axis=1)


def _cell_facts(form: Form, sizes: Sizes) -> dict[str, Any]:
    first = form.cells[0]
    functions = [function for cell in form.cells for function in cell.activations]
    facts: dict[str, Any] = {
        "hidden_size": sizes.hidden,
        "direction": _DIRECTIONS[form.reverse],
        "activations": [_NAMES.get(function.name, function.name.capitalize()) for function in functions],
    }
    for place, name in enumerate(("alpha", "beta")):
        values = [getattr(function, name) for function in functions if len(DEFAULTS[function.name]) > place]
        if values:
            facts[f"activation_{name}"] = values
    if first.clip:
        facts["clip"] = first.clip
    if first.coupled:
        facts["input_forget"] = 1
    if first.linear_before_reset:
        facts["linear_before_reset"] = 1
    return facts
