"""Attention and rotary embeddings, written as matrix products, sums and softmax, which have schedules."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, known
from nnfuze_tvm.frontend.operators.values import dtype_of, scalar
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape


def heads(value: Value, count: int) -> Value:
    """Return ``[batch, steps, count * size]`` as ``[batch, count, steps, size]``."""
    batch, steps, width = static_shape(value)
    if count < 1 or width % count:
        raise ValueError(f"{width} values don't divide into {count} heads")
    return op.permute_dims(op.reshape(value, [batch, steps, count, width // count]), [0, 2, 1, 3])


def without_heads(node: Node, value: Value) -> Value:
    """Return ``[batch, heads, steps, size]`` as ``[batch, steps, heads * size]``."""
    batch, count, steps, size = static_shape(value)
    return op.reshape(node.emit(op.permute_dims(value, [0, 2, 1, 3])), [batch, steps, count * size])


@dataclass
class Bias:
    """What is added to the scores ``[batch, heads, steps, keys]`` of an attention: -inf where nothing is attended.

    Attributes
    ----------
    fixed : np.ndarray, optional
        What is known of it.
    computed : list
        What is not: tensors to add.
    guarded : bool
        Where nothing is attended, the result is zero; else it is what softmax makes of nothing but -inf.
    """

    fixed: np.ndarray | None = None
    computed: list[Value] = field(default_factory=list)
    guarded: bool = True

    def add(self, part: Value | np.ndarray) -> None:
        """Add a tensor of numbers, broadcast."""
        values = part if isinstance(part, np.ndarray) else known(part)
        if values is None:
            self.computed.append(part)
        else:
            self.fixed = values if self.fixed is None else self.fixed + values

    def allow(self, node: Node, part: Value | np.ndarray, dtype: str, otherwise: float = -math.inf) -> None:
        """Leave the scores as they are where ``part``, truth values, is true; add ``otherwise`` elsewhere."""
        values = part if isinstance(part, np.ndarray) else known(part)
        yes, no = np.zeros((), dtype), np.array(otherwise, dtype)
        if values is None:
            self.computed.append(node.emit(op.where(part, constant(yes), constant(no))))
        else:
            self.add(np.where(values, yes, no))

    def value(self, node: Node) -> Value | None:
        """Return all of it in one tensor; None if there is nothing."""
        total = None if self.fixed is None else constant(self.fixed)
        for part in self.computed:
            total = part if total is None else node.emit(op.add(total, part))
        return total


@dataclass
class Attended:
    """What an attention makes: the result, and the scores at each stage, all ``[batch, heads, steps, …]``."""

    result: Value
    products: Value
    capped: Value
    biased: Value
    weights: Value


def attend(
    node: Node,
    query: Value,
    key: Value,
    value: Value,
    scale: float,
    bias: Bias,
    cap: float = 0.0,
    precision: str | None = None,
) -> Attended:
    """Emit ``softmax(scale * query @ key.T + bias) @ value``.

    Parameters
    ----------
    node : Node
        The node that is converted.
    query, key, value : Value
        ``[batch, heads, steps, size]``; several heads of the query may share one of the others.
    scale : float
        Factor of the products.
    bias : Bias
        What is added to them.
    cap : float
        Scores are bounded by ``cap * tanh(scores / cap)``; 0 for no bounds.
    precision : str, optional
        Type in which softmax is computed.
    """
    batch, count, steps, size = static_shape(query)
    shared, keys = static_shape(key)[1:3]
    if shared < 1 or count % shared or static_shape(value)[1] != shared:
        raise ValueError(
            f"{count} heads of queries don't share {shared} of keys and {static_shape(value)[1]} of values"
        )
    rows = [batch, shared, count // shared * steps]
    scaled = node.emit(op.multiply(query, scalar(scale, query)))
    # Heads that share a key are rows of one product, so that keys need no copies.
    if shared != count:
        scaled = node.emit(op.reshape(scaled, [*rows, size]))
    products = node.emit(op.matmul(scaled, node.emit(op.permute_dims(key, [0, 1, 3, 2]))))
    if shared != count:
        products = node.emit(op.reshape(products, [batch, count, steps, keys]))
    capped = products
    if cap > 0:
        bounded = op.tanh(node.emit(op.divide(products, scalar(cap, products))))
        capped = node.emit(op.multiply(node.emit(bounded), scalar(cap, products)))
    total = bias.value(node)
    biased = capped if total is None else node.emit(op.add(capped, total))
    scores = biased if precision in (None, dtype_of(biased)) else node.emit(op.astype(biased, precision))
    weights = node.emit(op.nn.softmax(scores, -1))
    if total is not None and bias.guarded:
        weights = _nothing_attended(node, weights, total, bias)
    if dtype_of(weights) != dtype_of(query):
        weights = node.emit(op.astype(weights, dtype_of(query)))
    grouped = weights if shared == count else node.emit(op.reshape(weights, [*rows, keys]))
    result = node.emit(op.matmul(grouped, value))
    if shared != count:
        result = node.emit(op.reshape(result, [batch, count, steps, static_shape(value)[-1]]))
    return Attended(result, products, capped, biased, weights)


def _nothing_attended(node: Node, weights: Value, total: Value, bias: Bias) -> Value:
    """Return zeros in rows where everything is masked, and softmax gives NaN."""
    zero = scalar(0, weights)
    if bias.computed:
        # The largest of nothing but -inf is a finite number in TVM.
        masked = op.astype(node.emit(op.equal(total, scalar(-math.inf, total))), "float32")
        least = node.emit(op.min(node.emit(masked), -1, keepdims=True))
        return node.emit(op.where(node.emit(op.greater(least, scalar(0.5, least))), zero, weights))
    assert bias.fixed is not None
    empty = np.asarray(np.isneginf(bias.fixed).all(-1, keepdims=True))
    return node.emit(op.where(constant(empty), zero, weights)) if empty.any() else weights


def causal(node: Node, bias: Bias, dtype: str, places: tuple[int, int], offset: Any, spans: tuple[int, int]) -> None:
    """Allow the keys from ``spans[0]`` places before a query up to ``spans[1]`` behind it; -1 for no limit.

    ``places`` counts queries and keys; query ``i`` stands at ``i + offset``, a number or a tensor of one per sample.
    """
    ahead = np.arange(places[1])[None, :] - np.arange(places[0])[:, None]
    before, behind = spans
    if isinstance(offset, int):
        allowed = np.ones_like(ahead, bool)
        if behind >= 0:
            allowed &= ahead <= offset + behind
        if before >= 0:
            allowed &= ahead >= offset - before
        bias.allow(node, allowed, dtype)
        return
    table = constant(ahead.astype(dtype_of(offset)))
    if behind >= 0:
        limit = node.emit(op.add(offset, scalar(behind, offset)))
        bias.allow(node, node.emit(op.less_equal(table, limit)), dtype)
    if before >= 0:
        limit = node.emit(op.subtract(offset, scalar(before, offset)))
        bias.allow(node, node.emit(op.greater_equal(table, limit)), dtype)


def with_past(node: Node, past: Value | None, present: Value) -> Value:
    """Return keys or values of earlier steps with those of this one behind them."""
    return present if past is None else node.emit(op.concat([past, present], 2))


def _mask(node: Node, mask: Value, keys: int, bias: Bias, dtype: str) -> None:
    """Add a mask of truth values or numbers; what it does not reach is not attended."""
    missing = keys - static_shape(mask)[-1]
    if missing < 0:
        raise ValueError(f"its mask is for {static_shape(mask)[-1]} keys, there are {keys}")
    own = Bias()
    if dtype_of(mask) == "bool":
        own.allow(node, mask, dtype)
    else:
        own.add(mask)
    value = own.value(node)
    values = known(value)
    if missing and values is not None:
        value = constant(np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)], constant_values=-np.inf))
    elif missing:
        assert value is not None
        rest = constant(np.full([*static_shape(value)[:-1], missing], -np.inf, dtype))
        value = node.emit(op.concat([value, rest], -1))
    assert value is not None
    bias.add(value)


def _lengths(node: Node, lengths: Value, places: tuple[int, int], bias: Bias, dtype: str) -> Any:
    """Allow the keys that are no padding; return the place of the first query, a tensor of one per sample."""
    batch, steps, keys = static_shape(lengths)[0], *places
    lengths = node.emit(op.reshape(lengths, [batch, 1, 1, 1])) if known(lengths) is None else lengths
    values = known(lengths)
    numbers = np.arange(keys)
    if values is None:
        bias.allow(node, node.emit(op.less(constant(numbers.astype(dtype_of(lengths))), lengths)), dtype)
        return node.emit(op.subtract(lengths, scalar(steps, lengths)))
    bias.allow(node, numbers < values.reshape(batch, 1, 1, 1), dtype)
    return values.reshape(batch, 1, 1, 1) - steps


def _attention(node: Node, inputs: Operands) -> Any:
    query, key, value, mask, past_key, past_value, lengths = (inputs[n] for n in range(7))
    attributes = node.attributes
    flat = len(static_shape(query)) == 3
    if flat:
        counts = [int(attributes.get(f"{whose}_num_heads", 0)) for whose in ("q", "kv", "kv")]
        query, key, value = (
            node.emit(heads(each, count)) for each, count in zip((query, key, value), counts, strict=True)
        )
    if (past_key is None) != (past_value is None) or (past_key is not None and lengths is not None):
        raise ValueError("past_key and past_value go together, without nonpad_kv_seqlen")
    key, value = with_past(node, past_key, key), with_past(node, past_value, value)
    dtype, (steps, size), keys = dtype_of(query), static_shape(query)[2:], static_shape(key)[2]
    bias, offset = Bias(), 0 if past_key is None else static_shape(past_key)[2]
    if mask is not None:
        _mask(node, mask, keys, bias, dtype)
    if lengths is not None:
        offset = _lengths(node, lengths, (steps, keys), bias, dtype)
    before, behind = (int(attributes.get(f"{side}_window_size", -1)) for side in ("left", "right"))
    if attributes.get("is_causal", 0):
        behind = 0
    _windows(node, bias, dtype, (steps, keys), offset, (before, behind))
    cap = float(attributes.get("softcap", 0.0))
    precision = attributes.get("softmax_precision")
    kind = None if precision is None else str(onnx.helper.tensor_dtype_to_np_dtype(precision))
    scale = float(attributes.get("scale", 1 / math.sqrt(size)))
    made = attend(node, query, key, value, scale, bias, cap, kind)
    mode = int(attributes.get("qk_matmul_output_mode", 0))
    if mode not in range(4):
        raise ValueError(f"qk_matmul_output_mode {mode} is not supported")
    shown = (made.products, made.capped, made.biased, made.weights)[mode]
    return [without_heads(node, made.result) if flat else made.result, key, value, shown]


def _windows(node: Node, bias: Bias, dtype: str, places: tuple[int, int], offset: Any, spans: tuple[int, int]) -> None:
    if max(spans) < 0:
        return
    if not isinstance(offset, np.ndarray):
        causal(node, bias, dtype, places, offset, spans)
        return
    each = []
    for one in offset.ravel():
        own = Bias()
        causal(node, own, dtype, places, int(one), spans)
        assert own.fixed is not None
        each.append(own.fixed)
    bias.add(np.stack(each)[:, None])


def rotate(node: Node, data: Value, cosine: Value, sine: Value, interleaved: bool) -> Value:
    """Turn pairs of values by angles.

    Parameters
    ----------
    node : Node
        The node that is converted.
    data : Value
        ``[…, size]``.
    cosine, sine : Value
        Of the angles, ``[…, half]`` in shapes that are broadcast; what lies behind ``2 * half`` values is not turned.
    interleaved : bool
        Pairs lie side by side; else the second of a pair lies ``half`` places behind the first.
    """
    shape, half = static_shape(data), static_shape(cosine)[-1]
    last, width = len(shape) - 1, 2 * half
    turned = data if width == shape[-1] else node.emit(op.strided_slice(data, [last], [0], [width]))
    if interleaved:
        turned = node.emit(op.reshape(turned, [*shape[:-1], half, 2]))
        first, second = (node.emit(op.squeeze(_piece(node, turned, last + 1, n, n + 1), [last + 1])) for n in (0, 1))
    else:
        first, second = (_piece(node, turned, last, n, n + half) for n in (0, half))
    real = node.emit(op.subtract(op.multiply(first, cosine), op.multiply(second, sine)))
    imaginary = node.emit(op.add(op.multiply(first, sine), op.multiply(second, cosine)))
    if interleaved:
        pair = [node.emit(op.expand_dims(each, last + 1)) for each in (real, imaginary)]
        parts = [node.emit(op.reshape(node.emit(op.concat(pair, last + 1)), [*shape[:-1], width]))]
    else:
        parts = [real, imaginary]
    if width < shape[-1]:
        parts.append(_piece(node, data, last, width, shape[-1]))
    return op.concat(parts, last) if len(parts) > 1 else parts[0]


def _piece(node: Node, data: Value, axis: int, begin: int, end: int) -> Value:
    return node.emit(op.strided_slice(data, [axis], [begin], [end]))


def looked_up(node: Node, table: Value, places: Value) -> Value:
    """Return rows of a table; places outside of it, which are an error, read its ends."""
    rows, at = known(table), known(places)
    if rows is not None and at is not None:
        return constant(rows[at])
    return node.emit(op.take(table, places, 0, mode="clip"))


def rotary(
    node: Node, data: Value, tables: tuple[Value, Value], places: Value | None, count: int, interleaved: bool
) -> Value:
    """Turn ``[batch, heads, steps, size]``, or ``[batch, steps, count * size]``, by tables of cosines and sines."""
    shape = static_shape(data)
    flat = len(shape) == 3
    if flat:
        if count < 1 or shape[2] % count:
            raise ValueError(f"{shape[2]} values don't divide into {count} heads")
        data = node.emit(op.reshape(data, [*shape[:2], count, shape[2] // count]))
    angles = []
    for table in tables:
        rows = table if places is None else looked_up(node, table, places)
        angles.append(_unsqueezed(node, rows, 2 if flat else 1))
    turned = rotate(node, data, angles[0], angles[1], interleaved)
    return op.reshape(node.emit(turned), list(shape)) if flat else turned


def _unsqueezed(node: Node, value: Value, axis: int) -> Value:
    values = known(value)
    return constant(np.expand_dims(values, axis)) if values is not None else node.emit(op.expand_dims(value, axis))


def _rotary_embedding(node: Node, inputs: Operands) -> Any:
    data, cosine, sine, places = (inputs[n] for n in range(4))
    size = int(node.attributes.get("rotary_embedding_dim", 0))
    count = int(node.attributes.get("num_heads", 0))
    half = static_shape(cosine)[-1]
    width = static_shape(data)[-1] // (count if len(static_shape(data)) == 3 and count else 1)
    if 2 * half != (size or width):
        raise ValueError(f"its tables have {half} angles for {size or width} values")
    return rotary(node, data, (cosine, sine), places, count, bool(node.attributes.get("interleaved", 0)))


CONVERTERS: dict[str, Converter] = {
    "Attention": _attention,
    "RotaryEmbedding": _rotary_embedding,
}
