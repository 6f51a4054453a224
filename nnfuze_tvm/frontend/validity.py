"""Whether a node means anything with the shapes that it gets, by the rules of ONNX alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
from onnx import defs, helper, numpy_helper, shape_inference

from nnfuze_tvm.errors import first_line
from nnfuze_tvm.frontend.onnx_door import impossible_size
from nnfuze_tvm.frontend.operators.node import Operands, Tensors, known
from nnfuze_tvm.graph import ir

# Shapes and axes are shorter.
_MOST_VALUES = 1024
_FEW, _LARGE = 32, 1 << 16


def misuse(node: onnx.NodeProto, opset: int) -> str:
    """Return why a node can't be of its operator, whatever it is given; an empty string if it can.

    Parameters
    ----------
    node : onnx.NodeProto
        A node; of operators that ONNX doesn't know nothing is said.
    opset : int
        Version of the operator set.
    """
    if node.domain not in ("", "ai.onnx"):
        return ""
    try:
        schema = defs.get_schema(node.op_type, opset)
    except defs.SchemaError:
        return ""
    given = max((n for n, name in enumerate(node.input, 1) if name), default=0)
    if not schema.min_input <= len(node.input) or given > schema.max_input:
        wanted = schema.min_input if len(node.input) < schema.min_input else f"{schema.max_input} at most"
        return f"it has {len(node.input)} inputs, {wanted} are needed"
    for attribute in node.attribute:
        known = schema.attributes.get(attribute.name)
        if known is not None and not attribute.ref_attr_name and _number(known.type) != attribute.type:
            wanted = onnx.AttributeProto.AttributeType.Name(_number(known.type))
            return f"its attribute {attribute.name!r} is of another type than {wanted}"
        if attribute.name == "keepdims" and attribute.i not in (0, 1):
            return f"its attribute 'keepdims' is {attribute.i}"
    return ""


def _number(kind: Any) -> int:
    return int(kind.value)


def contradiction(node: onnx.NodeProto, operands: Operands, opset: int) -> str:
    """Return why a node can't take these operands, as ONNX itself says it; an empty string if it says nothing.

    That what it makes is too large is a reason, too.

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
        inferred = shape_inference.infer_shapes(model, strict_mode=True)
    except shape_inference.InferenceError as error:
        # "[ShapeInferenceError] Inference error(s): (op_type:Add, node name: n): [ShapeInferenceError] the reason"
        return first_line(error).rpartition("]")[2].strip() or "its operands don't fit it"
    except Exception as error:  # the C++ of ONNX, where numbers are too large for it
        return f"ONNX can't say what it makes ({first_line(error)})"
    for value in inferred.graph.output:
        dims = value.type.tensor_type.shape.dim
        if all(dim.HasField("dim_value") for dim in dims):
            if min((dim.dim_value for dim in dims), default=0) < 0:
                return f"its result would have the shape {[dim.dim_value for dim in dims]}"
            if reason := impossible_size([dim.dim_value for dim in dims]):
                return f"a result {reason}"
    return ""


def objection(node: onnx.NodeProto, operands: Operands, opset: int) -> str:
    """Return what is wrong with a node that nobody should even try to convert; an empty string if nothing is.

    The parameters are those of `contradiction`.
    """
    return misuse(node, opset) or (contradiction(node, operands, opset) if _is_suspicious(node, operands) else "")


def _is_suspicious(node: onnx.NodeProto, operands: Operands) -> bool:
    """Return whether large numbers may make something too large, which takes long before it fails."""
    if any(abs(number) > _LARGE for attribute in node.attribute for number in (attribute.i, *attribute.ints)):
        return True
    found = (known(value) for value in operands if value is not None and not isinstance(value, Tensors))
    kinds = "iuf" if node.op_type in ("Resize", "Upsample") else "iu"
    few = [a.astype("float64") for a in found if a is not None and 0 < a.size <= _FEW and a.dtype.kind in kinds]
    return any(np.abs(a).max() > _LARGE for a in few)
