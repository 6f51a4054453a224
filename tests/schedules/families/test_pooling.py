from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from tests.helpers import evaluate_module, few
from tests.schedules import kernels


def make(shape, dtype, build, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(shape) if dtype == "float32" else rng.integers(0, 128, shape)
    mod = kernels.single_function({"x": (shape, dtype)}, lambda builder, variables: build(builder, variables[0]))
    return mod, {"x": x.astype(dtype)}


def check(mod, inputs, tunable=False, seed=1):
    target = resolve("host")
    got = kernels.schedule_and_run(mod, target, inputs, tunable=tunable, seed=seed)
    assert "pooling" in got.rules.values() and set(got.rules.values()) <= {"pooling", "elementwise"}
    for ours, reference in zip(got.outputs, evaluate_module(mod, inputs), strict=True):
        if reference.dtype.kind == "f":
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-6)
        else:
            np.testing.assert_array_equal(ours, reference)


@few(8)
@given(
    operator=st.sampled_from(["max_pool2d", "avg_pool2d"]),
    dtype=st.sampled_from(["float32", "int8", "uint8"]),
    height=st.sampled_from([3, 5, 8]),
    width=st.sampled_from([3, 7, 12]),
    channels=st.sampled_from([1, 3, 7, 24, 37, 48, 67, 96]),
    window=st.sampled_from([2, 3]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 1),
    include_pad=st.booleans(),
)
def test_any_pooling(operator, dtype, height, width, channels, window, stride, padding, include_pad):
    def build(builder, x):
        more = {"count_include_pad": include_pad} if operator == "avg_pool2d" else {}
        function = getattr(relax.op.nn, operator)
        return builder.emit(function(x, (window, window), (stride, stride), (padding,) * 4, layout="NHWC", **more))

    check(*make((1, height, width, channels), dtype if operator == "max_pool2d" else "float32", build))


def global_average(builder, x):
    return builder.emit(relax.op.mean(x, [1, 2], True))


def integer_global_average(builder, x):
    """Sum in int32, then requantize as the integer graph does."""
    total = builder.emit(relax.op.sum(builder.emit(relax.op.astype(x, "int32")), [1, 2], True))
    scaled = builder.emit(relax.op.multiply(builder.emit(relax.op.astype(total, "float32")), relax.const(0.013)))
    rounded = builder.emit(relax.op.clip(builder.emit(relax.op.round(scaled)), 0, 127))
    return builder.emit(relax.op.astype(rounded, "uint8"))


@pytest.mark.parametrize("channels", [3, 24, 61, 64, 1000])
def test_global_average(channels):
    check(*make((1, 7, 7, channels), "float32", global_average))


@pytest.mark.parametrize("channels", [7, 61, 96])
def test_global_average_of_integers(channels):
    check(*make((2, 5, 7, channels), "uint8", integer_global_average))


def test_sum_over_the_first_axis():
    check(*make((6, 70), "float32", lambda builder, x: builder.emit(relax.op.sum(x, 0))))


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_every_sampled_width_is_correct(seed):
    check(*make((1, 9, 9, 96), "float32", global_average), tunable=True, seed=seed)


def test_a_sum_of_many_rows_of_an_odd_width_runs_in_parallel():
    check(*make((1000, 9, 61), "float32", lambda builder, x: builder.emit(relax.op.sum(x, [1]))))
