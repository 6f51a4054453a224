"""KeepCrops: a crop is no part of the convolution's kernel, so that a tile fits that."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from tests.schedules.kernels import schedule_and_run, single_function


@pytest.mark.parametrize(("axis", "end"), [(1, 3), (3, 9)])
def test_a_convolution_with_a_crop_behind_it_has_its_own_rule(axis, end):
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((16, 1, 1, 8)).astype("float32")

    def body(builder, params):
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        value = builder.emit(op.nn.conv2d(params[0], relax.const(weights), **layouts))
        return builder.emit(op.strided_slice(value, [axis], [0], [end]))

    x = rng.standard_normal((1, 5, 6, 8)).astype("float32")
    got = schedule_and_run(single_function({"x": (x.shape, "float32")}, body), resolve("host"), {"x": x})
    assert sorted(got.rules.values()) == ["conv2d", "elementwise"]
    want = (x @ weights[:, 0, 0].T).take(range(end), axis)
    np.testing.assert_allclose(got.outputs[0], want, rtol=0, atol=1e-5 * np.ptp(want))
