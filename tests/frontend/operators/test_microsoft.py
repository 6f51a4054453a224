"""Microsoft's operators against ONNX Runtime, which they come from."""

from __future__ import annotations

import itertools

import numpy as np
import onnx
import pytest

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import dataflow
from tests.frontend.operators.one_node import check_network, one_node, refusal


def random(*shape, seed=0):
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype("float32")


def below(limit, *shape):
    return np.random.default_rng(shape).integers(0, limit, shape).astype("int32")


def ints(*values):
    return np.array(values, "int32")


def microsoft(operator, inputs, outputs=1, known=(), **attributes):
    network, feeds = one_node(f"com.microsoft.{operator}", inputs, known, outputs=outputs, **attributes)
    for each in network.graph.output:
        if operator == "MultiHeadAttention":
            each.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    return network, feeds


DATA = random(2, 3, 8)


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes"),
    [
        ("FastGelu", [DATA], {}),
        ("FastGelu", [DATA, random(8)], {}),
        ("BiasGelu", [DATA, random(8)], {}),
        ("Gelu", [DATA], {}),
        ("QuickGelu", [DATA], {}),
        ("QuickGelu", [DATA], {"alpha": 0.7}),
        ("SkipLayerNormalization", [DATA, random(2, 3, 8, seed=1), random(8)], {"epsilon": 1e-5}),
        ("SkipLayerNormalization", [DATA, random(1, 3, 8), random(8), random(8), random(8)], {}),
        ("SkipLayerNormalization", [DATA, random(3, 8), random(8), random(8)], {}),
        ("SkipSimplifiedLayerNormalization", [DATA, random(2, 3, 8), random(8), random(8)], {"epsilon": 1e-6}),
    ],
)
def test_activations_and_normalization(operator, inputs, attributes):
    network, feeds = microsoft(operator, inputs, **attributes)
    check_network(network, feeds)
    if operator.startswith("Skip"):
        network.graph.node[0].output.extend(["", "", "sum"])
        network.graph.output.append(onnx.helper.make_empty_tensor_value_info("sum"))
        check_network(network, feeds)


@pytest.mark.parametrize("left_out", [(), (7,), (1, 4, 7)])
@pytest.mark.parametrize("places", [None, below(6, 2, 3)])
def test_embeddings(left_out, places):
    words, segments = below(10, 2, 3), below(2, 2, 3)
    tables = [random(10, 8), random(6, 8), random(2, 8)]
    inputs = [words, segments, *tables, random(8), random(8, seed=1), ints([1, 1, 0], [1, 1, 1]), places]
    inputs = [None if n in left_out else value for n, value in enumerate(inputs)]
    check_network(*microsoft("EmbedLayerNormalization", inputs, 2, known=[2, 3]))


@pytest.mark.parametrize("swaps", list(itertools.product((0, 1), repeat=4)))
def test_products_of_swapped_matrices(swaps):
    left, right, batch_left, batch_right = swaps
    shapes = []
    for rows, columns, swap, batch in ((3, 5, left, batch_left), (5, 6, right, batch_right)):
        first, last = (columns, rows) if swap else (rows, columns)
        shapes.append((first, 2, 4, last) if batch else (2, 4, first, last))
    attributes = {"transA": left, "transB": right, "transBatchA": batch_left, "transBatchB": batch_right}
    network, feeds = microsoft("FusedMatMul", list(itertools.starmap(random, shapes)), alpha=0.5, **attributes)
    check_network(network, feeds)


@pytest.mark.parametrize("residual", [None, random(1, 3, 5, 5, seed=1)])
@pytest.mark.parametrize(
    ("activation", "numbers"),
    [("", []), ("Relu", []), ("LeakyRelu", [0.2]), ("Clip", [-0.5, 0.75]), ("HardSigmoid", [0.3, 0.4]), ("Tanh", [])],
)
def test_fused_convolution(activation, numbers, residual):
    inputs = [random(1, 2, 5, 5), random(3, 2, 3, 3), random(3), residual]
    attributes = {"activation": activation} if activation else {}
    attributes |= {"activation_params": numbers} if numbers else {}
    network, feeds = microsoft("FusedConv", inputs, known=[1, 2], pads=[1, 1, 1, 1], **attributes)
    check_network(network, feeds)
    assert any(b.var.name == "net/node" for b in dataflow.bindings(load([network], ["net"])["net"]))


@pytest.mark.parametrize(("activation", "numbers"), [("Relu", {}), ("LeakyRelu", {"activation_alpha": 0.2})])
def test_fused_product(activation, numbers):
    inputs = [random(2, 4), random(3, 4), random(3)]
    attributes = {"activation": activation, "transB": 1, "alpha": 0.5, **numbers}
    check_network(*microsoft("FusedGemm", inputs, known=[1, 2], **attributes))


HIDDEN, WEIGHTS, BIAS = random(2, 5, 8), random(8, 24), random(24)
PAST = random(2, 2, 2, 3, 4)


@pytest.mark.parametrize("unidirectional", [0, 1])
@pytest.mark.parametrize(
    ("mask", "past", "more"),
    [
        (None, None, None),
        (ints(3, 5), None, None),
        (ints(4, 5, 1, 2), None, None),
        (ints([0, 0, 0, 0, 0], [1, 1, 1, 1, 0]), None, None),
        (below(2, 2, 5, 5), None, random(2, 2, 5, 5)),
        (None, None, random(1, 1, 5, 5)),
        (None, PAST, None),
        (below(2, 2, 8), PAST, None),
    ],
)
def test_attention_with_a_projection(mask, past, more, unidirectional):
    inputs = [HIDDEN, WEIGHTS, BIAS, mask, past, more]
    outputs = 1 if past is None else 2
    check_network(*microsoft("Attention", inputs, outputs, [1, 2], num_heads=2, unidirectional=unidirectional))


