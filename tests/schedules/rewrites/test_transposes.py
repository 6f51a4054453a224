"""Transposes in registers: any shape, any epilogue, the same values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, s_tir
from tvm.relax import op

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.targets import resolve
from tests.helpers import few
from tests.schedules.kernels import fused_kernels, schedule_and_run, single_function

HOST = resolve("host")


def network(shape, axes, dtype, epilogue=False):
    def body(builder, params):
        value = builder.emit(op.permute_dims(params[0], list(axes)))
        if not epilogue:
            return value
        factor = np.linspace(1, 2, shape[axes[-1]], dtype="float32")
        scaled = builder.emit(op.multiply(builder.emit(op.astype(value, "float32")), relax.const(factor)))
        return builder.emit(op.nn.relu(scaled))

    return single_function({"x": (shape, dtype)}, body)


@few(8)
@given(
    images=st.integers(1, 2),
    rows=st.integers(1, 45),
    columns=st.integers(1, 45),
    dtype=st.sampled_from(["float32", "int8", "float16", "int32"]),
    epilogue=st.booleans(),
    seed=st.one_of(st.none(), st.integers(1, 9)),
)
def test_any_transpose_equals_numpy(images, rows, columns, dtype, epilogue, seed):
    mod = network((images, rows, columns), (0, 2, 1), dtype, epilogue)
    x = np.random.default_rng(0).integers(-100, 100, (images, rows, columns)).astype(dtype)
    got = schedule_and_run(mod, HOST, {"x": x}, tunable=seed is not None, seed=seed or 1)
    want = x.transpose(0, 2, 1)
    if epilogue:
        want = np.maximum(want.astype("float32") * np.linspace(1, 2, rows, dtype="float32"), 0)
    assert set(got.rules.values()) == {"elementwise"}
    np.testing.assert_array_equal(got.outputs[0], want)


@pytest.mark.parametrize(("shape", "squares"), [((1, 64, 100), True), ((1, 64, 3), False), ((1, 4, 100), False)])
def test_whole_squares_go_through_registers(shape, squares):
    (kernel,) = fused_kernels(network(shape, (0, 2, 1), "float32")).values()
    sch = s_tir.Schedule(kernel)
    schedules.apply(sch, resolve("x86-64-v3"))
    assert ("T.Shuffle" in schedules.apply_rewrites(sch.mod["main"]).script()) == squares
