"""Shapes, types and constants."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from tests.frontend.operators.one_node import check, imported, one_node

RNG = np.random.default_rng(0)
DATA = RNG.standard_normal((2, 3, 4)).astype("float32")
NOTHING = np.zeros((2, 0, 4), "float32")


@pytest.mark.parametrize("shape", [[2, -1], [0, 0, 2, 2], [-1], [24, 1]])
def test_reshapes(shape):
    check("Reshape", [DATA, np.array(shape)], (1,))


def test_reshapes_of_single_values_and_of_nothing():
    check("Reshape", [np.ones(1), np.zeros(0, int)], (1,))
    check("Reshape", [NOTHING, np.array([4, 0, 7])], (1,), allowzero=1, reference=True)


@pytest.mark.parametrize("axis", [0, 1, 2, 3, -1, -3])
def test_flattens(axis):
    check("Flatten", [DATA], axis=axis)
    check("Flatten", [np.float32(1)], axis=0)


@pytest.mark.parametrize("opset", [11, 13])
def test_axes_of_size_one(opset):
    data = DATA.reshape(1, 6, 1, 4)
    check("Squeeze", [data], opset=opset)
    if opset < 13:
        check("Squeeze", [data], axes=[-2, 0], opset=opset)
        check("Unsqueeze", [DATA], axes=[0, -1], opset=opset)
    else:
        check("Squeeze", [data, np.array([-2, 0])], (1,), opset=opset)
        check("Unsqueeze", [DATA, np.array([0, -1])], (1,), opset=opset)


WILD = np.array([np.nan, np.inf, -np.inf, 3e9, -3e9, 1e20, 300.7, -300.7, 0.2, -1.7, 70000, 0.0], "float32")
TYPES = ["INT8", "UINT8", "INT16", "INT32", "INT64", "BOOL", "FLOAT16", "DOUBLE"]


@pytest.mark.parametrize("to", TYPES)
def test_casts(to):
    number = TensorProto.DataType.Value(to)
    # What an int8 holds of 3e9 is C's business; so is what a CPU makes of 1e20 in 64 bits.
    data = WILD if to in ("BOOL", "FLOAT16", "DOUBLE") else WILD[6:]
    check("Cast", [data], to=number, kernels=True)
    check("Cast", [np.array([300, -1, 2**31 - 1, -(2**31), 2**40 + 5, 0])], to=number)
    check("Cast", [np.array([True, False])], to=number)


def test_casts_to_types_of_others():
    check("CastLike", [DATA, np.array([1])], opset=15, reference=True)
    check("CastLike", [DATA, np.array([True])], (1,), opset=15, reference=True)


@pytest.mark.parametrize("to", ["STRING", "BFLOAT16", "FLOAT8E4M3FN"])
def test_types_without_kernels_are_refused(to):
    network, _ = one_node("Cast", [DATA], to=TensorProto.DataType.Value(to), opset=19)
    with pytest.raises(ModelError, match=f"node 'node' \\(Cast\\): type {to.lower()} is not supported"):
        imported(network)
    network.graph.input[0].type.tensor_type.elem_type = TensorProto.DataType.Value(to)
    with pytest.raises(ModelError, match=f"^net: input 'x0': type {to.lower()} is not supported"):
        imported(network)


def test_matrices_like_others():
    check("EyeLike", [DATA[0]], k=1)
    check("EyeLike", [DATA[0]], k=-1, dtype=TensorProto.INT64)


@pytest.mark.parametrize(
    "attributes",
    [
        {"value": numpy_helper.from_array(np.array([2**40, -1]))},
        {"value_float": 1.5},
        {"value_floats": [1.0, 2.0]},
        {"value_int": 2**40},
        {"value_ints": [1, 2**40]},
    ],
    ids=lambda attributes: next(iter(attributes)),
)
def test_constants_keep_their_type(attributes):
    check("Constant", [], **attributes, opset=13)


def test_shapes_are_known():
    check("Shape", [DATA], start=-2)
    check("Shape", [DATA], start=0, end=-1)
    check("Size", [DATA])


def shape_network(dimension) -> onnx.ModelProto:
    """Return a network whose output is the shape of its input."""
    return helper.make_model(
        helper.make_graph(
            [helper.make_node("Shape", ["x"], ["y"])],
            "net",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, [dimension, 3])],
            [helper.make_tensor_value_info("y", TensorProto.INT64, [2])],
        ),
        opset_imports=[helper.make_opsetid("", 17)],
    )


@pytest.mark.parametrize(("written", "read"), [(0, 0), ("batch", 1), (None, 1), (5, 5)])
def test_only_what_is_not_written_is_one(written, read):
    mod = load([shape_network(written)], ["t"])
    assert [int(size) for size in mod["t"].params[0].ty.shape.values] == [read, 3]


def test_a_zero_that_means_any_size_can_be_given_one():
    mod = load([shape_network(0)], ["t"], shapes={"x": (4, 3)})
    assert int(mod["t"].params[0].ty.shape.values[0]) == 4


def test_what_has_no_elements_is_computed():
    check("Concat", [NOTHING, DATA], axis=1, kernels=True)
    check("ReduceProd", [NOTHING, np.array([1])], (1,), reference=True)
    check("MatMul", [np.zeros((3, 0), "float32"), np.zeros((0, 4), "float32")])
