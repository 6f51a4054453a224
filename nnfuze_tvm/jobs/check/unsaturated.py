"""ONNX networks whose 8-bit products no machine saturates.

x86 CPUs without VNNI multiply unsigned by signed bytes with an instruction that adds two products in int16. ONNX
Runtime uses it there, so that 2 · 255 · 127 becomes 32767 [1]_. With both factors unsigned it is exact: int8 weights
become uint8 by adding 128 to them and to their zero points.

.. [1] ONNX Runtime's documentation, "Quantize ONNX models", on reduced ranges.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import numpy_helper

from nnfuze_tvm.frontend.onnx_tensors import bodies, nodes

# Where operators have weights and the zero points of these.
_WEIGHTS = {
    "ConvInteger": ((1, 3),),
    "DynamicQuantizeLSTM": ((1, 9), (2, 11)),
    "DynamicQuantizeMatMul": ((1, 3),),
    "MatMulInteger": ((1, 3),),
    "MatMulIntegerToFloat": ((1, 5),),
    "QGemm": ((3, 5),),
    "QLinearConv": ((3, 5),),
    "QLinearMatMul": ((3, 5),),
}
_MOVED = 128


def multiplies_bytes(model: onnx.ModelProto) -> bool:
    """Tell whether ONNX Runtime may multiply 8-bit numbers: in such operators, or in what it makes of QDQ."""
    return any(node.op_type in _WEIGHTS or node.op_type == "DequantizeLinear" for node in nodes(model.graph))


def unsaturated(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return a network of the same values that multiplies unsigned data by unsigned weights.

    Weights of signed data stay: they are never multiplied by that instruction.
    """
    if not any(node.op_type in _WEIGHTS for node in nodes(model.graph)):
        return model
    result = onnx.ModelProto()
    result.CopyFrom(model)
    kinds = _kinds(result)
    constants = {tensor.name: tensor for body in bodies(result.graph) for tensor in body.initializer}
    moved: dict[str, onnx.TensorProto] = {}
    # What is inside of a node comes before it: appending copies.
    for body in reversed(bodies(result.graph)):
        before = list(body.node)
        del body.node[:]
        for node in before:
            signed = kinds.get(node.input[0]) == onnx.TensorProto.INT8 if node.input else True
            for weight, zero in () if signed else _WEIGHTS.get(node.op_type, ()):
                if kinds.get(node.input[weight]) == onnx.TensorProto.INT8:
                    node.input.extend([""] * (zero + 1 - len(node.input)))
                    for place in (weight, zero):
                        node.input[place], made = _moved(node.input[place], node.output[0], constants, moved)
                        body.node.extend(made)
            body.node.append(node)
    result.graph.initializer.extend(moved.values())
    return result


def _moved(
    name: str, result: str, constants: dict[str, onnx.TensorProto], moved: dict[str, onnx.TensorProto]
) -> tuple[str, list[onnx.NodeProto]]:
    """Return what holds an int8 tensor, or its missing zero point, as uint8 for a result, and nodes that make it."""
    new = f"{name}/unsigned"
    if name and name not in constants:
        new = f"{new}/{result}"
        moved["/moved"] = numpy_helper.from_array(np.array(_MOVED, "int32"), "/moved")
        made = [
            onnx.helper.make_node("Cast", [name], [f"{new}/wide"], to=onnx.TensorProto.INT32),
            onnx.helper.make_node("Add", [f"{new}/wide", "/moved"], [f"{new}/added"]),
            onnx.helper.make_node("Cast", [f"{new}/added"], [new], to=onnx.TensorProto.UINT8),
        ]
        return new, made
    values = numpy_helper.to_array(constants[name]).astype("int16") if name else np.zeros((), "int16")
    moved[new] = numpy_helper.from_array((values + _MOVED).astype("uint8"), new)
    return new, []


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    """Return the types of elements as far as they are known."""
    try:
        typed = onnx.shape_inference.infer_shapes(model)
    except Exception:  # too large, or something that ONNX doesn't know: then declared types are all there is
        typed = model
    found = {
        value.name: value.type.tensor_type.elem_type
        for body in bodies(typed.graph)
        for value in (*body.input, *body.value_info, *body.output)
    }
    found |= {tensor.name: tensor.data_type for body in bodies(model.graph) for tensor in body.initializer}
    return found
