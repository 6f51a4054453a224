"""A node that stands for several others: they are imported in its place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from onnx import helper
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Node, known
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def in_float32(node: Node, value: Value) -> Value:
    """Return a tensor in float32, a constant as a constant."""
    if str(value.ty.dtype) == "float32":
        return value
    number = known(value)
    return node.emit(relax.op.astype(value, "float32")) if number is None else constant(number.astype("float32"))


class Expansion:
    """ONNX nodes that one node stands for."""

    def __init__(self, node: Node, name: str = "") -> None:
        self.node = node
        self.name = name or node.proto.name
        self.nodes: list[onnx.NodeProto] = []
        self.operands: dict[str, Value] = {}

    def operand(self, value: Value | None) -> str:
        """Return the name of an input; "" for one that is left out."""
        if value is None:
            return ""
        name = f"in{len(self.operands)}"
        self.operands[name] = value
        return name

    def add(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return that one's name."""
        output = f"v{len(self.nodes)}"
        self.extend(operator, inputs, [output], **attributes)
        return output

    def extend(self, operator: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> None:
        """Add a node with any number of outputs."""
        self.nodes.append(helper.make_node(operator, inputs, outputs, name=self.name, **attributes))

    def real(self, codes: Value, scale: Value, zero: Value | None, axis: int = 0) -> str:
        """Dequantize an operand, in float32."""
        if scale is None:
            raise ValueError("an operand has no scale")
        names = self.operand(codes), self.operand(in_float32(self.node, scale)), self.operand(zero)
        return self.add("DequantizeLinear", *names, axis=axis)

    def bias(self, codes: Value, *scales: Value) -> str:
        """Dequantize what is added to sums of products; its scale is the product of the operands'."""
        factors = [factor for factor in map(known, scales) if factor is not None]
        if len(factors) < len(scales):
            raise ValueError("scales that are not constant are not supported with a bias")
        product = np.prod(np.broadcast_arrays(*[np.squeeze(factor) for factor in factors]), axis=0, dtype="float32")
        return self.real(codes, constant(np.asarray(product, "float32")), None)

    def codes(self, value: str, scale: Value | None, zero: Value | None) -> list[Value]:
        """Return the value in 8 bits: the end."""
        if scale is None:
            raise ValueError("its output has no scale")
        names = self.operand(in_float32(self.node, scale)), self.operand(zero)
        return self.results(self.add("QuantizeLinear", value, *names))

    def results(self, *names: str) -> list[Value]:
        """Import the nodes and return some of their values."""
        inputs = [helper.make_empty_tensor_value_info(name) for name in self.operands]
        outputs = [helper.make_empty_tensor_value_info(name) for name in names]
        graph = helper.make_graph(self.nodes, self.name, inputs, outputs)
        return self.node.body(graph, list(self.operands.values()))

    def attributes(self, *names: str) -> dict[str, Any]:
        """Return those of the node's attributes that it has."""
        return {name: self.node.attributes[name] for name in names if name in self.node.attributes}
