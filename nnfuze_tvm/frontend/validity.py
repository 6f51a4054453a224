"""Whether a node means anything with the shapes that it gets, by the rules of ONNX alone."""

from __future__ import annotations

import contextlib

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference

from nnfuze_tvm.frontend.onnx_tensors import first_line
from nnfuze_tvm.frontend.operators.node import Operands, Tensors, known
from nnfuze_tvm.graph import ir

# Shapes and axes are shorter.
_MOST_VALUES = 1024


def contradiction(node: onnx.NodeProto, operands: Operands, opset: int) -> str:
    """Return why a node can't take these operands, as ONNX itself says it; an empty string if it says nothing.

    Parameters
    ----------
    node : onnx.NodeProto
        A node. What Microsoft's operators take, ONNX doesn't know, and what subgraphs see of their surroundings isn't
        at hand here: of both it says nothing.
    operands : list
        Its inputs, None for one that is left out.
    opset : int
        Version of the operator set.
    """
    if node.domain not in ("", "ai.onnx") or any(attribute.HasField("g") for attribute in node.attribute):
        return ""
    if any(isinstance(value, Tensors) for value in operands):
        return ""
    with contextlib.suppress(defs.SchemaError):
        fewest = defs.get_schema(node.op_type, opset).min_input
        if len(operands) < fewest:
            return f"it has {len(operands)} inputs, {fewest} are needed"
    alone = onnx.NodeProto()
    alone.CopyFrom(node)
    names = ["" if value is None else f"in{place}" for place, value in enumerate(operands)]
    del alone.input[:]
    alone.input.extend(names)
    inputs, weights = [], []
    for name, value in zip(names, operands, strict=True):
        if value is None:
            continue
        shape, kind = ir.static_shape(value), helper.np_dtype_to_tensor_dtype(np.dtype(str(value.ty.dtype)))
        inputs.append(helper.make_tensor_value_info(name, kind, shape))
        values = known(value)
        if values is not None and values.size <= _MOST_VALUES:
            weights.append(numpy_helper.from_array(values, name))
    outputs = [helper.make_empty_tensor_value_info(name) for name in node.output if name]
    graph = helper.make_graph([alone], "node", inputs, outputs, weights)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])
    try:
        shape_inference.infer_shapes(model, strict_mode=True)
    except shape_inference.InferenceError as error:
        # "[ShapeInferenceError] Inference error(s): (op_type:Add, node name: n): [ShapeInferenceError] the reason"
        return first_line(error).rpartition("]")[2].strip() or "its operands don't fit it"
    return ""
