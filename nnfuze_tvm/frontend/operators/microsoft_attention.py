"""The attentions of ``com.microsoft``, each with its own ways to say what is masked and what came before."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.attention import Bias, attend, causal, heads, rotary, with_past, without_heads
from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known, part_of
from nnfuze_tvm.frontend.operators.values import dtype_of, scalar
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape


def _refuse_others(node: Node, inputs: Operands, first: int, names: str) -> None:
    """Refuse the inputs from ``first`` on, which are called ``names``."""
    for place, name in enumerate(names.split(), first):
        if inputs[place] is not None:
            raise ValueError(f"its input {name} is not supported")


def _split_heads(node: Node, value: Value, count: int, bias: Value | None) -> Value:
    """Return ``[batch, steps, width]`` with a bias in heads; what has heads already stays."""
    if len(static_shape(value)) == 4:
        return value
    if bias is not None:
        value = node.emit(op.add(value, bias))
    return node.emit(heads(value, count))


def _padding(node: Node, mask: Value, places: tuple[int, int], batch: int, bias: Bias, dtype: str) -> None:
    """Add a mask of padding: lengths, ends and starts, or a number for each key (or query and key), 0 for masked."""
    steps, keys = places
    shape, otherwise = static_shape(mask), float(node.attributes.get("mask_filter_value", -10000.0))
    if len(shape) == 1:
        if shape[0] not in (batch, 2 * batch):
            raise ValueError(f"a mask of shape {list(shape)} is not supported")
        numbers = constant(np.arange(keys).astype(dtype_of(mask)))
        rows = node.emit(op.reshape(mask, [shape[0] // batch, batch, 1, 1, 1]))
        allowed = node.emit(op.less(numbers, _row(node, rows, 0)))
        if shape[0] == 2 * batch:
            begun = node.emit(op.greater_equal(numbers, _row(node, rows, 1)))
            allowed = node.emit(op.logical_and(allowed, begun))
    elif shape in ((batch, keys), (batch, steps, keys)):
        allowed = op.greater(mask, scalar(0, mask)) if dtype_of(mask) != "bool" else mask
        allowed = node.emit(op.reshape(node.emit(allowed), [batch, 1, shape[1] if len(shape) == 3 else 1, keys]))
    else:
        raise ValueError(f"a mask of shape {list(shape)} is not supported")
    bias.computed.append(
        node.emit(op.where(allowed, constant(np.zeros((), dtype)), constant(np.array(otherwise, dtype))))
    )


def _row(node: Node, rows: Value, place: int) -> Value:
    cut = node.emit(op.strided_slice(rows, [0], [place], [place + 1]))
    return node.emit(op.squeeze(cut, [0]))


def _attention(node: Node, inputs: Operands) -> Any:
    """Project, then attend."""
    data, weights, projected, mask, past, extra = (inputs[n] for n in range(6))
    attributes = node.attributes
    _refuse_others(node, inputs, 6, "past_sequence_length")
    if attributes.get("do_rotary", 0) or attributes.get("past_present_share_buffer", 0):
        raise ValueError("do_rotary and past_present_share_buffer are not supported")
    count, (batch, steps) = int(attributes["num_heads"]), static_shape(data)[:2]
    wide = node.emit(op.matmul(data, weights))
    if projected is not None:
        wide = node.emit(op.add(wide, projected))
    widths = [int(each) for each in attributes.get("qkv_hidden_sizes", [static_shape(weights)[1] // 3] * 3)]
    parts, begin = [], 0
    for width in widths:
        part = node.emit(op.strided_slice(wide, [2], [begin], [begin + width]))
        parts.append(node.emit(heads(part, count)))
        begin += width
    query, key, value = parts
    before = 0
    if past is not None:
        before = static_shape(past)[3]
        key, value = (with_past(node, _row(node, past, n), each) for n, each in enumerate((key, value)))
    dtype, places = dtype_of(data), (steps, before + steps)
    bias = Bias(guarded=False)
    if mask is not None:
        _padding(node, mask, places, batch, bias, dtype)
    if extra is not None:
        bias.add(extra)
    if attributes.get("unidirectional", 0):
        causal(node, bias, dtype, places, before, (-1, 0))
    scale = _scale(node, query)
    made = attend(node, query, key, value, scale, bias)
    results = [node.emit(without_heads(node, made.result))]
    if node.outputs > 1:
        pair = [node.emit(op.expand_dims(each, 0)) for each in (key, value)]
        results.append(op.concat(pair, 0))
    return results


def _scale(node: Node, query: Value) -> float:
    return float(node.attributes.get("scale", 0.0)) or 1 / math.sqrt(static_shape(query)[-1])


def _multi_head_attention(node: Node, inputs: Operands) -> Any:
    """Attend to keys and values in one of several layouts."""
    query, key, value, bias_in, mask, extra, past_key, past_value = (inputs[n] for n in range(8))
    _refuse_others(node, inputs, 8, "past_sequence_length cache_indirection")
    count = int(node.attributes["num_heads"])
    # ONNX Runtime has those layouts on other processors only.
    if key is None or value is None or len(static_shape(query)) != 3:
        raise ValueError("packed queries, keys and values are not supported")
    own = _three_biases(node, bias_in, query, key, value)
    split = [_split_heads(node, each, count, part) for each, part in zip((query, key, value), own, strict=True)]
    query, key, value = split
    fresh = static_shape(key)[2]
    key, value = with_past(node, past_key, key), with_past(node, past_value, value)
    dtype, (batch, _, steps), keys = dtype_of(query), static_shape(query)[:3], static_shape(key)[2]
    bias = Bias(guarded=False)
    if mask is not None:
        _padding(node, mask, (steps, keys), batch, bias, dtype)
    if extra is not None:
        bias.add(extra)
    if node.attributes.get("unidirectional", 0):
        if fresh != steps:
            raise ValueError("unidirectional with other numbers of queries and keys is not supported")
        causal(node, bias, dtype, (steps, keys), keys - steps, (-1, 0))
    made = attend(node, query, key, value, _scale(node, query), bias)
    return [node.emit(without_heads(node, made.result)), key, value, made.biased][: node.outputs]


def _three_biases(node: Node, bias: Value | None, query: Value, key: Value, value: Value) -> list[Value | None]:
    if bias is None:
        return [None] * 3
    if len(static_shape(key)) == 4 or len(static_shape(value)) == 4:
        # Keys and values of an encoder have theirs already.
        width = static_shape(query)[-1]
        return [_piece(node, bias, 0, width), None, None]
    ends = np.cumsum([static_shape(each)[-1] for each in (query, key, value)]).tolist()
    return [_piece(node, bias, begin, end) for begin, end in zip([0, *ends[:-1]], ends, strict=True)]


def _piece(node: Node, vector: Value, begin: int, end: int) -> Value:
    piece = part_of(vector, 0, begin, end)
    return piece if known(vector) is not None else node.emit(piece)


def _group_query_attention(node: Node, inputs: Operands) -> Any:
    """Attend with fewer keys than queries; the lengths of all samples must be known, and the same."""
    query, key, value, past_key, past_value, lengths, total, cosine, sine, places, extra = (
        inputs[n] for n in range(11)
    )
    attributes = node.attributes
    _refuse_others(node, inputs, 11, "head_sink k_scale v_scale")
    unusual = "smooth_softmax qk_output kv_cache_bit_width"
    given = [name for name in unusual.split() if attributes.get(name, 0)]
    if given:
        raise ValueError(f"{given[0]} is not supported")
    counts = int(attributes["num_heads"]), int(attributes["kv_num_heads"])
    batch, steps = static_shape(query)[:2]
    before = 0 if past_key is None else static_shape(past_key)[2]
    ends, keys = known(lengths), known(total)
    if ends is None or keys is None:
        raise ValueError("computed seqlens_k or total_sequence_length are not supported: fix the length of the past")
    if (ends != before + steps - 1).any() or int(keys.item()) != before + steps:
        raise ValueError(f"sequences of other lengths than past and present, {before} + {steps}, are not supported")
    if key is None:
        query, key, value = _three_of_one(node, query, counts)
    if attributes.get("do_rotary", 0):
        if places is None:
            places = constant(np.tile(np.arange(before, before + steps), (batch, 1)))
        interleaved = bool(attributes.get("rotary_interleaved", 0))
        query, key = (
            node.emit(rotary(node, each, (cosine, sine), places, count, interleaved))
            for each, count in zip((query, key), counts, strict=True)
        )
    query, key, value = (
        node.emit(heads(each, count)) for each, count in zip((query, key, value), (*counts, counts[1]), strict=True)
    )
    key, value = with_past(node, past_key, key), with_past(node, past_value, value)
    bias = Bias(guarded=False)
    if extra is not None:
        bias.add(extra)
    window = int(attributes.get("local_window_size", -1))
    causal(node, bias, dtype_of(query), (steps, before + steps), before, (window - 1 if window > 0 else -1, 0))
    cap = float(attributes.get("softcap", 0.0))
    made = attend(node, query, key, value, _scale(node, query), bias, cap)
    return [node.emit(without_heads(node, made.result)), key, value][: node.outputs]


def _three_of_one(node: Node, packed: Value, counts: tuple[int, int]) -> list[Value]:
    """Return queries, keys and values, which lie behind one another in the last axis."""
    width = static_shape(packed)[2]
    size, rest = divmod(width, counts[0] + 2 * counts[1])
    if rest:
        raise ValueError(f"{width} values don't divide into {counts[0]} + 2 * {counts[1]} heads")
    ends = np.cumsum([counts[0] * size, counts[1] * size, counts[1] * size]).tolist()
    return [
        node.emit(op.strided_slice(packed, [2], [begin], [end]))
        for begin, end in zip([0, *ends[:-1]], ends, strict=True)
    ]


def _rotary_embedding(node: Node, inputs: Operands) -> Any:
    """Turn values by angles that are looked up by place, or from one place on."""
    data, places, cosine, sine = (inputs[n] for n in range(4))
    attributes, shape = node.attributes, static_shape(inputs[0])
    if attributes.get("is_packed_batching", 0) or float(attributes.get("scale", 1.0)) != 1.0:
        raise ValueError("is_packed_batching and scale are not supported")
    count, half = int(attributes.get("num_heads", 0)), static_shape(cosine)[-1]
    size = int(attributes.get("rotary_embedding_dim", 0))
    if len(shape) == 3 and not count:
        count = shape[2] // (2 * half)
    if size and size != 2 * half:
        raise ValueError(f"its tables have {half} angles for {size} values")
    batch, steps = shape[0], shape[1] if len(shape) == 3 else shape[2]
    if static_shape(places) != (batch, steps):
        offset = known(places)
        table = np.arange(steps)[None].repeat(batch, 0)
        if offset is not None:
            places = constant(table + offset.item())
        else:
            start = node.emit(op.reshape(places, [1, 1]))
            places = node.emit(op.add(constant(table.astype(dtype_of(places))), start))
    return rotary(node, data, (cosine, sine), places, count, bool(attributes.get("interleaved", 0)))


CONVERTERS: dict[str, Converter] = {
    "com.microsoft.Attention": _attention,
    "com.microsoft.MultiHeadAttention": _multi_head_attention,
    "com.microsoft.GroupQueryAttention": _group_query_attention,
    "com.microsoft.RotaryEmbedding": _rotary_embedding,
}
