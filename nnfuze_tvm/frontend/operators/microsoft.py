"""Operators of ``com.microsoft`` that ONNX Runtime's optimizer and exporters of transformers write: normalization,
embeddings, activations and products; `microsoft_attention` has the attentions.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.frontend.operators.attention import dtype_of, looked_up, number
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
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
    scaled = op.multiply(inputs[0], number(node.attributes.get("alpha", 1.702), inputs[0]))
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


CONVERTERS: dict[str, Converter] = {
    "com.microsoft.FastGelu": _fast_gelu,
    "com.microsoft.BiasGelu": _gelu,
    "com.microsoft.Gelu": _gelu,
    "com.microsoft.QuickGelu": _quick_gelu,
    "com.microsoft.EmbedLayerNormalization": _embed_layer_norm,
    "com.microsoft.FusedMatMul": _fused_matmul,
}
