"""Convolutions and dense layers on the register tile: values, rules, instructions."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from tvm import relax, s_tir

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.schedules import contraction
from nnfuze_tvm.schedules.loops import STACK_BYTES
from nnfuze_tvm.schedules.register_tile import Work, tiles
from tests.helpers import few
from tests.schedules.kernels import assembly_of, fused_kernels, schedule_and_run, single_function

HOST = resolve("host")


def conv_module(rng, size, channels, out, kernel, stride, padding, groups=1, dtype="float32", dilation=1):
    """Return an NHWC convolution with bias, epilogue and constant weights, and an input for it."""
    integer = "int" in dtype
    weight_shape = (out, kernel, kernel, channels // groups)
    if integer:
        low = 0 if dtype == "uint8" else -128
        data = rng.integers(low, 128, (1, *size, channels)).astype(dtype)
        weights = rng.integers(-127, 128, weight_shape).astype("int8")
        bias = rng.integers(-1000, 1000, (1, 1, 1, out)).astype("int32")
    else:
        data = rng.standard_normal((1, *size, channels)).astype(dtype)
        weights = rng.standard_normal(weight_shape).astype(dtype)
        bias = rng.standard_normal((1, 1, 1, out)).astype(dtype)

    def body(builder, params):
        conv = relax.op.nn.conv2d(
            params[0],
            relax.const(weights),
            strides=stride,
            padding=padding,
            dilation=dilation,
            groups=groups,
            data_layout="NHWC",
            kernel_layout="OHWI",
            out_dtype="int32" if integer else None,
        )
        value = builder.emit(relax.op.add(builder.emit(conv), relax.const(bias)))
        if not integer:
            return builder.emit(relax.op.nn.relu(value))
        value = builder.emit(relax.op.multiply(relax.op.astype(value, "float32"), relax.const(np.float32(2e-3))))
        value = builder.emit(relax.op.clip(relax.op.round(value), 0.0, 127.0))
        return builder.emit(relax.op.astype(value, "uint8"))

    return single_function({"x": (data.shape, dtype)}, body), {"x": data}, weights, bias


def reference_conv(data, weights, bias, stride, padding, groups, dilation=1):
    """Return the int64 or float64 convolution of NHWC data with OHWI weights."""
    wide = np.int64 if data.dtype != np.float32 else np.float64
    padded = np.pad(data.astype(wide), ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    out, kernel, _, depth = weights.shape
    rows, cols = ((n - dilation * (kernel - 1) - 1) // stride + 1 for n in padded.shape[1:3])
    result = np.zeros((1, rows, cols, out), wide)
    per_group = out // groups
    for g in range(groups):
        w = weights[g * per_group : (g + 1) * per_group].astype(wide)
        x = padded[..., g * depth : (g + 1) * depth]
        for ky in range(kernel):
            for kx in range(kernel):
                top, left = ky * dilation, kx * dilation
                window = x[:, top : top + stride * rows : stride, left : left + stride * cols : stride]
                result[..., g * per_group : (g + 1) * per_group] += window @ w[:, ky, kx].T
    return result + bias


@few(10)
@given(
    seed=st.integers(0, 10_000),
    size=st.tuples(st.integers(3, 14), st.integers(3, 17)),
    channels=st.sampled_from([1, 3, 4, 8, 20]),
    out=st.sampled_from([5, 8, 24, 32, 40]),
    kernel=st.sampled_from([1, 3]),
    stride=st.sampled_from([1, 2]),
    padding=st.sampled_from([0, 1]),
    dilation=st.sampled_from([1, 2]),
    dtype=st.sampled_from(["float32", "uint8", "int8"]),
)
def test_conv2d_equals_numpy(seed, size, channels, out, kernel, stride, padding, dilation, dtype):
    assume(all(n + 2 * padding > dilation * (kernel - 1) for n in size))
    mod, inputs, weights, bias = conv_module(
        np.random.default_rng(seed), size, channels, out, kernel, stride, padding, 1, dtype, dilation
    )
    got = schedule_and_run(mod, HOST, inputs)
    want = reference_conv(inputs["x"], weights, bias, stride, padding, 1, dilation)
    assert "conv2d" in got.rules.values()
    if dtype == "float32":
        np.testing.assert_allclose(got.outputs[0], np.maximum(want, 0), atol=1e-5 * np.ptp(want), rtol=0)
    else:
        scaled = want.astype(np.float32) * np.float32(2e-3)
        np.testing.assert_array_equal(got.outputs[0], np.clip(np.rint(scaled), 0, 127).astype("uint8"))


@pytest.mark.parametrize("residual_first", [False, True])
def test_bias_and_residual_are_both_added(residual_first):
    rng = np.random.default_rng(0)
    data, residual = (rng.standard_normal((1, 5, 6, 16)).astype("float32") for _ in range(2))
    weights, bias = (rng.standard_normal(shape).astype("float32") for shape in ((16, 1, 1, 16), (1, 1, 1, 16)))

    def body(builder, params):
        value = builder.emit(
            relax.op.nn.conv2d(params[0], relax.const(weights), data_layout="NHWC", kernel_layout="OHWI")
        )
        addends = [params[1], relax.const(bias)] if residual_first else [relax.const(bias), params[1]]
        for addend in addends:
            value = builder.emit(relax.op.add(value, addend))
        return value

    inputs = {"x": data, "residual": residual}
    mod = single_function({name: (array.shape, "float32") for name, array in inputs.items()}, body)
    got = schedule_and_run(mod, HOST, inputs)
    want = reference_conv(data, weights, bias, 1, 0, 1) + residual
    assert list(got.rules.values()) == ["conv2d"]
    np.testing.assert_allclose(got.outputs[0], want, atol=1e-5 * np.ptp(want), rtol=0)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8"])
@pytest.mark.parametrize(("channels", "out", "groups"), [(32, 64, 2), (24, 48, 3)])
def test_grouped_conv2d_equals_numpy(dtype, channels, out, groups):
    mod, inputs, weights, bias = conv_module(np.random.default_rng(0), (6, 7), channels, out, 3, 1, 1, groups, dtype)
    got = schedule_and_run(mod, HOST, inputs)
    want = reference_conv(inputs["x"], weights, bias, 1, 1, groups)
    assert "conv2d" in got.rules.values()
    if dtype == "float32":
        np.testing.assert_allclose(got.outputs[0], np.maximum(want, 0), atol=1e-5 * np.ptp(want), rtol=0)
    else:
        scaled = want.astype(np.float32) * np.float32(2e-3)
        np.testing.assert_array_equal(got.outputs[0], np.clip(np.rint(scaled), 0, 127).astype("uint8"))


@pytest.mark.parametrize("dtype", ["float32", "int8"])
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 12), (1, 30, 17), (7, 16, 40), (1, 128, 1000)])
def test_dense_equals_numpy(dtype, m, k, n):
    rng = np.random.default_rng(1)
    integer = dtype != "float32"
    draw = (
        (lambda *s: rng.integers(-127, 128, s).astype(dtype))
        if integer
        else (lambda *s: rng.standard_normal(s).astype(dtype))
    )
    data, weights = draw(m, k), draw(k, n)
    mod = single_function(
        {"x": (data.shape, dtype)},
        lambda builder, params: builder.emit(
            relax.op.matmul(params[0], relax.const(weights), out_dtype="int32" if integer else None)
        ),
    )
    got = schedule_and_run(mod, HOST, {"x": data})
    # Data may become unsigned before.
    assert "dense" in got.rules.values() and set(got.rules.values()) <= {"dense", "elementwise"}
    if integer:
        np.testing.assert_array_equal(got.outputs[0], data.astype("int32") @ weights.astype("int32"))
    else:
        want = data.astype("float64") @ weights
        np.testing.assert_allclose(got.outputs[0], want, atol=1e-5 * np.ptp(want), rtol=0)


@pytest.mark.parametrize(
    "shapes",
    [
        ((2, 5, 16), (2, 16, 24)),
        ((5, 16), (16, 24)),
        ((3, 5, 16), (16, 24)),
        ((1, 4, 7, 12), (1, 4, 12, 7)),
        ((2, 3, 6, 16), (16, 24)),
    ],
)
def test_product_of_two_activations_needs_no_constant(shapes):
    rng = np.random.default_rng(2)
    left, right = (rng.standard_normal(shape).astype("float32") for shape in shapes)
    mod = single_function(
        {"a": (left.shape, "float32"), "b": (right.shape, "float32")},
        lambda builder, params: builder.emit(relax.op.matmul(*params)),
    )
    got = schedule_and_run(mod, HOST, {"a": left, "b": right})
    assert list(got.rules.values()) == ["dense"]
    np.testing.assert_allclose(got.outputs[0], left @ right, atol=1e-4)


@few(8)
@given(
    heads=st.integers(1, 5),
    rows=st.sampled_from([1, 3, 13, 64]),
    depth=st.sampled_from([1, 5, 24, 32]),
    columns=st.sampled_from([1, 7, 24, 50]),
    scale=st.sampled_from([None, 0.25]),
    seed=st.one_of(st.none(), st.integers(1, 9)),
)
def test_products_of_attention_heads(heads, rows, depth, columns, scale, seed):
    rng = np.random.default_rng(0)
    left = rng.standard_normal((1, heads, rows, depth)).astype("float32")
    right = rng.standard_normal((1, heads, depth, columns)).astype("float32")

    def body(builder, params):
        product = builder.emit(relax.op.matmul(*params))
        return product if scale is None else builder.emit(relax.op.multiply(product, relax.const(np.float32(scale))))

    mod = single_function({"a": (left.shape, "float32"), "b": (right.shape, "float32")}, body)
    got = schedule_and_run(mod, HOST, {"a": left, "b": right}, tunable=seed is not None, seed=seed or 1)
    assert list(got.rules.values()) == ["dense"]
    np.testing.assert_allclose(got.outputs[0], left @ right * (scale or 1.0), atol=1e-4)


@pytest.mark.parametrize("seed", [1, 2, 3, 4])
@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_every_sampled_schedule_gives_the_same_result(dtype, seed):
    mod, inputs, *_ = conv_module(np.random.default_rng(3), (8, 12), 16, 48, 3, 1, 1, dtype=dtype)
    plain = schedule_and_run(mod, HOST, inputs)
    sampled = schedule_and_run(mod, HOST, inputs, tunable=True, seed=seed)
    np.testing.assert_allclose(sampled.outputs[0], plain.outputs[0], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 16, 64, 400])
def test_sums_of_streaming_weights_stay_on_the_stack(rows):
    hw = Hardware.of(resolve("x86-64-v4"))
    work = Work(1, rows, 1536, 1536, hw.lanes("float32"), 1, 4, 1, 4.0, 2, False)
    found = tiles(work, hw)
    assert found and all(tile.pixels * tile.channels * 4 <= STACK_BYTES for tile in found)
    assert (
        any(tile.pixels * tile.channels * 4 > STACK_BYTES for tile in tiles(replace(work, steps=64), hw)) or rows == 1
    )


@pytest.mark.parametrize(("rows", "cols"), [(25, 20), (7, 7), (1, 13), (3, 1)])
@pytest.mark.parametrize("channels", [1024, 32, 24, 12])
def test_tiles_cover_the_output_and_fit_the_registers(rows, cols, channels):
    hw = Hardware.of(resolve("x86-64-v3"))
    found = tiles(Work(rows, cols, channels, 288, hw.lanes("float32"), 1, 4, 1, 4.0, 2, False), hw)
    assert found
    for tile in found:
        assert tile.pixels <= (rows * cols if tile.flat else cols)
        assert not tile.flat or rows > 1
        assert channels % tile.channels == tile.channels % tile.lanes == 0
        assert tile.pixels * (tile.channels // tile.lanes) < hw.registers


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("flat", [False, True])
def test_tiles_that_do_not_divide_the_image_overlap(monkeypatch, dtype, flat):
    pixels = 5
    real = contraction.tiles
    monkeypatch.setattr(
        contraction, "tiles", lambda *args: [t for t in real(*args) if t.flat == flat and t.pixels == pixels]
    )
    mod, inputs, weights, bias = conv_module(np.random.default_rng(5), (7, 7), 8, 16, 3, 1, 1, dtype=dtype)
    got = schedule_and_run(mod, HOST, inputs)
    want = reference_conv(inputs["x"], weights, bias, 1, 1, 1)
    assert list(got.rules.values()) == ["conv2d"]
    if dtype == "float32":
        np.testing.assert_allclose(got.outputs[0], np.maximum(want, 0), atol=1e-5 * np.ptp(want), rtol=0)
    else:
        scaled = want.astype(np.float32) * np.float32(2e-3)
        np.testing.assert_array_equal(got.outputs[0], np.clip(np.rint(scaled), 0, 127).astype("uint8"))


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
@pytest.mark.parametrize(("target", "instruction"), [("x86-64-v3", "prefetcht1"), ("aarch64", "prfm")])
def test_weights_that_outgrow_the_cache_are_prefetched(target, instruction, dtype):
    def count(channels):
        mod, *_ = conv_module(np.random.default_rng(6), (4, 4), channels, channels, 3, 1, 1, dtype=dtype)
        (kernel,) = fused_kernels(mod).values()
        sch = s_tir.Schedule(kernel)
        schedules.apply(sch, resolve(target))
        return assembly_of(sch, resolve(target)).count(instruction)

    assert count(256) > 0
    assert count(16) == 0


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_prefetches_change_no_result(dtype):
    mod, inputs, weights, bias = conv_module(np.random.default_rng(7), (5, 3), 256, 256, 3, 1, 1, dtype=dtype)
    got = schedule_and_run(mod, HOST, inputs)
    want = reference_conv(inputs["x"], weights, bias, 1, 1, 1)
    if dtype == "float32":
        np.testing.assert_allclose(got.outputs[0], np.maximum(want, 0), atol=1e-5 * np.ptp(want), rtol=0)
    else:
        scaled = want.astype(np.float32) * np.float32(2e-3)
        np.testing.assert_array_equal(got.outputs[0], np.clip(np.rint(scaled), 0, 127).astype("uint8"))


VNNI = '{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "znver4"}'


@pytest.mark.parametrize(
    ("target", "dtype", "instruction"),
    [
        ("x86-64-v3", "float32", "vfmadd231ps"),
        ("x86-64-v3", "uint8", "vpmaddubsw"),
        ("x86-64-v3", "int8", "vpmaddwd"),
        ("x86-64-v4", "int8", "vpmaddwd"),
        ("x86-64-v4", "uint8", "vpmaddubsw"),
        (VNNI, "uint8", "vpdpbusd"),
        ("aarch64", "float32", r"fmla\s+v\d+\.4s, v\d+\.4s, v\d+\.s\[[0-3]\]"),
        ("aarch64+dotprod", "float16", r"fmla\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[[0-7]\]"),
        ("aarch64+i8mm", "float16", r"fmla\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[[0-7]\]"),
        ("aarch64", "uint8", "sadalp"),
        ("aarch64+i8mm", "uint8", "smmla"),
        ("aarch64+i8mm", "int8", "smmla"),
        ("aarch64", "int8", "smlal2"),
        ("aarch64+dotprod", "uint8", r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[[0-3]\]"),
        ("aarch64+dotprod", "int8", r"sdot\s+v\d+\.4s, v\d+\.16b, v\d+\.4b\[[0-3]\]"),
    ],
)
def test_hot_loop_uses_the_instruction_of_its_isa(target, dtype, instruction):
    mod, *_ = conv_module(np.random.default_rng(4), (8, 8), 32, 32, 3, 1, 1, dtype=dtype)
    (kernel,) = fused_kernels(mod).values()
    sch = s_tir.Schedule(kernel)
    cpu = resolve(target)
    assert schedules.apply(sch, cpu) == "conv2d"
    assembly = assembly_of(sch, cpu)
    assert len(re.findall(rf"^\s+{instruction}(\s|$)", assembly, re.MULTILINE)) >= 8
