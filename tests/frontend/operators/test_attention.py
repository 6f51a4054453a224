"""ONNX's attention and rotary embedding against its reference, in all combinations of what they know."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frontend.operators.one_node import check, one_node, refusal


def random(*shape, seed=0, dtype="float32"):
    return np.random.default_rng(seed).standard_normal(shape).astype(dtype)


def operands(flat, heads, shared, steps, keys, past, dtype="float32"):
    size, wide = 4, 3
    shapes = [(2, heads, steps, size), (2, shared, keys, size), (2, shared, keys, wide)]
    if flat:
        shapes = [(a, c, b * d) for a, b, c, d in shapes]
    values = [random(*shape, seed=n, dtype=dtype) for n, shape in enumerate(shapes)]
    before = [random(2, shared, past, width, seed=5, dtype=dtype) if past else None for width in (size, wide)]
    return values, before


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_attention(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    heads, shared = pick((2, 2), (4, 2), (3, 1))
    steps, keys, past = pick(1, 3), pick(3, 5), pick(0, 2)
    flat, opset = pick(True, False), pick(23, 24, 25)
    attributes = {"q_num_heads": heads, "kv_num_heads": shared} if flat else {}
    values, before = operands(flat, heads, shared, steps, keys, past)
    mask = pick(None, "bool", "float32")
    inputs = [*values, None, *before]
    total = keys + past
    if mask is not None:
        # Rows that attend nothing give zeros.
        allowed = np.random.default_rng(3).random(pick((steps, total), (2, 1, steps, total))) > 0.5
        inputs[3] = allowed if mask == "bool" else np.where(allowed, 0.5, -np.inf).astype("float32")
        inputs[3] = inputs[3][..., : total - (pick(0, 1) if opset > 23 else 0)]
    if opset > 23 and not past and pick(True, False):
        inputs.append(np.array([keys, keys - 1]))
    if opset == 25:
        attributes |= {f"{side}_window_size": pick(-1, 0, 1) for side in ("left", "right")}
    # Of what is bounded, the reference has no raw products; ONNX Runtime has the same as we.
    cap = pick(0.0, 2.0)
    attributes |= {"is_causal": pick(0, 1), "softcap": cap, "qk_matmul_output_mode": pick(1 if cap else 0, 1, 2, 3)}
    attributes |= pick({}, {"scale": 0.3})
    known = [n for n in range(3, len(inputs)) if inputs[n] is not None and pick(True, False)]
    check("Attention", inputs, known, outputs=4, opset=opset, reference=True, **attributes)


def test_half_floats_with_a_softmax_in_whole_ones():
    values, _ = operands(False, 2, 2, 3, 5, 0, "float16")
    precision = onnx.TensorProto.FLOAT
    options = {"opset": 23, "softmax_precision": precision, "is_causal": 1}
    check("Attention", values, reference=True, tolerance=5e-3, **options)


def test_attention_as_kernels():
    values, before = operands(True, 4, 2, 3, 5, 2)
    mask = np.random.default_rng(3).random((3, 7)) > 0.4
    mask[1] = False
    inputs = [*values, mask, *before]
    options = {"outputs": 3, "opset": 23, "q_num_heads": 4, "kv_num_heads": 2}
    check("Attention", inputs, kernels=True, reference=True, **options)


@settings(max_examples=20, deadline=None)
@given(st.data())
def test_rotary_embedding(data):
    pick = lambda *values: data.draw(st.sampled_from(values))  # noqa: E731
    flat, partial, interleaved, placed = (pick(True, False) for _ in range(4))
    half = 2 if partial else 4
    tables = [random(10, half, seed=n) if placed else random(2, 3, half, seed=n) for n in (1, 2)]
    places = np.array([[0, 4, 9], [2, 2, 3]]) if placed else None
    shape = (2, 3, 16) if flat else (2, 2, 3, 8)
    attributes = {"interleaved": int(interleaved)} | ({"num_heads": 2} if flat or partial else {})
    attributes |= {"rotary_embedding_dim": 4} if partial else {}
    inputs = [random(*shape), *tables, places]
    known = [n for n in (1, 2, 3) if inputs[n] is not None and pick(True, False)]
    check("RotaryEmbedding", inputs, known, opset=23, reference=True, **attributes)


@pytest.mark.parametrize(
    ("inputs", "attributes", "reason"),
    [
        (operands(True, 2, 2, 3, 3, 0)[0], {"q_num_heads": 3, "kv_num_heads": 2}, "don't divide into 3 heads"),
        (operands(False, 3, 2, 3, 3, 0)[0], {}, "3 heads of queries don't share 2 of keys"),
        ([*operands(False, 2, 2, 3, 3, 0)[0], random(3, 5)], {}, "its mask is for 5 keys, there are 3"),
        ([*operands(False, 2, 2, 3, 3, 0)[0], None, random(2, 2, 1, 4)], {}, "past_key and past_value go together"),
    ],
)
def test_refused(inputs, attributes, reason):
    network, _ = one_node("Attention", inputs, opset=23, **attributes)
    message = refusal(network)
    assert message.startswith("net: node 'node' (Attention): ") and reason in message
