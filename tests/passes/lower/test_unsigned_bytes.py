from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.passes.lower.row_convolutions import RowConvolutions
from nnfuze_tvm.passes.lower.unsigned_bytes import UnsignedBytes
from tests.passes.lower.test_row_convolutions import convolution, expected
from tests.schedules import kernels

CASCADE_LAKE = '{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "cascadelake"}'
HOST = resolve("host")
NEEDS_VNNI = pytest.mark.skipif(not build.machine(HOST).unsigned, reason="needs VNNI: other products of 255 saturate")


@NEEDS_VNNI
@pytest.mark.parametrize(
    ("shape", "out", "kernel", "attributes"),
    [
        ((1, 9, 11, 8), 10, (3, 3), {"padding": [1, 2, 0, 1], "strides": [1, 2]}),
        ((1, 9, 11, 8), 24, (1, 1), {}),
        ((1, 9, 11, 3), 10, (3, 3), {"padding": [1, 2, 0, 1], "strides": [2, 1]}),
        ((1, 9, 11, 12), 16, (3, 3), {"padding": [2, 2, 2, 2], "dilation": [2, 2]}),
    ],
)
def test_sums_of_signed_data_are_the_same_bits(shape, out, kernel, attributes):
    mod, inputs, weights = convolution(shape, out, kernel, "int8", **attributes)
    inputs["x"][0, 0, 0, 0] = -128
    strides, dilation = attributes.get("strides", [1, 1]), attributes.get("dilation", [1, 1])
    want = expected(inputs["x"], weights, strides, attributes.get("padding", [0] * 4), dilation)
    shifted = tvm.transform.Sequential([RowConvolutions(as_unsigned=True), UnsignedBytes(True)])(mod)
    got = kernels.schedule_and_run(shifted, HOST, inputs)
    # What is padded is copied by the layer; what makes the data makes others unsigned.
    assert set(got.rules.values()) == ({"conv2d"} if attributes else {"conv2d", "elementwise"})
    np.testing.assert_array_equal(got.outputs[0], want)


@NEEDS_VNNI
def test_what_makes_the_data_makes_them_unsigned():
    def body(builder, values):
        data = builder.emit(op.negative(values[0]))
        attrs = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}
        each = [builder.emit(op.nn.conv2d(data, relax.const(weights), **attrs)) for _ in range(2)]
        return builder.emit(op.add(*each))

    weights = np.random.default_rng(0).integers(-127, 128, (16, 1, 1, 8)).astype("int8")
    mod = UnsignedBytes(True)(kernels.single_function({"x": ((1, 3, 5, 8), "int8")}, body))
    calls = [b.value for b in bindings(kernels.fuse(mod, HOST)["main"])]
    assert [[str(arg.ty.dtype) for arg in call.args[1]][:1] for call in calls] == [["int8"], ["uint8"], ["uint8"]]
    x = np.arange(-60, 60).reshape(1, 3, 5, 8).astype("int8")
    want = 2 * np.einsum("nhwi,oi->nhwo", -x.astype("int32"), weights[:, 0, 0].astype("int32"))
    np.testing.assert_array_equal(kernels.schedule_and_run(mod, HOST, {"x": x}).outputs[0], want)


def test_vnni_multiplies_signed_data():
    mod, *_ = convolution((1, 16, 16, 16), 16, (3, 3), "int8", padding=[1, 1, 1, 1])
    assert "\tvpdpbusd\t" in kernels.assembly(mod, resolve(CASCADE_LAKE))
