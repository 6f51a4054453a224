from __future__ import annotations

import numpy as np
import pytest
import tvm

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes.lower.row_convolutions import RowConvolutions
from nnfuze_tvm.passes.lower.unsigned_bytes import UnsignedBytes
from tests.passes.lower.test_row_convolutions import convolution, expected
from tests.schedules import kernels

CASCADE_LAKE = '{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "cascadelake"}'
HOST = resolve("host")


@pytest.mark.skipif(not build.machine(HOST).unsigned, reason="needs VNNI: other products of 255 saturate")
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
    assert set(got.rules.values()) == {"conv2d"}
    np.testing.assert_array_equal(got.outputs[0], want)


def test_vnni_multiplies_signed_data():
    mod, *_ = convolution((1, 16, 16, 16), 16, (3, 3), "int8", padding=[1, 1, 1, 1])
    assert "\tvpdpbusd\t" in kernels.assembly(mod, resolve(CASCADE_LAKE))
