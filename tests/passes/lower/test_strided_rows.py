"""StridedRows: equal values, long reductions, whole vectors of output channels."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.strided_rows import StridedRows
from tests.helpers import keeps_values
from tests.schedules.kernels import single_function


def network(rng, shape, outputs, kernel, relu=False, **attributes):
    weights = rng.standard_normal((outputs, shape[1] // attributes.get("groups", 1), kernel)).astype("float32")
    bias = rng.standard_normal((1, outputs, 1)).astype("float32")

    def body(builder, params):
        value = builder.emit(op.nn.conv1d(params[0], relax.const(weights), **attributes))
        value = builder.emit(op.add(value, relax.const(bias)))
        return builder.emit(op.nn.relu(value)) if relu else value

    data = rng.standard_normal(shape).astype("float32")
    return single_function({"x": (shape, "float32")}, body), {"x": data}


def convolution(mod):
    (call,) = (b.value for b in bindings(mod["main"]) if op_name(b.value) == "nn.conv1d")
    return call


def check(mod, inputs):
    return keeps_values(StridedRows(), mod, inputs)


@settings(max_examples=40, deadline=None)
@given(
    length=st.integers(1, 60),
    channels=st.sampled_from([1, 2, 3]),
    outputs=st.sampled_from([1, 5, 65]),
    kernel=st.integers(1, 12),
    stride=st.integers(1, 8),
    padding=st.tuples(st.integers(0, 5), st.integers(0, 5)),
    seed=st.integers(0, 99),
)
def test_any_strided_convolution_keeps_its_values(length, channels, outputs, kernel, stride, padding, seed):
    assume(length + sum(padding) >= kernel)
    rng = np.random.default_rng(seed)
    mod, inputs = network(rng, (2, channels, length), outputs, kernel, relu=True, strides=stride, padding=padding)
    check(mod, inputs)


def test_a_fourier_transform_has_long_reductions_and_whole_vectors():
    """257 outputs of 512 samples, every 160: 32 samples stand side by side, 272 outputs are whole vectors."""
    mod, inputs = network(np.random.default_rng(0), (1, 1, 2432), 257, 512, relu=True, strides=160)
    new = check(mod, inputs)
    call = convolution(new)
    assert static_shape(call.args[1]) == (272, 32, 16)
    assert [int(stride) for stride in call.attrs.strides] == [5]
    # The channels that are none are cut off last.
    names = [op_name(binding.value) for binding in bindings(new["main"])]
    assert names.index("nn.relu") < names.index("strided_slice", names.index("nn.relu"))


@pytest.mark.parametrize(
    ("channels", "attributes"),
    [
        (1, {"strides": 1}),
        (1, {"strides": 3}),
        (1, {"strides": 2, "dilation": 2}),
        (16, {"strides": 2}),
        (4, {"strides": 2, "groups": 2}),
    ],
)
def test_others_stay_as_they_are(channels, attributes):
    mod, inputs = network(np.random.default_rng(0), (1, channels, 40), 6, 4, **attributes)
    assert static_shape(convolution(check(mod, inputs)).args[1]) == static_shape(convolution(mod).args[1])
