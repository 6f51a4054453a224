"""Weights that a file has in 8 bits: they become integer layers with the file's own codes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from onnx import helper, numpy_helper

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.helpers import evaluate_module

INT8 = Policy.uniform(bits=8)


class Network:
    """A convolution, a depthwise one and a dense layer, with weights behind a dequantize."""

    def __init__(self, dtype="int8", per_channel=True, zero=None):
        self.rng = np.random.default_rng(0)
        self.zero = (128 if dtype == "uint8" else 0) if zero is None else zero
        self.dtype, self.per_channel = dtype, per_channel
        self.nodes, self.known, self.codes = [], [], {}

    def constant(self, name, value):
        self.known.append(numpy_helper.from_array(np.asarray(value), name))
        return name

    def weight(self, name, shape, axis):
        codes = self.rng.integers(-127, 128, shape) + self.zero
        self.codes[name] = codes.astype(self.dtype)
        count = shape[axis] if self.per_channel else 1
        scale = self.rng.uniform(0.005, 0.01, count).astype("float32")
        zero = np.full(count, self.zero, self.dtype)
        if not self.per_channel:
            scale, zero = scale[0], zero[0]
        names = [f"{name}_codes", f"{name}_scale", f"{name}_zero"]
        operands = [self.constant(*pair) for pair in zip(names, (self.codes[name], scale, zero), strict=True)]
        self.nodes.append(helper.make_node("DequantizeLinear", operands, [name], axis=axis if self.per_channel else 0))
        return name

    def model(self):
        conv, row, dense = (
            self.weight("w1", (8, 3, 3, 3), 0),
            self.weight("w2", (8, 1, 3, 3), 0),
            self.weight("w3", (5, 8), 0),
        )
        self.nodes += [
            helper.make_node(
                "Conv", ["x", conv, self.constant("b1", self.rng.random(8, "f4"))], ["c"], "conv", pads=[1] * 4
            ),
            helper.make_node("Relu", ["c"], ["r"]),
            helper.make_node("Conv", ["r", row], ["d"], "row", pads=[1] * 4, group=8),
            helper.make_node("GlobalAveragePool", ["d"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node(
                "Gemm", ["f", dense, self.constant("b3", self.rng.random(5, "f4"))], ["y"], "dense", transB=1
            ),
        ]
        x = helper.make_tensor_value_info("x", 1, [1, 3, 8, 8])
        graph = helper.make_graph(self.nodes, "t", [x], [helper.make_empty_tensor_value_info("y")], self.known)
        return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def merged(model):
    return tvm.transform.Sequential(pipeline.merge_phases(None))(load([model], ["t"]))


SAMPLES = {"x": np.random.default_rng(1).standard_normal((8, 3, 8, 8)).astype("float32")}


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_layers_become_integer_with_the_codes_of_the_file(dtype, per_channel):
    network = Network(dtype, per_channel)
    mod = merged(network.model())
    quantized = InsertQDQ(SAMPLES, INT8)(mod)
    integer = RealizeInteger()(quantized)
    assert not ir.float_layers(integer)
    one = {"x": SAMPLES["x"][:1]}
    (expected,), (got,) = evaluate_module(mod, one), evaluate_module(integer, one)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()
    kept = {
        binding.var.name: array(binding.value.args[1]).astype("int64")
        for binding in bindings(integer["main"])
        if op_name(binding.value) in ("nn.conv2d", "matmul")
    }
    assert kept.keys() == {"t/conv", "t/row", "t/dense"}
    for layer, weight in (("t/conv", "w1"), ("t/row", "w2"), ("t/dense", "w3")):
        codes = network.codes[weight].astype("int64") - network.zero
        np.testing.assert_array_equal(kept[layer], codes.T if layer == "t/dense" else codes)


def test_codes_that_int8_can_not_hold_are_quantized_anew():
    mod = merged(Network("uint8", zero=50).model())
    integer = RealizeInteger()(InsertQDQ(SAMPLES, INT8)(mod))
    assert not ir.float_layers(integer)
    one = {"x": SAMPLES["x"][:1]}
    (expected,), (got,) = evaluate_module(mod, one), evaluate_module(integer, one)
    assert np.abs(got - expected).max() < 0.03 * np.abs(expected).max()


def test_a_network_that_is_quantized_already_stays_as_it_is():
    mod = InsertQDQ(SAMPLES, INT8)(merged(Network().model()))
    again = InsertQDQ({"x": SAMPLES["x"] * 3}, INT8)(mod)
    tvm.ir.assert_structural_equal(mod["main"], again["main"])


def test_a_policy_leaves_stored_weights_alone():
    mod = merged(Network().model())
    tvm.ir.assert_structural_equal(InsertQDQ(SAMPLES, Policy.uniform(bits=32))(mod), mod)


def test_why_layers_stay_in_float():
    nodes = [helper.make_node("MatMul", ["x", "z"], ["y"], "product")]
    inputs = [helper.make_tensor_value_info(name, 1, [4, 4]) for name in ("x", "z")]
    graph = helper.make_graph(nodes, "t", inputs, [helper.make_empty_tensor_value_info("y")])
    mod = merged(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8))
    samples = {name: np.ones((4, 4), "float32") for name in ("x", "z")}
    quantized = InsertQDQ(samples, INT8)(mod)
    reasons = {"t/product": "its weights are not constant"}
    assert ir.float_layers(quantized) == reasons
    assert ir.float_layers(RealizeInteger()(quantized)) == reasons
