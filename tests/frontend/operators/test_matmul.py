"""Matrix products: bias shapes, factors and ranks against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import onnxruntime
import pytest
from onnx import helper, numpy_helper

from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.frontend import load
from tests.helpers import evaluate_module


def single(operator, arrays, constants=(), **attributes):
    """A model of one node whose operands are inputs but for those at ``constants``."""
    names = [f"i{k}" for k in range(len(arrays))]
    node = helper.make_node(operator, names, ["y"], **attributes)
    inputs = [
        helper.make_tensor_value_info(n, helper.np_dtype_to_tensor_dtype(a.dtype), a.shape)
        for k, (n, a) in enumerate(zip(names, arrays, strict=True))
        if k not in constants
    ]
    known = [numpy_helper.from_array(np.asarray(arrays[k]), names[k]) for k in constants if k < len(arrays)]
    graph = helper.make_graph([node], "t", inputs, [helper.make_empty_tensor_value_info("y")], known)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


def check(operator, arrays, constants=(), **attributes):
    model = single(operator, arrays, constants, **attributes)
    feeds = {f"i{k}": a for k, a in enumerate(arrays) if k not in constants}
    (expected,) = onnxruntime.InferenceSession(model.SerializeToString()).run(None, feeds)
    (got,) = evaluate_module(load([model], ["t"]), feeds, "t")
    assert (got.shape, got.dtype) == (expected.shape, expected.dtype)
    np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def random(*shape, dtype="float32"):
    values = np.random.default_rng([*shape, 1]).integers(-9, 9, shape)
    return values.astype(dtype)


@pytest.mark.parametrize("bias", [(7,), (3, 7), (3, 1), (1,), (), None])
@pytest.mark.parametrize("constants", [(), (0,), (1, 2)])
@pytest.mark.parametrize(("rows", "columns"), [(0, 0), (1, 0), (0, 1), (1, 1)])
def test_gemm(bias, constants, rows, columns):
    operands = [random(5, 3) if rows else random(3, 5), random(7, 5) if columns else random(5, 7)]
    if bias is not None:
        operands.append(random(*bias))
    check("Gemm", operands, constants, transA=rows, transB=columns, alpha=0.5, beta=2.0)


@pytest.mark.parametrize("dtype", ["int32", "int64"])
def test_gemm_of_integers(dtype):
    operands = [random(*shape, dtype=dtype) for shape in ((3, 5), (5, 7), (7,))]
    feeds = {f"i{k}": operand for k, operand in enumerate(operands)}
    (got,) = evaluate_module(load([single("Gemm", operands, alpha=2.0, beta=3.0)], ["t"]), feeds, "t")
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, 2 * operands[0] @ operands[1] + 3 * operands[2])
    with pytest.raises(ModelError, match=r"Gemm.*alpha 0.5 of integers"):
        load([single("Gemm", operands, alpha=0.5)], ["t"])


@pytest.mark.parametrize("dtype", ["float32", "int64"])
@pytest.mark.parametrize("constants", [(), (0,), (1,)])
@pytest.mark.parametrize(
    ("left", "right"),
    [((5,), (5, 7)), ((3, 5), (5,)), ((5,), (5,)), ((2, 3, 5), (5, 7)), ((5,), (2, 5, 7)), ((2, 1, 3, 5), (4, 5, 7))],
)
def test_matmul(left, right, constants, dtype):
    check("MatMul", [random(*left, dtype=dtype), random(*right, dtype=dtype)], constants)


@pytest.mark.parametrize("shape", [(1, 1), (2, 2), (3, 3), (4, 4), (2, 3, 3, 3)])
def test_determinants(shape):
    check("Det", [random(*shape)])


def test_large_determinants_are_refused():
    with pytest.raises(ModelError, match=r"Det.*5×5 is not supported"):
        load([single("Det", [random(5, 5)])], ["t"])
