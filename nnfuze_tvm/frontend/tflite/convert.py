"""From a TensorFlow Lite file to an ONNX network that computes the same."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import onnx
from onnx import helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import clipped_lstm
from nnfuze_tvm.frontend.onnx_states import set_states
from nnfuze_tvm.frontend.tflite import variables
from nnfuze_tvm.frontend.tflite.file import Tensor, damaged, parse
from nnfuze_tvm.frontend.tflite.operators import CONVERTERS
from nnfuze_tvm.frontend.tflite.writer import Writer, checked

_OPSET, _IR_VERSION = 21, 10


def to_onnx(data: bytes, label: str) -> onnx.ModelProto:
    """Return a file's network in ONNX's words.

    Quantized tensors stand between QuantizeLinear and DequantizeLinear, images have their channels first between two
    Transpose nodes, and nodes are named after the tensors that they make. Inputs and outputs are the file's, by name,
    shape and type; behind them stand the states of variables (`onnx_states`).

    Parameters
    ----------
    data : bytes
        The file.
    label : str
        What messages call it.

    Raises
    ------
    ModelError
        If it is damaged, or holds operators that are not supported; all of them are named.
    """
    network = parse(data, label)
    writer = Writer(network)
    problems = []
    try:
        inputs = [_value(checked(tensor)) for tensor in network.inputs]
        outputs = [_value(checked(tensor)) for tensor in network.outputs]
    except ValueError as error:
        raise ModelError(f"{label}: {error}") from None
    for operator in network.operators:
        writer.operator = operator
        name = operator.outputs[0].name if operator.outputs else ""
        convert = CONVERTERS.get(operator.kind)
        try:
            if convert is None:
                raise ValueError("the operator is not supported")
            convert(writer, operator)
        except ValueError as error:
            problems.append(f"node {name!r} ({operator.kind}): {error}")
        except Exception:  # options are read here; see `parse`
            raise damaged(label) from None
    if problems:
        raise ModelError(f"{label}: {'; '.join(problems)}")
    _bind_outputs(writer, network.outputs)
    before, after = variables.states(writer)
    graph = helper.make_graph(
        writer.nodes, "main", [*inputs, *before], [*outputs, *after], list(writer.constants.values())
    )
    opsets, functions = [helper.make_opsetid("", _OPSET)], []
    if any(node.domain == clipped_lstm.DOMAIN for node in writer.nodes):
        opsets.append(helper.make_opsetid(clipped_lstm.DOMAIN, clipped_lstm.VERSION))
        functions.append(clipped_lstm.function(_OPSET))
    model = helper.make_model(graph, opset_imports=opsets, ir_version=_IR_VERSION, functions=functions)
    set_states(model, [(taken.name, given.name) for taken, given in zip(before, after, strict=True)])
    return model


def _bind_outputs(writer: Writer, outputs: Sequence[Tensor]) -> None:
    """Give every output its name, also if it is an input or a constant."""
    for tensor in outputs:
        if (name := writer.bind(tensor)) != tensor.name:
            writer.nodes.append(helper.make_node("Identity", [name], [tensor.name], name=f"{tensor.name}/Identity"))


def _value(tensor: Tensor) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(
        tensor.name, helper.np_dtype_to_tensor_dtype(np.dtype(tensor.dtype)), tensor.shape
    )
