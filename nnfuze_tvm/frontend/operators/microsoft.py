"""Operators of ``com.microsoft`` that ONNX Runtime's optimizer and exporters of transformers write: normalization,
embeddings, activations and products; `microsoft_attention` has the attentions.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.frontend.operators.attention import looked_up
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import dtype_of, scalar
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape


def _sum(node: Node, parts: list[Value | None]) -> Value:
    return reduce(lambda one, other: node.emit(op.add(one, other)), [part for part in parts if part is not None])


def _fast_gelu(node: Node, inputs: Operands) -> Any:
    return op.nn.gelu_tanh(_sum(node, [inputs[0], inputs[1]]))


def _gelu(node: Node, inputs: Operands) -> Any:
    return op.nn.gelu(_sum(node, [inputs[0], inputs[1]]))


def _quick_gelu(node: Node, inputs: Operands) -> Any:
    scaled = op.multiply(inputs[0], scalar(node.attributes.get("alpha", 1.702), inputs[0]))
    return op.multiply(inputs[0], node.emit(op.sigmoid(node.emit(scaled))))


def _layer_norm(node: Node, data: Value, gamma: Value, beta: Value | None) -> Value:
    if beta is None:
        beta = constant(np.zeros(static_shape(gamma), dtype_of(gamma)))
    return op.nn.layer_norm(data, gamma, beta, [-1], float(node.attributes.get("epsilon", 1e-12)))


def _embed_layer_norm(node: Node, inputs: Operands) -> Any:
    """Normalize the sum of the embeddings of words, places and segments."""
    words, segments, word_table, place_table, segment_table, gamma, beta, mask, places = (inputs[n] for n in range(9))
    batch, steps = static_shape(words)
    parts = [looked_up(node, word_table, words)]
    if places is None:
        places = constant(np.arange(steps, dtype="int64")[None])
    parts.append(looked_up(node, place_table, places))
    if segment_table is not None:
        if segments is None:
            raise ValueError("a table of segments without segment_ids is not supported")
        parts.append(looked_up(node, segment_table, segments))
    total = _sum(node, parts)
    if mask is None:
        lengths = constant(np.zeros(batch, "int32"))
    else:
        lengths = node.emit(op.sum(mask, [1]))
    return [node.emit(_layer_norm(node, total, gamma, beta)), lengths, total][: node.outputs]


def _fused_matmul(node: Node, inputs: Operands) -> Any:
    """Multiply matrices whose axes are swapped first, and scale the product."""
    operands = []
    for side, value in zip("AB", inputs, strict=False):
        rank = len(static_shape(value))
        order = list(range(rank))
        if node.attributes.get(f"transBatch{side}", 0):
            if rank < 3:
                raise ValueError(f"transBatch{side} of a tensor with {rank} axes is not supported")
            # The first axis is the rows, the others in front of the last are batches.
            order = [*order[1:-1], 0, rank - 1]
        if node.attributes.get(f"trans{side}", 0) and rank > 1:
            order[-2:] = order[-1], order[-2]
        operands.append(value if order == sorted(order) else _turned(node, value, order))
    alpha = float(node.attributes.get("alpha", 1.0))
    left, right = operands
    weights = known(right)
    if alpha != 1.0 and weights is not None:
        right = constant((weights * np.float32(alpha)).astype(weights.dtype))
        alpha = 1.0
    product = op.matmul(left, right)
    return product if alpha == 1.0 else op.multiply(node.emit(product), relax.const(alpha, dtype_of(left)))


def _turned(node: Node, value: Value, order: list[int]) -> Value:
    values = known(value)
    return node.emit(op.permute_dims(value, order)) if values is None else constant(values.transpose(order))


# What the numbers of `activation_params` are called by the operators.
_PARAMETERS = {"LeakyRelu": ["alpha"], "HardSigmoid": ["alpha", "beta"], "Clip": ["min", "max"]}


def _with_activation(operator: str, names: str) -> Converter:
    """Convert what ONNX Runtime fuses: an operator of ONNX on the inputs ``names``, a sum, and an activation."""

    def convert(node: Node, inputs: Operands) -> Any:
        own = [each for each in node.proto.attribute if not each.name.startswith("activation")]
        given = {name: inputs[place] for place, name in enumerate(names.split()) if inputs[place] is not None}
        read = [name if name in given else "" for name in names.split() if name != "residual"]
        nodes = [onnx.helper.make_node(operator, read, ["sum"], name=node.proto.name)]
        nodes[0].attribute.extend(own)
        if "residual" in given:
            nodes.append(onnx.helper.make_node("Add", ["sum", "residual"], ["total"], name=f"{node.proto.name}/add"))
        activation = node.text("activation")
        if activation:
            values = list(node.attributes.get("activation_params", ()))
            values = values or [node.attributes[key] for key in _ACTIVATION_NUMBERS if key in node.attributes]
            nodes.append(_activation(activation, values, nodes[-1].output[0], node, given))
        infos = [list(map(onnx.helper.make_empty_tensor_value_info, each)) for each in (given, nodes[-1].output)]
        return node.body(onnx.helper.make_graph(nodes, "fused", infos[0], infos[1]), list(given.values()))

    return convert


_ACTIVATION_NUMBERS = ("activation_alpha", "activation_beta", "activation_gamma")


def _activation(kind: str, values: list[float], source: str, node: Node, given: dict[str, Value]) -> onnx.NodeProto:
    named = dict(zip(_PARAMETERS.get(kind, []), values, strict=False))
    name, inputs = f"{node.proto.name}/{kind}", [source]
    if kind == "Clip" and node.opset >= 11:
        # Its bounds are inputs since then.
        for key, value in named.items():
            given[key] = constant(np.array(value, dtype_of(next(iter(given.values())))))
        inputs, named = [source, *named], {}
    result = onnx.helper.make_node(kind, inputs, ["activated"], name=name)
    result.attribute.extend(onnx.helper.make_attribute(key, value) for key, value in named.items())
    return result


CONVERTERS: dict[str, Converter] = {
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.BiasGelu": _gelu,
    "com.microsoft.Gelu": _gelu,
    "com.microsoft.QuickGelu": _quick_gelu,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.FusedMatMul": _fused_matmul,
    "com.microsoft.FusedConv": _with_activation("Conv", "data weights bias residual"),
    "com.microsoft.FusedGemm": _with_activation("Gemm", "data weights bias"),
}
