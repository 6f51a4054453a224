"""Layers around an image that is resized: order of axes, codes and channels go through."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.helpers import evaluate_module

SAMPLES = {"x": np.random.default_rng(0).standard_normal((4, 8, 6, 6)).astype("float32")}


def network(scale, mode="nearest"):
    """A convolution, a resized image, another convolution; merged."""
    rng = np.random.default_rng(1)
    weights = {name: rng.standard_normal(shape) / 6 for name, shape in (("v", (16, 8, 3, 3)), ("w", (8, 16, 3, 3)))}
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["a"], name="first", pads=[1] * 4),
        helper.make_node("Relu", ["a"], ["b"]),
        helper.make_node("Resize", ["b", "", "s"], ["c"], mode=mode),
        helper.make_node("Conv", ["c", "w"], ["y"], name="second", pads=[1] * 4),
    ]
    tensors = {name: value.astype("float32") for name, value in weights.items()}
    tensors["s"] = np.array([1, 1, scale, scale], "float32")
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 8, 6, 6])],
        [helper.make_empty_tensor_value_info("y")],
        [numpy_helper.from_array(value, name) for name, value in tensors.items()],
    )
    mod = load([helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)])], ["t"])
    return tvm.transform.Sequential(pipeline.merge_phases(None))(mod)


def calls(mod):
    return [(dataflow.op_name(each.value), each.var) for each in dataflow.bindings(mod["main"])]


@pytest.mark.parametrize("scale", [2, 1.5])
def test_copies_of_pixels_are_codes(scale):
    mod = InsertQDQ(SAMPLES, Policy.uniform(bits=8))(network(scale))
    whole = RealizeInteger()(pipeline.layout_phase()(mod))
    copies = [str(var.ty.dtype) for name, var in calls(whole) if name in ("take", "image.resize2d")]
    assert copies and set(copies) <= {"int8", "uint8"}
    inputs = {"x": SAMPLES["x"][:1]}
    (want,), (got,) = evaluate_module(mod, inputs), evaluate_module(whole, inputs)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("mode", ["nearest", "linear"])
@pytest.mark.parametrize("scale", [2, 1.5])
def test_axes_are_reordered_at_the_ends_only(scale, mode):
    mod = network(scale, mode)
    moved = pipeline.layout_phase()(mod)
    names = [name for name, _ in calls(moved)]
    assert names.count("permute_dims") == 2 and {names[0], names[-1]} == {"permute_dims"}
    inputs = {"x": SAMPLES["x"][:1]}
    (want,), (got,) = evaluate_module(mod, inputs), evaluate_module(moved, inputs)
    np.testing.assert_allclose(got, want, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize("scale", [2, 1.5])
def test_channels_are_pruned_through(scale):
    pruned = PruneChannels(Policy.uniform(keep=0.5))(network(scale))
    first = next(var for _, var in calls(pruned) if var.name.endswith("first"))
    assert ir.static_shape(first) == (1, 8, 6, 6)
    evaluate_module(pruned, {"x": SAMPLES["x"][:1]})
