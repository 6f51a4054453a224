from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.few_channels import FewChannels
from tests.helpers import evaluate_module
from tests.schedules import kernels


def convolution(channels, depth, size=(9, 11), kernel=(3, 3), seed=0, **attributes):
    """A convolution with a bias and an activation; returns the module and its inputs."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((channels, *kernel, depth)).astype("float32")
    bias = rng.standard_normal((1, 1, 1, channels)).astype("float32")
    shape = (1, *size, depth)

    def body(builder, variables):
        call = op.nn.conv2d(variables[0], relax.const(weights), data_layout="NHWC", kernel_layout="OHWI", **attributes)
        return builder.emit(op.sigmoid(builder.emit(op.add(builder.emit(call), relax.const(bias)))))

    mod = kernels.single_function({"x": (shape, "float32")}, body)
    return mod, {"x": rng.standard_normal(shape).astype("float32")}


@settings(max_examples=4, deadline=None)
@given(
    channels=st.integers(1, 2),
    depth=st.integers(11, 40),
    size=st.tuples(st.integers(5, 9), st.integers(5, 23)),
    kernel=st.tuples(st.integers(1, 5), st.integers(2, 5)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 3)),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    target=st.sampled_from(["host", "x86-64-v3"]),
    seed=st.integers(0, 100),
)
def test_any_convolution_to_few_channels(channels, depth, size, kernel, strides, padding, target, seed):
    mod, inputs = convolution(channels, depth, size, kernel, seed, strides=list(strides), padding=list(padding))
    got = kernels.schedule_and_run(mod, resolve(target), inputs, tunable=seed % 2 == 1)
    assert list(got.rules.values()) == ["few_channels"]
    np.testing.assert_allclose(got.outputs[0], evaluate_module(mod, inputs)[0], atol=1e-5)


@pytest.mark.parametrize(
    ("channels", "depth", "kernel", "attributes"),
    [(5, 32, (3, 3), {}), (1, 3, (1, 1), {}), (1, 32, (3, 3), {"dilation": [1, 2]})],
)
def test_what_is_faster_by_channels_stays(channels, depth, kernel, attributes):
    mod, _ = convolution(channels, depth, kernel=kernel, **attributes)
    assert op_name(bindings(FewChannels(16)(mod)["main"])[0].value) == "nn.conv2d"
