from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from tests.helpers import evaluate_module
from tests.schedules import kernels


@pytest.mark.parametrize("gated", [True, False])
def test_a_layer_and_what_spreads_its_result_are_two_kernels(gated):
    """``x · sigmoid(conv(mean(x)))``; and what does not spread is still one with the layer."""
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((16, 1, 1, 16)).astype("float32")
    shape = (1, 6, 7, 16)

    def body(builder, variables):
        small = builder.emit(op.mean(variables[0], [1, 2], keepdims=True)) if gated else variables[0]
        call = op.nn.conv2d(small, relax.const(weights), data_layout="NHWC", kernel_layout="OHWI")
        gate = builder.emit(op.sigmoid(builder.emit(call)))
        return builder.emit(op.nn.relu(builder.emit(op.multiply(variables[0], gate))))

    mod = kernels.single_function({"x": (shape, "float32")}, body)
    inputs = {"x": rng.standard_normal(shape).astype("float32")}
    got = kernels.schedule_and_run(mod, kernels.HOST, inputs)
    np.testing.assert_allclose(got.outputs[0], evaluate_module(mod, inputs)[0], atol=1e-5)
    assert sorted(got.rules.values()) == (["conv2d", "elementwise", "pooling"] if gated else ["conv2d"])
