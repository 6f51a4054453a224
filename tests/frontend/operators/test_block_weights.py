"""Weights of few bits with a scale per block: values as ONNX Runtime has them, and the codes stay what they are."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from tests.frontend.operators.one_node import check_network, imported, numbers, one_node, refusal
from tests.helpers import few


def product(
    bits=4, block=16, depth=64, outputs=24, rows=3, points="", bias=False, dtype="float32", order=None, claimed=None
):
    """A `MatMulNBits`, with zero points in ``bytes`` or ``floats``, and its data."""
    rng = np.random.default_rng([bits, block, depth, outputs])
    blocks = -(-depth // block)
    point = {
        "": None,
        "bytes": rng.integers(0, 256, (outputs, -(-blocks * bits // 8))).astype("uint8"),
        "floats": (rng.random((outputs, blocks)) * 2**bits).astype(dtype),
    }[points]
    operands = [
        numbers(rows, depth, dtype=dtype),
        rng.integers(0, 256, (outputs, blocks, block * bits // 8)).astype("uint8"),
        rng.uniform(0.01, 0.1, outputs * blocks).astype(dtype),
        point,
        order,
        numbers(outputs, dtype=dtype) if bias else None,
    ]
    while operands[-1] is None:
        operands.pop()
    sizes = {"K": depth, "N": outputs, "bits": bits, "block_size": block} | (claimed or {})
    return one_node("com.microsoft.MatMulNBits", operands, set(range(1, 6)), opset=21, **sizes)


@few(8)
@given(
    bits=st.sampled_from([2, 4, 8]),
    block=st.sampled_from([16, 32, 64]),
    depth=st.sampled_from([64, 96, 70]),
    outputs=st.sampled_from([1, 10, 32]),
    points=st.sampled_from(["", "bytes", "floats"]),
    bias=st.booleans(),
)
def test_products_of_any_form(bits, block, depth, outputs, points, bias):
    assume(bits < 8 or points != "floats")  # ONNX Runtime computes no such product
    check_network(*product(bits, block, depth, outputs, points=points, bias=bias))


def test_products_in_float16():
    check_network(*product(dtype="float16", bias=True))


@pytest.mark.parametrize(("bits", "points"), [(4, ""), (4, "bytes"), (8, "bytes")])
def test_kernels_read_the_codes(bits, points):
    network, feeds = product(bits, 32, 128, 40, rows=5, points=points, bias=True)
    check_network(network, feeds, kernels=True)
    main = WeightOnly()(imported(network))["main"]
    call, *_ = [b.value for b in bindings(main) if op_name(b.value) == "call_tir"]
    weights = call.args[1].fields[1]
    assert str(weights.ty.dtype) == ("uint32" if bits == 4 else "int8")


def test_the_usual_order_of_inputs_is_none():
    check_network(*product(order=(np.arange(64) // 16).astype("int32")))


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        ({"order": np.arange(64, dtype="int32")[::-1] // 16}, "g_idx that reorders"),
        ({"bits": 3, "block": 64}, "weights of 3 bits"),
        ({"claimed": {"block_size": 0}}, "24×64 weights in blocks of 0"),
        ({"claimed": {"K": 640}}, "none of 24×640 weights"),
    ],
)
def test_what_is_refused(given, reason):
    message = refusal(product(**given)[0])
    assert reason in message and "MatMulNBits" in message and "'node'" in message


def test_weights_that_are_computed_are_refused():
    operands = [numbers(3, 64), np.zeros((8, 4, 8), "uint8"), np.ones(32, "float32")]
    network, _ = one_node("com.microsoft.MatMulNBits", operands, [2], opset=21, K=64, N=8, bits=4, block_size=16)
    assert "not constant" in refusal(network)


def tensor(name, codes, kind):
    return helper.make_tensor(name, kind, codes.shape, codes.ravel().tolist())


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4, TensorProto.INT8, TensorProto.UINT8])
@pytest.mark.parametrize("axis", [0, 1])
def test_dequantized_blocks_in_front_of_a_product(kind, axis):
    rng = np.random.default_rng(axis)
    limits = {"INT4": (-8, 7), "UINT4": (0, 15), "INT8": (-128, 127), "UINT8": (0, 255)}[
        TensorProto.DataType.Name(kind)
    ]
    shape, blocks = ((64, 33), (2, 33)) if axis == 0 else ((33, 64), (33, 2))
    codes, points = (rng.integers(limits[0], limits[1] + 1, each) for each in (shape, blocks))
    points = points // 2
    layer = ("MatMul", {}) if axis == 0 else ("Gemm", {"transB": 1})
    nodes = [
        helper.make_node("DequantizeLinear", ["w", "s", "z"], ["real"], axis=axis, block_size=32),
        helper.make_node(layer[0], ["x", "real"], ["sums"], name="layer", **layer[1]),
        helper.make_node("Relu", ["sums"], ["y"]),
    ]
    scales = numpy_helper.from_array(rng.uniform(0.01, 0.1, blocks).astype("float32"), "s")
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [7, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [7, 33])],
        [tensor("w", codes, kind), scales, tensor("z", points, kind)],
    )
    network = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    feeds = {"x": numbers(7, 64)}
    # ONNX Runtime rounds the data of such products to 8 bits.
    check_network(network, feeds, reference=True, kernels=kind == TensorProto.UINT4)
