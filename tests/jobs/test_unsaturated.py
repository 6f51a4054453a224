"""8-bit products in ONNX Runtime that no machine saturates."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.jobs.check.originals import calls_of
from nnfuze_tvm.jobs.check.unsaturated import multiplies_bytes, unsaturated

pytest.importorskip("onnxruntime")


def product(data: str, weight: np.ndarray, zero: np.ndarray | None, *, constant: bool = True) -> onnx.ModelProto:
    """Return ``MatMulInteger`` of ``x [2, K]`` and ``w [K, N]``."""
    names = ["x", "w", *(["", "z"] if zero is not None else [])]
    weights = {"w": weight} if zero is None else {"w": weight, "z": zero}
    inputs = [helper.make_tensor_value_info("x", getattr(TensorProto, data.upper()), [2, len(weight)])]
    if not constant:
        inputs.append(helper.make_tensor_value_info("w", TensorProto.INT8, weight.shape))
        del weights["w"]
    graph = helper.make_graph(
        [helper.make_node("MatMulInteger", names, ["y"])],
        "main",
        inputs,
        [helper.make_tensor_value_info("y", TensorProto.INT32, [2, weight.shape[1]])],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


@pytest.mark.parametrize("constant", [True, False])
@pytest.mark.parametrize("how", ["exact", "plain"])
@pytest.mark.parametrize("zero", [None, np.int8(-3), np.array([-128, 0, 5, 127], "int8")])
def test_largest_products_are_exact(how, constant, zero):
    weight = np.full((16, 4), 127, "int8")
    weight[:, 1] = -128
    data = np.full((2, 16), 255, "uint8")
    model = product("uint8", weight, None if zero is None else np.asarray(zero), constant=constant)
    before = model.SerializeToString()
    (found,) = calls_of(model, how)({"x": data} if constant else {"x": data, "w": weight})
    want = data.astype("int64") @ (weight.astype("int64") - (0 if zero is None else zero.astype("int64")))
    np.testing.assert_array_equal(found, want)
    assert model.SerializeToString() == before, "what was given stays as it is"


def test_signed_data_keep_their_weights():
    model = product("int8", np.full((16, 4), 127, "int8"), None)
    assert list(unsaturated(model).graph.node[0].input) == ["x", "w"]


@pytest.mark.parametrize("constant", [True, False])
def test_weights_and_zero_points_that_several_read(constant):
    weight = np.full((16, 4), 100, "int8")
    model = product("uint8", weight, np.full((), 7, "int8"), constant=constant)
    model.graph.node.append(helper.make_node("MatMulInteger", ["x", "w", "", "z"], ["again"]))
    model.graph.output.append(helper.make_tensor_value_info("again", TensorProto.INT32, [2, 4]))
    onnx.checker.check_model(unsaturated(model))
    data = {"x": np.full((2, 16), 200, "uint8")}
    found = calls_of(model)(data if constant else {**data, "w": weight})
    for each in found:
        np.testing.assert_array_equal(each, np.full((2, 4), 16 * 200 * 93))


def test_products_in_branches():
    model = product("uint8", np.full((16, 4), 127, "int8"), None)
    inner = onnx.GraphProto()
    inner.CopyFrom(model.graph)
    del inner.input[:]
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.input.append(helper.make_tensor_value_info("which", TensorProto.BOOL, []))
    model.graph.node.append(helper.make_node("If", ["which"], ["y"], then_branch=inner, else_branch=inner))
    data = {"x": np.full((2, 16), 255, "uint8"), "which": np.array(True)}
    (found,) = calls_of(model, "plain")(data)
    np.testing.assert_array_equal(found, np.full((2, 4), 16 * 255 * 127))


def test_what_multiplies_bytes():
    model = product("uint8", np.ones((4, 4), "int8"), None)
    assert multiplies_bytes(model)
    model.graph.node[0].op_type = "MatMul"
    assert not multiplies_bytes(model)
    assert unsaturated(model) is model
