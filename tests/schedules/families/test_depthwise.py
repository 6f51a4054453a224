from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.schedules.families import depthwise
from tests.helpers import evaluate_module, few
from tests.schedules import kernels


def depthwise_module(
    height: int,
    width: int,
    channels: int,
    *,
    kernel: tuple[int, int] = (3, 3),
    stride: int = 1,
    padding: int = 1,
    dilation: int = 1,
    multiplier: int = 1,
    integer: bool = False,
    residual: bool = False,
    seed: int = 0,
):
    """A depthwise convolution and the epilogue that it has in a network."""
    rng = np.random.default_rng(seed)
    out = channels * multiplier
    weight = rng.integers(-127, 128, (out, *kernel, 1)).astype("int8")
    scale = (rng.random((1, 1, 1, out)) * 2e-3 + 1e-4).astype("float32")

    def body(builder, variables):
        data = variables[0]
        call = relax.op.nn.conv2d(
            data,
            relax.const(weight if integer else weight.astype("float32") / 64),
            strides=stride,
            padding=padding,
            dilation=dilation,
            groups=channels,
            data_layout="NHWC",
            kernel_layout="OHWI",
            out_dtype="int32" if integer else "float32",
        )
        y = builder.emit(call)
        if not integer:
            y = builder.emit(relax.op.add(y, relax.const(rng.standard_normal((1, 1, 1, out)).astype("float32"))))
            if residual:
                y = builder.emit(relax.op.add(y, data))
            return builder.emit(relax.op.clip(y, 0, 6))
        bias = rng.integers(-1000, 1000, (1, 1, 1, out)).astype("int32")
        y = builder.emit(relax.op.add(y, relax.const(bias)))
        y = builder.emit(relax.op.astype(y, "float32"))
        y = builder.emit(relax.op.multiply(y, relax.const(scale)))
        y = builder.emit(relax.op.clip(builder.emit(relax.op.round(y)), 0, 127))
        return builder.emit(relax.op.astype(y, "uint8"))

    shape = (1, height, width, channels)
    mod = kernels.single_function({"x": (shape, "uint8" if integer else "float32")}, body)
    x = rng.integers(0, 128, shape) if integer else rng.standard_normal(shape)
    return mod, {"x": x.astype("uint8" if integer else "float32")}


def check(mod, inputs, rule="depthwise", tunable=False, seed=1):
    target = resolve("host")
    got = kernels.schedule_and_run(mod, target, inputs, tunable=tunable, seed=seed)
    assert set(got.rules.values()) == {rule}
    expected = evaluate_module(mod, inputs)
    for ours, reference in zip(got.outputs, expected, strict=True):
        if reference.dtype.kind == "f":
            np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)
        else:
            np.testing.assert_array_equal(ours, reference)


@few(8)
@given(
    height=st.sampled_from([3, 5, 8, 13]),
    width=st.sampled_from([3, 7, 12, 17, 37]),
    channels=st.sampled_from([2, 3, 7, 10, 24, 29, 88, 96]),
    kernel=st.sampled_from([(3, 3), (1, 3), (5, 5)]),
    stride=st.integers(1, 2),
    padding=st.integers(0, 2),
    dilation=st.integers(1, 2),
    integer=st.booleans(),
)
def test_any_shape(height, width, channels, kernel, stride, padding, dilation, integer):
    if any((k - 1) * dilation >= n + 2 * padding for k, n in zip(kernel, (height, width), strict=True)):
        return
    mod, inputs = depthwise_module(
        height,
        width,
        channels,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        integer=integer,
    )
    check(mod, inputs)


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("multiplier", [2, 3])
def test_channel_multiplier(multiplier, integer):
    check(*depthwise_module(7, 9, 12, multiplier=multiplier, integer=integer))


def test_residual_is_added_in_the_kernel():
    check(*depthwise_module(9, 9, 24, residual=True))


