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


@few(12)
@given(
    rows=st.integers(8, 20),
    columns=st.integers(1, 20),
    channels=st.integers(4, 12).map(lambda n: 2 * n),
    by=st.integers(1, 7),
    moved=st.sampled_from(["rolled", "half rolled", "padded", "cropped", "joined"]),
)
def test_parts_that_were_moved_are_transposed(rows, columns, channels, by, moved):
    """What is loaded in several places, or only where a condition holds, is no square of one buffer."""
    shape = (1, rows, columns, channels)

    def rolled(builder, value, axis):
        size = int(value.ty.shape.values[axis])
        parts = [builder.emit(op.strided_slice(value, [axis], [a], [b])) for a, b in ((by, size), (0, by))]
        return builder.emit(op.concat(parts, axis))

    def body(builder, params):
        value = params[0]
        if moved == "rolled":
            value = rolled(builder, value, 1)
        elif moved == "half rolled":
            half = channels // 2
            cuts = ((0, half), (half, channels))
            low, high = (builder.emit(op.strided_slice(value, [3], [a], [b])) for a, b in cuts)
            value = builder.emit(op.concat([low, rolled(builder, high, 1)], 3))
        elif moved == "padded":
            value = builder.emit(op.nn.pad(value, [0, 0, by, 0, 0, by, 0, 0]))
        elif moved == "cropped":
            value = builder.emit(op.strided_slice(value, [1, 3], [by, 1], [rows, channels]))
        else:
            value = builder.emit(op.concat([value, value], 1))
        return builder.emit(op.permute_dims(value, [0, 3, 1, 2]))

    x = np.arange(np.prod(shape), dtype="float32").reshape(shape)
    half = channels // 2
    want = {
        "rolled": lambda: np.roll(x, -by, 1),
        "half rolled": lambda: np.concatenate([x[..., :half], np.roll(x[..., half:], -by, 1)], 3),
        "padded": lambda: np.pad(x, ((0, 0), (by, 0), (0, by), (0, 0))),
        "cropped": lambda: x[:, by:, :, 1:],
        "joined": lambda: np.concatenate([x, x], 1),
    }[moved]()
    got = schedule_and_run(single_function({"x": (shape, "float32")}, body), HOST, {"x": x})
    np.testing.assert_array_equal(got.outputs[0], want.transpose(0, 3, 1, 2))


@pytest.mark.parametrize(("shape", "squares"), [((1, 64, 100), True), ((1, 64, 3), False), ((1, 4, 100), False)])
def test_whole_squares_go_through_registers(shape, squares):
    (kernel,) = fused_kernels(network(shape, (0, 2, 1), "float32")).values()
    sch = s_tir.Schedule(kernel)
    schedules.apply(sch, resolve("x86-64-v3"))
    assert ("T.Shuffle" in schedules.apply_rewrites(sch.mod["main"]).script()) == squares
