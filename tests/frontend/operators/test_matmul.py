"""Matrix products: bias shapes, factors and ranks against ONNX Runtime."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.operators.one_node import check, one_node, refusal


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
    want = 2 * operands[0] @ operands[1] + 3 * operands[2]
    check("Gemm", operands, want=[want], alpha=2.0, beta=3.0)
    assert "(Gemm): alpha 0.5 of integers" in refusal(one_node("Gemm", operands, alpha=0.5)[0])


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
    message = refusal(one_node("Det", [random(5, 5)])[0])
    assert "(Det)" in message and "5×5 is not supported" in message
