"""Kernels of bounds, extremes and comparisons: what NumPy makes of NaN and infinities."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from tests.schedules import kernels

NAN, INF = np.float32("nan"), np.float32("inf")
# Of a row that lanes share and of one that is too short for that, by where NaN is.
ROWS = np.stack([np.linspace(-3, 3, 64, dtype="float32") * (-1) ** n for n in range(6)])
for _row, _place in enumerate((0, 7, 32, 63)):
    ROWS[_row, _place] = NAN


def run(function, *arrays):
    params = {f"x{n}": (array.shape, str(array.dtype)) for n, array in enumerate(arrays)}
    mod = kernels.single_function(params, lambda builder, values: builder.emit(function(*values)))
    (got,) = kernels.schedule_and_run(mod, resolve("host"), {f"x{n}": a for n, a in enumerate(arrays)}).outputs
    return got


@pytest.mark.parametrize("axes", [[-1], [0], None])
@pytest.mark.parametrize("name", ["max", "min"])
def test_extremes_are_nan_where_a_number_is(name, axes):
    got = run(lambda x: getattr(op, name)(x, axes), ROWS)
    want = getattr(np, name)(ROWS, axis=None if axes is None else tuple(axes))
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_extremes_find_infinities(dtype):
    rows = np.full((3, 16), -np.inf, dtype)
    rows[1, 3] = np.nan
    np.testing.assert_array_equal(run(lambda x: op.max(x, [-1]), rows), np.max(rows, -1))
    np.testing.assert_array_equal(run(lambda x: op.min(x, [1], True), -rows), np.min(-rows, 1, keepdims=True))


@pytest.mark.parametrize(
    "name", ["equal", "not_equal", "greater", "greater_equal", "less", "less_equal", "maximum", "minimum"]
)
def test_two_operands(name):
    x = np.array([1, NAN, 3, INF, NAN, -0.5, 7, -INF], "float32")
    y = np.array([1, 2, NAN, INF, NAN, 0.5, 6, 4], "float32")
    function = getattr(op, name)
    np.testing.assert_array_equal(run(function, x, y), getattr(np, name)(x, y))
    if not name.endswith("imum"):
        negated = run(lambda a, b: op.logical_not(function(a, b)), x, y)
        np.testing.assert_array_equal(negated, ~getattr(np, name)(x, y))
        np.testing.assert_array_equal(run(lambda a: function(a, a), x), getattr(np, name)(x, x))


def test_not_equal_to_a_number():
    x = np.array([[1, NAN, 3], [3, 0, INF]], "float32")
    np.testing.assert_array_equal(run(lambda a: op.not_equal(a, relax.const(3.0, "float32")), x), x != 3)
    row = np.array([1, NAN, 3], "float32")
    np.testing.assert_array_equal(run(lambda a: op.not_equal(relax.const(row), a), x), row != x)