def test_attention_in_other_sizes():
    inputs = [HIDDEN, random(8, 28), random(28)]
    check_network(*microsoft("Attention", inputs, num_heads=2, qkv_hidden_sizes=[8, 8, 12], scale=0.3))


QUERY, KEY, VALUE, OLD = random(2, 5, 8), random(2, 6, 8), random(2, 6, 12), random(2, 2, 3, 4)


@pytest.mark.parametrize(
    ("inputs", "outputs", "attributes"),
    [
        ([QUERY, KEY, VALUE], 1, {}),
        ([QUERY, KEY, VALUE, random(28)], 3, {"scale": 0.2}),
        ([QUERY, KEY, VALUE, None, ints([1, 1, 1, 1, 0, 0], [1] * 6)], 1, {"mask_filter_value": -50.0}),
        ([QUERY, KEY, VALUE, None, below(2, 2, 5, 6), random(1, 2, 5, 6)], 4, {}),
        ([QUERY, QUERY, QUERY], 1, {"unidirectional": 1}),
        ([QUERY, QUERY, QUERY, None, None, None, OLD, OLD], 3, {"unidirectional": 1}),
        ([QUERY, QUERY, QUERY, random(24), below(2, 2, 8), None, OLD, OLD], 3, {}),
        ([QUERY, random(2, 2, 6, 4), random(2, 2, 6, 4, seed=1), random(24)], 1, {}),
    ],
)
@pytest.mark.parametrize("known", [False, True])
def test_attention_of_several_heads(inputs, outputs, attributes, known):
    weights = [3] if known and len(inputs) > 3 and inputs[3] is not None else []
    check_network(*microsoft("MultiHeadAttention", inputs, outputs, weights, num_heads=2, **attributes))


@pytest.mark.parametrize(
    ("steps", "past", "packed", "attributes"),
    [
        (5, 0, False, {}),
        (5, 0, True, {"do_rotary": 1}),
        (1, 4, False, {"do_rotary": 1, "rotary_interleaved": 1}),
        (5, 0, False, {"local_window_size": 2, "softcap": 3.0}),
        (1, 6, False, {"local_window_size": 3, "scale": 0.5}),
        (3, 4, False, {}),
    ],
)
def test_attention_of_groups(steps, past, packed, attributes):
    heads, shared, size = 4, 2, 16
    batch = 1 if steps == 3 else 2
    wide = [heads * size, shared * size, shared * size]
    data = [random(batch, steps, width, seed=n) for n, width in enumerate(wide)]
    if packed:
        data = [np.concatenate(data, 2), None, None]
    old = [random(batch, shared, past, size, seed=n) if past else None for n in (3, 4)]
    lengths = [np.full(batch, past + steps - 1, "int32"), np.array(past + steps, "int32")]
    tables = [random(16, size // 2, seed=n) for n in (5, 6)] if attributes.get("do_rotary") else []
    network, feeds = microsoft(
        "GroupQueryAttention",
        [*data, *old, *lengths, *tables],
        3,
        [5, 6],
        num_heads=heads,
        kv_num_heads=shared,
        **attributes,
    )
    check_network(network, feeds)


@pytest.mark.parametrize("interleaved", [0, 1])
@pytest.mark.parametrize(("shape", "size"), [((2, 5, 16), 8), ((2, 2, 5, 8), 8), ((2, 5, 16), 4)])
@pytest.mark.parametrize(("places", "known"), [(below(16, 2, 5), ()), (np.array([3]), ()), (np.array([3]), (1,))])
def test_rotary_embedding(shape, size, places, known, interleaved):
    tables = [random(16, size // 2, seed=n) for n in (1, 2)]
    attributes = {"num_heads": 2, "rotary_embedding_dim": size} if size == 4 else {}
    inputs = [random(*shape), places.astype("int64"), *tables]
    check_network(*microsoft("RotaryEmbedding", inputs, known=known, interleaved=interleaved, **attributes))


@pytest.mark.parametrize(
    ("operator", "inputs", "attributes", "reason"),
    [
        ("Attention", [HIDDEN, WEIGHTS, BIAS], {"num_heads": 2, "do_rotary": 1}, "do_rotary"),
        ("Attention", [HIDDEN, WEIGHTS, BIAS, below(2, 2, 1, 8, 8)], {"num_heads": 2}, "a mask of shape"),
        ("Attention", [HIDDEN, WEIGHTS, BIAS], {"num_heads": 3}, "don't divide into 3 heads"),
        ("MultiHeadAttention", [random(2, 5, 2, 3, 4)], {"num_heads": 2}, "packed queries"),
        ("MultiHeadAttention", [QUERY, KEY, VALUE], {"num_heads": 2, "unidirectional": 1}, "other numbers"),
        ("FusedMatMul", [random(2, 3), random(3, 2)], {"transBatchA": 1}, "transBatchA of a tensor with 2 axes"),
        (
            "GroupQueryAttention",
            [random(1, 2, 32), random(1, 2, 16), random(1, 2, 16), None, None, ints(1), np.array(2, "int32")],
            {"num_heads": 2, "kv_num_heads": 1},
            "computed seqlens_k",
        ),
    ],
)
def test_refused(operator, inputs, attributes, reason):
    message = refusal(microsoft(operator, inputs, **attributes)[0])
    assert message.startswith(f"net: node 'node' (com.microsoft.{operator}): ") and reason in message


def test_statistics_for_training_are_refused():
    network, _ = microsoft("SkipLayerNormalization", [DATA, DATA, random(8)], 2)
    assert "outputs mean and inv_std_var are not supported" in refusal(network)
