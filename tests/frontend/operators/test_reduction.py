"""Sums, extremes and their places."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.operators.one_node import check

RNG = np.random.default_rng(0)
REDUCTIONS = [
    "ReduceSum", "ReduceMean", "ReduceProd", "ReduceMax", "ReduceMin", "ReduceL1", "ReduceL2", "ReduceSumSquare",
    "ReduceLogSum", "ReduceLogSumExp",
]  # fmt: skip


def numbers(*shape, dtype="float32"):
    return np.round(RNG.uniform(1, 9, shape)).astype(dtype)


# What whole numbers are left of logarithms is told in as many ways as there are runtimes.
FLOATS = [(op, dtype) for op in REDUCTIONS for dtype in ("float32", "float16")]
WHOLE = [(op, "int64") for op in REDUCTIONS if "Log" not in op]


@pytest.mark.filterwarnings("ignore:overflow")
@pytest.mark.parametrize(("op", "dtype"), FLOATS + WHOLE)
def test_reductions(op, dtype):
    data, facts = numbers(2, 3, 4, dtype=dtype), {"reference": True}
    if op != "ReduceSum":
        check(op, [data], axes=[1, -1], keepdims=0, opset=13, **facts)
    check(op, [data, np.array([-1])], (1,), **facts)
    check(op, [data], keepdims=0, **facts)
    check(op, [data, np.zeros(0, int)], (1,), noop_with_empty_axes=1, **facts)
    check(op, [data, np.zeros(0, int)], (1,), **facts)


@pytest.mark.parametrize("op", ["ReduceMax", "ReduceMin", "ReduceLogSumExp"])
def test_no_nan_and_no_infinity_is_lost(op):
    rows = [[np.nan, 1], [3, np.nan], [np.inf, -np.inf], [-np.inf, -np.inf], [np.inf, np.inf], [1000, 999]]
    # The reference of ReduceLogSumExp takes infinity from itself.
    data = np.array(rows if op != "ReduceLogSumExp" else rows[:2] + rows[5:], "float32")
    check(op, [data, np.array([1])], (1,), reference=True, kernels=True)


def test_whole_numbers_stay_whole():
    check("ReduceMean", [np.array([[-7, 2], [7, 2]]), np.array([1])], (1,), kernels=True)
    check("ReduceSum", [np.array([2**40, 2**41 + 1])], kernels=True)
    check("ReduceMax", [numbers(2, 3) > 4, np.array([1])], (1,), opset=20, reference=True, kernels=True)


@pytest.mark.parametrize("op", ["ArgMax", "ArgMin"])
@pytest.mark.parametrize("attributes", [{}, {"axis": 1, "keepdims": 0}, {"axis": -1}])
@pytest.mark.parametrize("last", [0, 1])
def test_places_of_extremes(op, attributes, last):
    check(op, [numbers(2, 5, 4)], select_last_index=last, **attributes)


@pytest.mark.parametrize("opset", [11, 13])
@pytest.mark.parametrize("attributes", [{}, {"axis": 0}, {"axis": 1}, {"axis": -1}])
def test_the_first_largest_is_hardmax(opset, attributes):
    check("Hardmax", [numbers(2, 3, 4)], opset=opset, **attributes)


@pytest.mark.parametrize("exclusive", [0, 1])
@pytest.mark.parametrize("reverse", [0, 1])
@pytest.mark.parametrize(("axis", "dtype"), [(1, "float32"), (-2, "int64")])
def test_running_sums(axis, dtype, exclusive, reverse):
    check("CumSum", [numbers(2, 5, dtype=dtype), np.array(axis)], (1,), exclusive=exclusive, reverse=reverse)
