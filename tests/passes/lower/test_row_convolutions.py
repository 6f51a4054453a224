from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.row_convolutions import RowConvolutions
from tests import integer_reference as reference
from tests.helpers import few
from tests.schedules import kernels


def convolution(shape, out, kernel, dtype="int8", kernel_layout="OHWI", seed=0, **attributes):
    """A convolution of NHWC codes with a bias, back to 8 bits; returns the module, its input and the weights."""
    rng = np.random.default_rng(seed)
    weights = rng.integers(-127, 128, (out, *kernel, shape[-1])).astype("int8")
    data = rng.integers(0 if dtype == "uint8" else -127, 128, shape).astype(dtype)

    def body(builder, variables):
        call = op.nn.conv2d(
            variables[0],
            relax.const(weights),
            data_layout="NHWC",
            kernel_layout=kernel_layout,
            out_dtype="int32",
            **attributes,
        )
        y = builder.emit(
            op.multiply(builder.emit(op.astype(builder.emit(call), "float32")), relax.const(np.float32(2e-3)))
        )
        y = builder.emit(op.astype(builder.emit(op.round(y)), "int32"))
        return builder.emit(op.astype(builder.emit(op.clip(y, -127, 127)), "int8"))

    return kernels.single_function({"x": (shape, dtype)}, body), {"x": data}, weights


def expected(data, weights, strides, padding, dilation):
    codes = reference.Tensor(data.astype("int64").transpose(0, 3, 1, 2), 1.0)
    ones = np.ones(len(weights))
    total = reference.convolve(codes, weights.transpose(0, 3, 1, 2), ones, strides, padding, dilation)
    total.scale = total.scale * np.float64(np.float32(2e-3))
    return reference.requantize(total, 1.0, 0, -127, 127).codes.transpose(0, 2, 3, 1)


@few(10)
@given(
    size=st.tuples(st.integers(5, 20), st.integers(5, 37)),
    channels=st.sampled_from([1, 2, 3, 5, 6, 10]),
    out=st.sampled_from([3, 8, 16, 24]),
    kernel=st.tuples(st.sampled_from([1, 3, 5]), st.integers(1, 5)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 3)] * 4),
    dilation=st.integers(1, 2),
    dtype=st.sampled_from(["int8", "uint8"]),
    seed=st.integers(0, 100),
)
def test_any_convolution_is_bit_identical_to_numpy(
    size, channels, out, kernel, strides, padding, dilation, dtype, seed
):
    if size[0] + padding[0] + padding[2] < (kernel[0] - 1) * dilation + 1:
        return
    mod, inputs, weights = convolution(
        (1, *size, channels),
        out,
        kernel,
        dtype,
        seed=seed,
        strides=list(strides),
        padding=list(padding),
        dilation=[dilation, 1],
    )
    target = resolve("host")
    rows = RowConvolutions()(mod)
    assert not any(op_name(b.value) == "nn.conv2d" for b in bindings(rows["main"]))
    got = kernels.schedule_and_run(rows, target, inputs)
    assert set(got.rules.values()) == {"conv2d"}
    np.testing.assert_array_equal(got.outputs[0], expected(inputs["x"], weights, strides, padding, (dilation, 1)))


@pytest.mark.parametrize(
    ("channels", "attributes"),
    [(4, {}), (8, {}), (3, {"dilation": [1, 2]})],
)
def test_what_has_whole_groups_or_gaps_stays_a_convolution(channels, attributes):
    mod, *_ = convolution((1, 9, 9, channels), 8, (3, 3), **attributes)
    tvm.ir.assert_structural_equal(RowConvolutions()(mod), mod)


@pytest.mark.parametrize(
    ("target", "dtype", "instruction"),
    [
        ("x86-64-v3", "int8", "vpmaddwd"),
        ("x86-64-v3", "uint8", "vpmaddubsw"),
        ("x86-64-v4", "int8", "vpmaddwd"),
        ("aarch64+dotprod", "int8", "sdot"),
    ],
)
def test_a_stem_takes_dot_products(target, dtype, instruction):
    mod, *_ = convolution((1, 32, 32, 3), 16, (3, 3), dtype, strides=[2, 2], padding=[1, 1, 1, 1])
    assembly = kernels.assembly(RowConvolutions()(mod), resolve(target))
    assert assembly.count(f"\t{instruction}\t") >= 8


@pytest.mark.parametrize(
    ("target", "instruction"),
    [("x86-64-v3", "vcvtps2dq"), ("x86-64-v4", "vcvtps2dq"), ("aarch64", "fcvtns")],
)
def test_requantization_rounds_and_converts_at_once(target, instruction):
    mod, *_ = convolution((1, 8, 8, 16), 16, (3, 3))
    assembly = kernels.assembly(mod, resolve(target))
    assert f"\t{instruction}\t" in assembly
    assert "vroundps" not in assembly
