"""Files that are valid and odd: how tensors are stored, what may be missing, and what is said of what can't be."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from tests.helpers import evaluate_module


def network(nodes, inputs, outputs=("y",), weights=None, opset=18):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs.items()],
        [helper.make_empty_tensor_value_info(name) for name in outputs],
        [numpy_helper.from_array(value, name) for name, value in (weights or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=8)


def node(op, inputs, outputs, **attributes):
    return helper.make_node(op, inputs.split(), outputs.split(), name=op.lower(), **attributes)


def evaluated(model, **feeds):
    return evaluate_module(load([model], ["net"]), feeds, "net")


def refusal(model):
    with pytest.raises(ModelError) as caught:
        load([model], ["net"])
    assert "\n" not in str(caught.value)
    return str(caught.value)


X = np.random.default_rng(0).standard_normal((2, 3)).astype("float32")


@pytest.mark.parametrize("places", [np.array([1, 3]), np.array([[0, 1], [1, 1]])], ids=["flat", "by axis"])
@pytest.mark.parametrize("stored", ["initializer", "constant"])
def test_sparse_weights(places, stored):
    values = numpy_helper.from_array(np.array([2.0, -1.0], "float32"), "w")
    sparse = helper.make_sparse_tensor(values, numpy_helper.from_array(places), [3, 2])
    nodes = [node("MatMul", "x w", "y")]
    if stored == "constant":
        nodes.insert(0, node("Constant", "", "w", sparse_value=sparse))
    model = network(nodes, {"x": [2, 3]})
    if stored == "initializer":
        model.graph.sparse_initializer.append(sparse)
    np.testing.assert_allclose(evaluated(model, x=X)[0], X @ np.array([[0, 2], [0, -1], [0, 0]], "float32"))


def test_sparse_weights_that_do_not_fit_are_refused():
    values = numpy_helper.from_array(np.ones(2, "float32"), "w")
    model = network([node("MatMul", "x w", "y")], {"x": [2, 3]})
    model.graph.sparse_initializer.append(
        helper.make_sparse_tensor(values, numpy_helper.from_array(np.array([1, 9])), [3, 2])
    )
    assert refusal(model).startswith("net: sparse tensor 'w': index 9 is out of bounds")


@pytest.mark.parametrize("kind", [TensorProto.INT4, TensorProto.UINT4])
def test_codes_of_4_bits_that_are_dequantized(kind):
    codes = np.arange(12).reshape(3, 4) % 8
    dtype = helper.tensor_dtype_to_np_dtype(kind)
    nodes = [node("DequantizeLinear", "q s z", "w", axis=1), node("MatMul", "x w", "y")]
    model = network(nodes, {"x": [2, 3]}, weights={"s": np.linspace(0.1, 0.4, 4, dtype="float32")}, opset=21)
    model.ir_version = 10
    for name, values in (("q", codes), ("z", np.arange(4))):
        model.graph.initializer.append(numpy_helper.from_array(values.astype(dtype), name))
    want = X @ ((codes - np.arange(4)) * np.linspace(0.1, 0.4, 4, dtype="float32"))
    np.testing.assert_allclose(evaluated(model, x=X)[0], want, rtol=1e-5, atol=1e-6)
    # What is rounded to 4 bits would have other bounds.
    model.graph.node.append(node("QuantizeLinear", "x one z0", "r"))
    model.graph.output.append(helper.make_empty_tensor_value_info("r"))
    model.graph.initializer.extend(
        [numpy_helper.from_array(np.ones((), "float32"), "one"), numpy_helper.from_array(np.zeros((), dtype), "z0")]
    )
    assert "constant 'z0': type" in refusal(model)


def test_optional_values():
    nodes = [
        node("Optional", "x", "o"),
        node("OptionalHasElement", "o", "there"),
        helper.make_node("OptionalHasElement", [""], ["missing"]),
        node("OptionalGetElement", "o", "y"),
    ]
    found = evaluated(network(nodes, {"x": [2, 3]}, ["y", "there", "missing"]), x=X)
    np.testing.assert_array_equal(found[0], X)
    assert found[1].item() is True and found[2].item() is False
    empty = helper.make_tensor_type_proto(TensorProto.FLOAT, [2])
    nodes = [node("Optional", "", "o", type=empty), node("OptionalGetElement", "o", "y")]
    assert refusal(network(nodes, {"x": [2, 3]})) == (
        "net: node 'optional' (Optional): an optional value that is not there is not supported"
    )


def test_attributes_that_are_empty_lists():
    """As exporters write them for what is a single number."""
    empty = onnx.AttributeProto(name="value_ints", type=onnx.AttributeProto.INTS)
    shape = onnx.NodeProto(op_type="Constant", output=["shape"], attribute=[empty])
    (found,) = evaluated(network([shape, node("Reshape", "x shape", "y")], {"x": [1, 1]}), x=np.ones((1, 1), "float32"))
    assert found.shape == ()
    old = network([node("ReduceSum", "x", "y", keepdims=0)], {"x": [2, 3]}, opset=11)
    old.graph.node[0].attribute.append(onnx.AttributeProto(name="axes", type=onnx.AttributeProto.INTS))
    (found,) = evaluated(old, x=X)
    np.testing.assert_allclose(found, X.sum(), rtol=1e-6)


@pytest.mark.parametrize(
    ("inputs", "reason"),
    [("x w", "node 'matmul' (MatMul): Incompatible dimensions for matrix multiplication"),
     ("x", "node 'matmul' (MatMul): it has 1 inputs, 2 are needed")],
)  # fmt: skip
def test_what_can_not_be_is_said_in_words_of_the_file(inputs, reason):
    model = network([node("MatMul", inputs, "y")], {"x": [2, 3]}, weights={"w": np.ones((4, 2), "float32")})
    assert refusal(model) == f"net: {reason}"