def test_large_kernel_runs_in_parallel():
    check(*depthwise_module(56, 56, 32))


@pytest.mark.parametrize("integer", [False, True])
@pytest.mark.parametrize("seed", [1, 2])
def test_every_sampled_tile_is_correct(seed, integer):
    check(*depthwise_module(11, 14, 48, stride=1, integer=integer), tunable=True, seed=seed)


@pytest.mark.parametrize("name", ["aarch64", "x86-64-v3", "x86-64-v4"])
@pytest.mark.parametrize("dtype", ["float32", "int32"])
def test_accumulators_fit_the_registers(name, dtype):
    hw = Hardware.of(resolve(name))
    for width, channels in [(112, 32), (28, 128), (14, 512), (7, 1024), (13, 24)]:
        for tile in depthwise.tiles(width, channels, hw.lanes(dtype), hw):
            assert channels >= tile.vectors * tile.lanes
            assert tile.cols * tile.vectors < hw.registers


@pytest.mark.parametrize(("integer", "instruction"), [(True, "smlal2"), (False, "fmla")])
def test_an_arm_kernel_multiplies_and_adds_at_once(integer, instruction):
    mod, _ = depthwise_module(9, 9, 32, integer=integer)
    assert kernels.assembly(mod, resolve("aarch64")).count(f"\t{instruction}\t") >= 8


def rows_module(width: int, channels: int, taps: int, padding: tuple[int, int], dilation: int, dtype: str, seed: int):
    """A depthwise convolution of rows, channels first, and the epilogue that it has in a network."""
    rng = np.random.default_rng(seed)
    weight = rng.integers(-127, 128, (channels, 1, taps)).astype("int8")
    integer = dtype in ("int8", "uint8")

    def body(builder, variables):
        kernel = weight if integer else (weight / 64).astype(dtype)
        call = relax.op.nn.conv1d(
            variables[0],
            relax.const(kernel),
            padding=padding,
            dilation=dilation,
            groups=channels,
            out_dtype="int32" if integer else dtype,
        )
        y = builder.emit(call)
        bias = rng.integers(-100, 100, (1, channels, 1)).astype("int32" if integer else dtype)
        return builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(y, relax.const(bias)))))

    shape = (1, channels, width)
    x = rng.integers(0, 128, shape) if integer else rng.standard_normal(shape)
    return kernels.single_function({"x": (shape, dtype)}, body), {"x": x.astype(dtype)}


@few(8)
@given(
    width=st.integers(16, 90),
    channels=st.integers(2, 20),
    taps=st.integers(1, 12),
    padding=st.tuples(st.integers(0, 9), st.integers(0, 9)),
    dilation=st.integers(1, 3),
    dtype=st.sampled_from(["float32", "int8", "uint8"]),
    seed=st.integers(0, 99),
    tunable=st.booleans(),
)
def test_rows_channels_first_give_what_the_unscheduled_kernel_gives(
    width, channels, taps, padding, dilation, dtype, seed, tunable
):
    assume(width + sum(padding) - dilation * (taps - 1) >= 16)
    mod, inputs = rows_module(width, channels, taps, padding, dilation, dtype, seed)
    check(mod, inputs, tunable=tunable, seed=seed + 1)


def test_a_row_channels_first_is_one_kernel_without_transposes():
    """Also in float16, whose sums TVM would make in another order: they are compared with float32."""
    mod, inputs = rows_module(50, 8, 5, (2, 2), 1, "float16", 0)
    got = kernels.schedule_and_run(mod, resolve("host"), inputs)
    assert list(got.rules.values()) == ["depthwise"]
    wide, _ = rows_module(50, 8, 5, (2, 2), 1, "float32", 0)
    (want,) = evaluate_module(wide, {"x": inputs["x"].astype("float32")})
    np.testing.assert_allclose(got.outputs[0], want, rtol=1e-2, atol=1e-2 * np.ptp(want))
