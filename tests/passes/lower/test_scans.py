"""Accumulated sums and products: NumPy's values, whatever the axis."""

from __future__ import annotations

import numpy as np
import pytest
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from tests.schedules import kernels


@pytest.mark.parametrize("exclusive", [False, True])
@pytest.mark.parametrize(
    ("shape", "axis", "dtype", "result"),
    [
        ((5, 33), 1, "float32", "float32"),
        ((9, 3, 16), 0, "float32", "float32"),
        ((2, 5, 7), -2, "int8", "int64"),
        ((2, 3, 4), None, "int32", "int32"),
        ((4, 1, 6), 1, "float64", "float64"),
    ],
)
@pytest.mark.parametrize("name", ["cumsum", "cumprod"])
def test_any_axis(name, shape, axis, dtype, result, exclusive):
    x = np.random.default_rng(1).integers(-3, 4, shape).astype(dtype)
    mod = kernels.single_function(
        {"x": (shape, dtype)}, lambda builder, v: builder.emit(getattr(op, name)(v[0], axis, result, exclusive))
    )
    got = kernels.schedule_and_run(mod, resolve("host"), {"x": x})
    want = getattr(np, name)(x, axis, result)
    if exclusive:
        along = axis or 0
        first = np.full_like(want.take([0], along), name == "cumprod")
        want = np.concatenate([first, want.take(range(want.shape[along] - 1), along)], along)
    assert got.rules == dict.fromkeys(got.rules, "scan")
    assert got.outputs[0].dtype == want.dtype
    np.testing.assert_array_equal(got.outputs[0], want)
