"""Operators on 8-bit tensors: within one step of ONNX Runtime, and integer kernels where they can be."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import helper

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.jobs.check.originals import calls_of
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.frontend.operators.one_node import one_node, refusal
from tests.helpers import evaluate_module

STEP = np.float32(0.02)


def single(operator, arrays, feeds=(0,), domain="", opset=13, **attributes):
    """A model of one node whose operands are constants but for those at ``feeds``, and what those are."""
    known = set(range(len(arrays))) - set(feeds)
    return one_node(f"{domain}.{operator}" if domain else operator, arrays, known, opset=opset, **attributes)


def check(operator, arrays, feeds=(0,), *, step=1, floats=False, **options):
    """Compare the QDQ form and the integer one, which may have ``floats`` in it, with ONNX Runtime."""
    model, given = single(operator, arrays, feeds, **options)
    (expected,) = calls_of(model)(given)
    loaded = load([model], ["t"])
    merged = tvm.transform.Sequential(pipeline.merge_phases(None))(loaded)
    integer = RealizeInteger()(merged)
    for got in (evaluate_module(loaded, given, "t")[0], evaluate_module(integer, given)[0]):
        assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
        if expected.dtype.kind == "f":
            np.testing.assert_allclose(got, expected, rtol=1e-5, atol=1e-6)
        else:
            assert np.abs(got.astype("int64") - expected.astype("int64")).max() <= step
    assert not ir.float_layers(integer)
    left = {op_name(binding.value) for binding in bindings(integer["main"])} & {"quantize", "dequantize"}
    assert floats or not left


def codes(dtype, *shape, seed=0):
    limits = np.iinfo(dtype)
    # Weights at -128 are allowed, too.
    return np.random.default_rng([seed, *shape]).integers(limits.min, limits.max + 1, shape).astype(dtype)


def point(dtype, value=3):
    return np.array(value + (117 if dtype == "uint8" else 0), dtype)


DTYPES = pytest.mark.parametrize("dtype", ["int8", "uint8"])


@DTYPES
@pytest.mark.parametrize("weights", ["int8", "uint8", "per channel"])
@pytest.mark.parametrize("bias", [False, True])
def test_convolutions(dtype, weights, bias):
    if (dtype, weights) == ("int8", "uint8"):
        pytest.skip("ONNX Runtime has no kernel")
    per_channel = weights == "per channel"
    kind = "int8" if per_channel else weights
    scale = np.linspace(0.002, 0.01, 8, dtype="float32") if per_channel else np.float32(0.01)
    zero = np.zeros(8, kind) if per_channel else point(kind, 11) if kind == "uint8" else np.int8(0)
    sums = np.arange(-400, 400, 100, dtype="int32") * 7 if bias else None
    operands = [
        codes(dtype, 1, 4, 7, 7),
        STEP,
        point(dtype),
        codes(kind, 8, 4, 3, 3),
        scale,
        zero,
        np.float32(0.05),
        point(dtype, -5),
        sums,
    ]
    check("QLinearConv", operands, pads=[1, 1, 1, 1], strides=[2, 2])


@DTYPES
@pytest.mark.parametrize("layer", ["depthwise", "row", "same"])
def test_other_convolutions(dtype, layer):
    shape, weights, options = {
        "depthwise": ((1, 8, 7, 7), (8, 1, 3, 3), {"group": 8, "pads": [1] * 4}),
        "row": ((1, 4, 9), (8, 4, 3), {"pads": [1, 1]}),
        "same": ((1, 4, 7, 7), (8, 4, 3, 3), {"auto_pad": "SAME_UPPER", "strides": [2, 2]}),
    }[layer]
    operands = [codes(dtype, *shape), STEP, point(dtype), codes("int8", *weights), np.float32(0.01), np.int8(0)]
    check("QLinearConv", [*operands, np.float32(0.05), point(dtype)], **options)


@DTYPES
@pytest.mark.parametrize("case", ["matrix", "columns", "both computed"])
def test_matrix_products(dtype, case):
    left = [codes(dtype, 2, 3, 16), STEP, point(dtype)]
    right = [codes("int8", 16, 8), np.float32(0.01), np.int8(0)]
    if case == "columns":
        right[1:] = np.linspace(0.002, 0.01, 8, dtype="float32"), np.zeros(8, "int8")
    if case == "both computed":
        right = [codes(dtype, 2, 16, 8), np.float32(0.01), point(dtype, 9)]
    feeds = (0, 3) if case == "both computed" else (0,)
    check("QLinearMatMul", [*left, *right, np.float32(0.05), point(dtype)], feeds)


@DTYPES
@pytest.mark.parametrize("operator", ["QLinearAdd", "QLinearMul"])
@pytest.mark.parametrize("feeds", [(0,), (0, 3)])
def test_arithmetic(dtype, operator, feeds):
    operands = [
        codes(dtype, 2, 4, 5),
        STEP,
        point(dtype),
        codes(dtype, 2, 4, 5, seed=1),
        np.float32(0.03),
        point(dtype, 9),
    ]
    check(operator, [*operands, np.float32(0.06), point(dtype)], feeds, domain="com.microsoft", floats=len(feeds) == 1)


@DTYPES
@pytest.mark.parametrize("last", [0, 1])
def test_averages(dtype, last):
    data = [codes(dtype, 1, 6, 6, 6), STEP, point(dtype), np.float32(0.01), point(dtype)]
    check("QLinearGlobalAveragePool", data, domain="com.microsoft", channels_last=last)
    if not last:
        window = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1] * 4}
        check("QLinearAveragePool", data, domain="com.microsoft", **window)


@DTYPES
def test_concatenations_and_functions(dtype):
    parts = [codes(dtype, 1, 4, 5), STEP, point(dtype), codes(dtype, 1, 3, 5), np.float32(0.03), point(dtype, 5)]
    check("QLinearConcat", [np.float32(0.03), point(dtype), *parts], (2, 5), domain="com.microsoft", axis=1)
    data = [codes(dtype, 4, 9), STEP, point(dtype)]
    check("QLinearLeakyRelu", [*data, STEP, point(dtype)], domain="com.microsoft", alpha=0.1, floats=True)
    end = [np.float32(1 / 256), np.array(np.iinfo(dtype).min, dtype)]
    check("QLinearSigmoid", [*data, *end], domain="com.microsoft", floats=True)


@DTYPES
@pytest.mark.parametrize("transposed", [0, 1])
def test_dense_layers(dtype, transposed):
    weight = codes("int8", *((8, 16) if transposed else (16, 8)))
    scales = np.linspace(0.002, 0.01, 8, dtype="float32")
    layer = [codes(dtype, 3, 16), STEP, point(dtype), weight, scales, np.zeros(8, "int8")]
    bias = np.arange(-4, 4, dtype="int32") * 100
    options = {"domain": "com.microsoft", "transB": transposed}
    check("QGemm", [*layer, bias, np.float32(0.05), point(dtype)], alpha=0.5, **options)
    check("QGemm", [*layer, None], **options)


@settings(max_examples=15, deadline=None)
@given(
    left=st.sampled_from(["int8", "uint8"]),
    right=st.sampled_from(["int8", "uint8"]),
    zeros=st.sampled_from(["none", "left", "both"]),
    feeds=st.sampled_from([(0,), (0, 1)]),
    seed=st.integers(0, 100),
)
def test_integer_products_are_exact(left, right, zeros, feeds, seed):
    data, weight = codes(left, 3, 16, seed=seed), codes(right, 16, 8, seed=seed)
    points = [point(left) if zeros != "none" else None, point(right, 9) if zeros == "both" else None]
    while points and points[-1] is None:
        points.pop()
    check("MatMulInteger", [data, weight, *points], feeds, step=0)


@pytest.mark.parametrize(
    "options", [{"pads": [1, 0, 2, 1]}, {"auto_pad": "SAME_LOWER", "strides": [2, 2]}, {"group": 2}]
)
def test_integer_convolutions_are_exact(options):
    weight = codes("uint8", 8, 4 // options.get("group", 1), 3, 3)
    check("ConvInteger", [codes("uint8", 1, 4, 7, 7), weight, point("uint8"), point("uint8", 9)], step=0, **options)


def test_products_with_dynamic_scales():
    data = np.random.default_rng(0).standard_normal((3, 16)).astype("float32")
    weight, scale, bias = codes("int8", 16, 8), np.linspace(0.002, 0.01, 8, dtype="float32"), np.arange(8, dtype="f4")
    options = {"domain": "com.microsoft", "floats": True}
    check("DynamicQuantizeMatMul", [data, weight, scale, None, bias], **options)
    left = [codes("uint8", 3, 16), weight, STEP, scale, point("uint8"), np.zeros(8, "int8"), bias]
    check("MatMulIntegerToFloat", left, **options)


def test_a_tensor_of_zeros_has_a_scale():
    model, given = single("DynamicQuantizeLinear", [np.zeros(4, "f4")])
    model.graph.node[0].output.extend(["scale", "zero"])
    model.graph.output.extend(map(helper.make_empty_tensor_value_info, ["scale", "zero"]))
    got = evaluate_module(load([model], ["t"]), given, "t")
    expected = calls_of(model)(given)
    for ours, theirs in zip(got, expected, strict=True):
        assert ours.dtype == theirs.dtype
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("axis", [0, 1, -1, -2])
@pytest.mark.parametrize("dtype", ["int8", "uint8", "int16", "uint16"])
def test_quantizing_per_channel_and_back(axis, dtype):
    data = np.random.default_rng(0).standard_normal((3, 3, 5)).astype("float32")
    scale, zero = np.linspace(0.01, 0.05, data.shape[axis], dtype="f4"), np.arange(data.shape[axis]).astype(dtype)
    quantized, given = single("QuantizeLinear", [data, scale, zero], opset=21, axis=axis)
    (expected,) = calls_of(quantized)(given)
    (got,) = evaluate_module(load([quantized], ["t"]), given, "t")
    assert got.dtype == expected.dtype
    np.testing.assert_array_equal(got, expected)
    back, given = single("DequantizeLinear", [got, scale, zero], opset=21, axis=axis)
    (expected,) = calls_of(back)(given)
    np.testing.assert_array_equal(evaluate_module(load([back], ["t"]), given, "t")[0], expected)


@pytest.mark.parametrize("axis", [0, 1, -1])
@pytest.mark.parametrize("feeds", [(0,), (0, 1, 2)])
def test_blocks(axis, feeds):
    data = np.random.default_rng(0).standard_normal((4, 6)).astype("float32")
    shape = (2, 6) if axis == 0 else (4, 3)
    scale = np.random.default_rng(1).uniform(0.01, 0.05, shape).astype("float32")
    operands = [data, scale, codes("uint8", *shape)]
    quantized, given = single("QuantizeLinear", operands, feeds, opset=21, axis=axis, block_size=2)
    (expected,) = calls_of(quantized)(given)
    (got,) = evaluate_module(load([quantized], ["t"]), given, "t")
    np.testing.assert_array_equal(got, expected)
    back, given = single("DequantizeLinear", [got, *operands[1:]], feeds, opset=21, axis=axis, block_size=2)
    (expected,) = calls_of(back)(given)
    np.testing.assert_allclose(evaluate_module(load([back], ["t"]), given, "t")[0], expected, rtol=1e-6)


def test_blocks_of_another_shape_are_refused():
    operands = [np.zeros((4, 4), "f4"), np.ones((3, 4), "f4")]
    message = refusal(single("QuantizeLinear", operands, opset=21, axis=0, block_size=2)[0])
    assert "(QuantizeLinear)" in message and "scale of shape [3, 4]" in message
