from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.whole_channels import WholeChannels
from tests.helpers import evaluate_module
from tests.schedules import kernels

HOST = resolve("host")


def convolution(channels, depth=6, size=(9, 11), kernel=(3, 3), seed=0):
    """A convolution with bias, activation and a residual; returns the module, its inputs and the expected result."""
    rng = np.random.default_rng(seed)
    weights = rng.standard_normal((channels, *kernel, depth)).astype("float32")
    bias, slope = (rng.standard_normal((1, 1, 1, channels)).astype("float32") for _ in range(2))
    shapes = {"x": ((1, *size, depth), "float32"), "r": ((1, *size, channels), "float32")}
    inputs = {name: rng.standard_normal(shape).astype(dtype) for name, (shape, dtype) in shapes.items()}

    def body(builder, variables):
        pads = [kernel[0] // 2, kernel[1] // 2]
        y = op.nn.conv2d(variables[0], relax.const(weights), padding=pads, data_layout="NHWC", kernel_layout="OHWI")
        y = builder.emit(op.add(builder.emit(y), relax.const(bias)))
        y = builder.emit(op.add(builder.emit(op.multiply(y, relax.const(slope))), variables[1]))
        return builder.emit(op.nn.relu(y))

    mod = kernels.single_function(shapes, body)
    return mod, inputs, evaluate_module(mod, inputs)[0]


@settings(max_examples=5, deadline=None)
@given(
    channels=st.integers(1, 75),
    more=st.sampled_from([4, 8, 16]),
    depth=st.integers(1, 9),
    size=st.tuples(st.integers(1, 9), st.integers(1, 12)),
    seed=st.integers(0, 100),
)
def test_any_number_of_channels_is_the_first_of_more(channels, more, depth, size, seed):
    mod, inputs, expected = convolution(channels, depth, size, seed=seed)
    wide = WholeChannels(lambda layer: -(-layer.channels // more) * more)(mod)
    got = kernels.schedule_and_run(wide, HOST, inputs)
    assert list(got.rules.values()) == ["conv2d"]
    assert got.outputs[0].shape == expected.shape
    np.testing.assert_allclose(got.outputs[0], expected, atol=1e-4)


@pytest.mark.parametrize(("channels", "tunable"), [(10, False), (88, False), (161, True)])
def test_products_with_odd_columns(channels, tunable):
    rng = np.random.default_rng(1)
    weights = rng.standard_normal((40, channels)).astype("float32")
    data = rng.standard_normal((3, 40)).astype("float32")
    mod = kernels.single_function(
        {"x": (data.shape, "float32")}, lambda _, variables: op.matmul(variables[0], relax.const(weights))
    )
    wide = WholeChannels(lambda layer: -(-layer.channels // 16) * 16)(mod)
    got = kernels.schedule_and_run(wide, HOST, {"x": data}, tunable)
    assert list(got.rules.values()) == ["dense"]
    np.testing.assert_allclose(got.outputs[0], data @ weights, atol=1e-4)


def test_a_layer_keeps_its_name_and_others_stay():
    mod, *_ = convolution(10)
    kept = WholeChannels(lambda layer: layer.channels)(mod)
    assert op_name(bindings(kept["main"])[1].value) == "add"
    wide = WholeChannels(lambda layer: 16)(mod)
    first, crop = bindings(wide["main"])[:2]
    assert first.var.name == bindings(mod["main"])[0].var.name
    assert [int(v.ty.shape[-1]) for v in (first.var, crop.var)] == [16, 10]
