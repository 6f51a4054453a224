"""Winograd convolutions, fused: values, rules, instructions."""

from __future__ import annotations

import json
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest
import tvm
import tvm_ffi
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, s_tir, tirx

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes.lower.winograd import winograd_kernel
from nnfuze_tvm.passes.lower.winograd.winograd import Winograd
from nnfuze_tvm.passes.lower.winograd.winograd_kernel import Shape
from nnfuze_tvm.passes.lower.winograd.winograd_weights import transform_weights
from tests.helpers import few
from tests.schedules.kernels import fused_kernels, schedule_and_run, single_function

HOST = resolve("host")


def residual_module(rng, shape: Shape):
    """Return a Winograd convolution with bias, residual and ReLU, its inputs and what it should give."""
    data = rng.standard_normal((shape.n, shape.height, shape.width, shape.channels)).astype(shape.dtype)
    weights = rng.standard_normal((shape.outputs, 3, 3, shape.channels)).astype(shape.dtype)
    bias = rng.standard_normal((1, 1, 1, shape.outputs)).astype(shape.dtype)
    out_shape = (shape.n, shape.out_height, shape.out_width, shape.outputs)
    residual = rng.standard_normal(out_shape).astype(shape.dtype)

    def body(builder, params):
        kernel = builder.add_func(winograd_kernel.prim_func(shape), "winograd_conv2d")
        at_points = relax.const(transform_weights(weights, shape.m, shape.computed))
        conv = builder.emit(relax.call_tir(kernel, [params[0], at_points], relax.TensorType(out_shape, shape.dtype)))
        value = builder.emit(relax.op.add(conv, relax.const(bias)))
        return builder.emit(relax.op.nn.relu(builder.emit(relax.op.add(value, params[1]))))

    mod = single_function({"x": (data.shape, shape.dtype), "r": (out_shape, shape.dtype)}, body)
    top, left, bottom, right = shape.pad
    padded = np.pad(data.astype("float64"), ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    sums = np.einsum("nyxcab,oabc->nyxo", windows, weights.astype("float64"), optimize=True)
    want = np.maximum(sums + bias + residual, 0)
    return mod, {"x": data, "r": residual}, want


@few(8)
@given(
    seed=st.integers(1, 10_000),
    m=st.sampled_from([2, 4]),
    n=st.integers(1, 2),
    size=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
    channels=st.sampled_from([4, 8, 12, 20, 64]),
    outputs=st.sampled_from([4, 8, 24, 28, 64]),
    lanes=st.sampled_from([1, 8]),
    tunable=st.booleans(),
)
def test_values(seed, m, n, size, pad, channels, outputs, lanes, tunable):
    shape = Shape(n, *size, channels, outputs, pad, m, lanes=lanes)
    mod, inputs, want = residual_module(np.random.default_rng(seed), shape)
    result = schedule_and_run(mod, HOST, inputs, tunable, seed)
    assert list(result.rules.values()) == ["winograd"]
    assert np.abs(result.outputs[0] - want).max() <= 2e-5 * np.abs(want).max()


@few(5)
@given(
    seed=st.integers(1, 10_000),
    size=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
    channels=st.sampled_from([8, 12, 64, 384]),
    outputs=st.sampled_from([8, 28, 64]),
    tunable=st.booleans(),
)
def test_values_in_float16(seed, size, pad, channels, outputs, tunable):
    shape = Shape(1, *size, channels, outputs, pad, 2, "float16")
    mod, inputs, want = residual_module(np.random.default_rng(seed), shape)
    result = schedule_and_run(mod, HOST, inputs, tunable, seed)
    assert list(result.rules.values()) == ["winograd"]
    assert result.outputs[0].dtype == np.float16
    assert np.abs(result.outputs[0] - want).max() <= 1e-2 * np.abs(want).max()


@pytest.mark.parametrize("dtype", ["float32", "uint8"])
def test_cores_share_the_channels_of_few_tiles(dtype):
    make = residual_module if dtype == "float32" else integer_module
    mod, inputs, want = make(np.random.default_rng(0), Shape(1, 4, 4, 128, 192, (1, 1, 1, 1), 2, dtype))
    result = schedule_and_run(mod, HOST, inputs)
    assert np.abs(result.outputs[0].astype("float64") - want).max() <= 2e-5 * np.abs(want).max()
    (kernel,) = fused_kernels(mod).values()
    for cores in (2, 4):
        sch = s_tir.Schedule(kernel)
        target = tvm.target.Target({**json.loads(str(resolve("x86-64-v3"))), "num-cores": cores})
        assert schedules.apply(sch, target) == "winograd"
        loops: list[tirx.For] = []
        tvm_ffi.structural_walk(sch.mod["main"].body, (tirx.For, loops.append))
        assert [int(loop.extent) for loop in loops if loop.kind == tirx.ForKind.PARALLEL] == [cores]


@pytest.mark.parametrize(
    ("target", "multiply_add", "m", "dtype"),
    [
        ("x86-64-v3", r"vfmadd\w+\s+.*%ymm", 2, "float32"),
        ("x86-64-v3", r"vfmadd\w+\s+.*%ymm", 4, "float32"),
        ("x86-64-v4", r"vfmadd\w+\s+.*%zmm", 2, "float32"),
        ("x86-64-v4", r"vfmadd\w+\s+.*%zmm", 4, "float32"),
        ("aarch64", r"fmla\s+v\d+\.4s", 2, "float32"),
        ("aarch64", r"fmla\s+v\d+\.4s", 4, "float32"),
        ("aarch64+dotprod", r"fmla\s+v\d+\.8h, v\d+\.8h, v\d+\.h\[[0-7]\]", 2, "float16"),
    ],
)
def test_accumulators_stay_in_vector_registers(target, multiply_add, m, dtype):
    shape = Shape(1, 28, 28, 64, 64, (1, 1, 1, 1), m, dtype)
    mod, _, _ = residual_module(np.random.default_rng(0), shape)
    (kernel,) = fused_kernels(mod).values()
    sch = s_tir.Schedule(kernel)
    assert schedules.apply(sch, resolve(target)) == "winograd"
    built = tvm.compile(sch.mod, target=resolve(target)).mod
    assert len(re.findall(multiply_add, built.inspect_source("asm"))) >= 16
    # Packed weights, transformed data and products of a block of tiles: nothing is allocated inside the loops.
    assert built.inspect_source("ll").count("load ptr, ptr @__TVMBackendAllocWorkspace") == 3


def integer_module(rng, shape: Shape):
    """Return an integer Winograd convolution with bias and requantization, its input, the direct convolution's."""
    low = 0 if shape.dtype == "uint8" else -128
    data = rng.integers(low, 128, (shape.n, shape.height, shape.width, shape.channels)).astype(shape.dtype)
    weights = rng.integers(-127, 128, (shape.outputs, 3, 3, shape.channels)).astype("int8")
    bias = rng.integers(-1000, 1000, (1, 1, 1, shape.outputs)).astype("int32")
    scale = np.float32(30 / np.sqrt(9 * shape.channels) / 127**2)
    out_type = relax.TensorType((shape.n, shape.out_height, shape.out_width, shape.outputs), "int32")

    def body(builder, params):
        kernel = builder.add_func(winograd_kernel.prim_func(shape), "winograd_conv2d")
        at_points = relax.const(transform_weights(weights, shape.m, shape.computed))
        value = builder.emit(relax.call_tir(kernel, [params[0], at_points], out_type))
        value = builder.emit(relax.op.astype(builder.emit(relax.op.add(value, relax.const(bias))), "float32"))
        value = builder.emit(relax.op.round(builder.emit(relax.op.multiply(value, relax.const(scale)))))
        return builder.emit(relax.op.astype(builder.emit(relax.op.clip(value, -127.0, 127.0)), "int8"))

    mod = single_function({"x": (data.shape, shape.dtype)}, body)
    top, left, bottom, right = shape.pad
    padded = np.pad(data.astype("int64"), ((0, 0), (top, bottom), (left, right), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    sums = np.einsum("nyxcab,oabc->nyxo", windows, weights.astype("int64"), optimize=True) + bias
    want = np.clip(np.round(sums.astype("float32") * scale), -127, 127).astype("int8")
    return mod, {"x": data}, want


@few(8)
@given(
    seed=st.integers(1, 10_000),
    m=st.sampled_from([2, 4]),
    dtype=st.sampled_from(["int8", "uint8"]),
    size=st.tuples(st.integers(3, 19), st.integers(3, 19)),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
    channels=st.sampled_from([4, 5, 12, 20, 64]),
    outputs=st.sampled_from([4, 8, 24, 28, 64]),
    tunable=st.booleans(),
)
def test_integers_are_the_direct_convolutions(seed, m, dtype, size, pad, channels, outputs, tunable):
    shape = Shape(1, *size, channels, outputs, pad, m, dtype, 8)
    mod, inputs, want = integer_module(np.random.default_rng(seed), shape)
    result = schedule_and_run(mod, HOST, inputs, tunable, seed)
    assert list(result.rules.values()) == ["winograd"]
    np.testing.assert_array_equal(result.outputs[0], want)


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("x86-64-v3", r"vpmaddwd\s+.*%ymm"),
        ("x86-64-v4", r"vpmaddwd\s+.*%zmm"),
        ("aarch64", r"smlal2?\s+v\d+\.4s"),
    ],
)
def test_integers_are_multiplied_as_words(target, instruction):
    mod, _, _ = integer_module(np.random.default_rng(0), Shape(1, 16, 16, 64, 64, (1, 1, 1, 1), 2, "uint8"))
    (kernel,) = fused_kernels(mod).values()
    sch = s_tir.Schedule(kernel)
    assert schedules.apply(sch, resolve(target)) == "winograd"
    assembly = tvm.compile(sch.mod, target=resolve(target)).mod.inspect_source("asm")
    assert len(re.findall(instruction, assembly)) >= 8


def test_tunings_workers_can_read_kernels_with_wrapping_sums():
    mod, _, _ = integer_module(np.random.default_rng(0), Shape(1, 8, 8, 16, 16, (1, 1, 1, 1), 4, "int8", 8))
    (kernel,) = fused_kernels(mod).values()
    read = "import pickle, sys, nnfuze_tvm.jobs.tuning.workers; pickle.load(sys.stdin.buffer)"
    subprocess.run([sys.executable, "-c", read], input=pickle.dumps(kernel), check=True)


def test_one_kernel_with_what_follows():
    x = relax.Var("x", relax.TensorType((1, 16, 16, 16), "float32"))
    weights = relax.const(np.ones((16, 3, 3, 16), "float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
            conv = builder.emit(relax.op.nn.conv2d(x, weights, padding=1, **layouts))
            result = builder.emit_output(relax.op.clip(relax.op.add(conv, x), 0.0, 6.0))
        builder.emit_func_output(result)
    assert len(fused_kernels(Winograd(integers=False, far_macs=2)(builder.get()))) == 1
