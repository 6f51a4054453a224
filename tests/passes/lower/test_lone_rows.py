"""lone_rows: a depthwise convolution over one axis stays channels first exactly where nothing else is channels last."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.layout import ToNHWC
from nnfuze_tvm.passes.lower.lone_rows import lone_rows
from tests.helpers import evaluate_module
from tests.schedules.kernels import single_function

CHANNELS, WIDTH = 6, 20


def network(steps):
    """Return a network of these steps, one after the other, and data for it."""
    rng = np.random.default_rng(0)

    def weights(*shape):
        return relax.const(rng.standard_normal(shape).astype("float32"))

    def body(builder, params):
        value = skip = params[0]
        for step in steps:
            if step in ("depthwise", "strided", "dense"):
                skip = value
            value = builder.emit(
                {
                    "depthwise": lambda v: op.nn.conv1d(v, weights(CHANNELS, 1, 3), padding=1, groups=CHANNELS),
                    "strided": lambda v: op.nn.conv1d(v, weights(CHANNELS, 1, 1), strides=2, groups=CHANNELS),
                    "dense": lambda v: op.nn.conv1d(v, weights(CHANNELS, CHANNELS, 3), padding=1),
                    "relu": op.nn.relu,
                    "add": lambda v, skip=skip: op.add(v, skip),
                    "pool": lambda v: op.nn.max_pool1d(v, 3, 1, 1),
                    "transpose": lambda v: op.permute_dims(v, [0, 2, 1]),
                    "back": lambda v: op.permute_dims(v, [0, 2, 1]),
                    "softmax": lambda v: op.nn.softmax(v, axis=2),
                }[step](value)
            )
        return value

    shape = (1, CHANNELS, WIDTH)
    if steps[0] == "back":
        shape = (1, WIDTH, CHANNELS)
    return single_function({"x": (shape, "float32")}, body), {"x": rng.standard_normal(shape).astype("float32")}


def names(mod):
    return [op_name(binding.value) for binding in bindings(mod["main"])]


def check(steps):
    """Check that ToNHWC keeps the values; return how many layers it leaves channels first, and its operators."""
    mod, data = network(steps)
    new = ToNHWC()(mod)
    for want, got in zip(evaluate_module(mod, data), evaluate_module(new, data), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4 * max(1.0, float(np.ptp(want))))
    kept = [b.value for b in bindings(new["main"]) if op_name(b.value) == "nn.conv1d"]
    kept = [call for call in kept if str(call.attrs.data_layout) == "NCW"]
    assert len(kept) == len(lone_rows(mod["main"]))
    return len(kept), names(new)


@pytest.mark.parametrize("steps", [["depthwise"], ["relu", "depthwise", "relu"], ["relu", "depthwise", "add"]])
def test_a_layer_alone_stays_channels_first(steps):
    kept, found = check(steps)
    assert kept == 1 and "permute_dims" not in found


@pytest.mark.parametrize(
    "steps",
    [
        ["depthwise", "relu", "dense"],
        ["dense", "relu", "depthwise"],
        ["depthwise", "depthwise"],
        ["depthwise", "pool"],
        ["pool", "depthwise", "relu"],
        ["back", "depthwise", "relu"],
        ["depthwise", "relu", "transpose"],
        ["strided"],
    ],
)
def test_a_layer_among_others_goes_channels_last(steps):
    kept, found = check(steps)
    assert kept == 0 and found.count("permute_dims") <= 2


def test_what_needs_its_own_order_of_axes_keeps_layers_apart():
    kept, found = check(["depthwise", "softmax", "depthwise"])
    assert kept == 2 and "permute_dims" not in found


@settings(max_examples=25, deadline=None)
@given(
    steps=st.lists(st.sampled_from(["depthwise", "dense", "relu", "add", "pool", "softmax"]), min_size=1, max_size=6)
)
def test_values_never_change(steps):
    kept, _ = check(steps)
    assert kept <= steps.count("depthwise")
