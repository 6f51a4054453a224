"""Equalize: exact in real numbers, through what is homogeneous; channels of very different ranges keep their values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.compress.equalize.equalize import Equalize
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.layout import ToNHWC
from tests.helpers import evaluate_module
from tests.passes.compress.test_insert_qdq import Graph

INT8 = Policy.uniform(bits=8)


def constant(values):
    return relax.const(np.asarray(values, "float32"))


def scaled_conv(graph, data, out, name, groups=1, decades=0.0, size=3):
    """Return a convolution whose channels are spread over decades."""
    channels = ir.static_shape(data)[1] // groups
    weight = graph.rng.standard_normal((out, channels, size, size)) * np.sqrt(2 / (channels * size**2))
    spread = graph.rng.permutation(np.logspace(-decades, 0, out))
    shift = 0.3 * graph.rng.standard_normal(out) * spread
    weight *= spread.reshape(-1, 1, 1, 1)
    y = graph(op.nn.conv2d(data, constant(weight), padding=size // 2, groups=groups), name)
    return graph(op.add(y, constant(shift.reshape(1, -1, 1, 1))))


JOINS = {
    "nothing": lambda g, x: x,
    "relu": lambda g, x: op.nn.relu(x),
    "leaky": lambda g, x: op.nn.leakyrelu(x, 0.1),
    "prelu": lambda g, x: op.nn.prelu(x, constant(g.rng.uniform(0, 1, 8)), 1),
    "relu6": lambda g, x: op.nn.relu6(x),
    "clip": lambda g, x: op.clip(x, -0.5, 0.25),
    "bounds": lambda g, x: op.minimum(op.maximum(x, constant(-0.5)), constant(0.5)),
    "max_pool": lambda g, x: op.nn.max_pool2d(x, (2, 2), (1, 1), (0, 0, 1, 1)),
    "average": lambda g, x: op.nn.avg_pool2d(x, (3, 3), (1, 1), (1, 1)),
    "pad": lambda g, x: op.nn.pad(x, [0, 0, 0, 0, 1, 0, 0, 1]),
    "pad with ones": lambda g, x: op.nn.pad(x, [0, 0, 0, 0, 1, 0, 0, 1], pad_value=1.0),
    "scale and shift": lambda g, x: op.subtract(op.divide(x, constant(3)), constant(g.rng.uniform(-1, 1, (8, 1, 1)))),
    "squares": lambda g, x: op.multiply(x, x),
    "silu": lambda g, x: op.multiply(x, op.sigmoid(x)),
    "hard swish": lambda g, x: op.multiply(x, op.divide(op.clip(op.add(x, constant(3)), 0, 6), constant(6))),
    "excite": lambda g, x: op.multiply(x, op.sigmoid(op.mean(x, [2, 3], keepdims=True))),
    "residual": lambda g, x: op.add(x, scaled_conv(g, g(op.nn.relu(x)), 8, "t/inner", decades=1)),
    "concat": lambda g, x: op.concat([x, scaled_conv(g, x, 8, "t/other", decades=2)], 1),
    "slices": lambda g, x: op.strided_slice(x, [1], [2], [7]),
    "over columns": lambda g, x: op.add(x, constant(g.rng.uniform(-1, 1, (1, 1, 1, 8)))),
    "tanh": lambda g, x: op.tanh(x),
    "shuffle": lambda g, x: op.permute_dims(op.reshape(x, (1, 2, 4, 8, 8)), [0, 2, 1, 3, 4]),
}


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from(sorted(JOINS)), min_size=1, max_size=3), st.integers(0, 2**31))
def test_it_is_exact(joins, seed):
    graph = Graph(seed, (1, 3, 8, 8))
    x = scaled_conv(graph, graph.x, 8, "t/first", decades=3)
    for n, join in enumerate(joins):
        x = graph(JOINS[join](graph, x))
        x = graph(op.reshape(x, (1, -1, *ir.static_shape(x)[-2:]))) if join == "shuffle" else x
        groups = ir.static_shape(x)[1] if n % 2 else 1
        x = scaled_conv(graph, x, 8 if groups == 1 else groups, f"t/layer{n}", groups, decades=2)
        x = scaled_conv(graph, x, 8, f"t/to{n}") if n % 2 else x
        x = graph(op.nn.adaptive_avg_pool2d(x, (8, 8))) if ir.static_shape(x)[2:] != (8, 8) else x
    mod = graph.module(graph.head(x))
    samples = graph.samples(3)
    new = Equalize(samples, INT8)(mod)
    relax.analysis.well_formed(new)
    one = {"x": samples["x"][:1]}
    (want,), (got,) = evaluate_module(mod, one), evaluate_module(new, one)
    np.testing.assert_allclose(got, want, rtol=0, atol=3e-6 * np.abs(want).max())
    layers = [b.var.name for b in bindings(mod["main"]) if b.var.name.startswith("t/")]
    assert [b.var.name for b in bindings(new["main"]) if b.var.name.startswith("t/")] == layers


def depthwise_network(activation, decades, seed=0):
    """Return a network whose depthwise channels span decades, and which needs all of them alike."""
    graph = Graph(seed, (1, 3, 12, 12))
    x = graph(op.nn.relu(scaled_conv(graph, graph.x, 16, "t/stem")))
    spread = graph.rng.permutation(np.logspace(-decades, 0, 16))
    weight = graph.rng.standard_normal((16, 1, 3, 3)) * spread.reshape(-1, 1, 1, 1)
    x = graph(activation(graph(op.nn.conv2d(x, constant(weight), padding=1, groups=16), "t/depthwise")))
    weight = graph.rng.standard_normal((8, 16, 1, 1)) / spread.reshape(1, -1, 1, 1)
    mod = graph.module(graph(op.nn.conv2d(x, constant(weight)), "t/last"))
    return mod, {"x": graph.rng.standard_normal((8, 3, 12, 12)).astype("float32")}


def error(mod, want_mod, data):
    (got,), (want,) = evaluate_module(mod, data), evaluate_module(want_mod, data)
    return float(np.sqrt(np.mean((got - want) ** 2)) / want.std())


@pytest.mark.parametrize("activation", [op.nn.relu, op.nn.relu6, lambda x: op.nn.leakyrelu(x, 0.2)])
@pytest.mark.parametrize("decades", [3, 5])
def test_depthwise_channels_over_decades(activation, decades):
    mod, samples = depthwise_network(activation, decades)
    one = {"x": samples["x"][:1]}
    plain = InsertQDQ(samples, INT8)(mod)
    equalized = InsertQDQ(samples, INT8)(Equalize(samples, INT8)(mod))
    assert error(plain, mod, one) > 0.1
    assert error(equalized, mod, one) < 0.02
    real = RealizeInteger()(ToNHWC()(equalized))
    assert list(real.attrs[ir.FLOAT_LAYERS_ATTR]) == []
    assert error(real, mod, one) < 0.02
    assert not [b for b in bindings(real["main"]) if op_name(b.value) == "nn.conv2d" and b.var.ty.dtype != "int32"]


def test_inputs_of_different_ranges_are_multiplied_once():
    graph = Graph(0, (1, 64))
    spread = np.logspace(-3, 0, 64).astype("float32")
    weight = graph.rng.standard_normal((64, 8)) / spread[:, None]
    first = graph(op.matmul(graph.x, constant(weight)), "t/first")
    second = graph(op.matmul(graph.x, constant(weight[:, ::-1].copy())), "t/second")
    mod = graph.module(graph(op.add(first, second)))
    samples = {"x": graph.rng.standard_normal((1000, 64)).astype("float32") * spread}
    new = Equalize(samples, INT8)(mod)
    assert len([b for b in bindings(new["main"]) if op_name(b.value) == "multiply"]) == 1
    data = {"x": samples["x"][:1]}
    assert error(InsertQDQ(samples, INT8)(new), mod, data) < 0.03 < error(InsertQDQ(samples, INT8)(mod), mod, data)


def test_equal_channels_are_left_alone():
    graph = Graph(0, (1, 64))
    hidden = graph(op.tanh(graph.dense(graph.x, 64, "t/first")))
    mod = graph.module(graph.dense(hidden, 8, "t/second"))
    assert not [b for b in bindings(Equalize(graph.samples(50), INT8)(mod)["main"]) if op_name(b.value) == "multiply"]


def test_a_channel_that_samples_leave_off_stays_small():
    """Its weights would be a hundred thousand times as large as the others', which one scale per tensor can't mean."""
    graph = Graph(0)
    shift = np.array([-9.0, *[0.5] * 7])
    x = graph(op.nn.conv2d(graph.x, constant(graph.rng.standard_normal((8, 3, 3, 3)) / 5), padding=1), "t/first")
    x = graph(op.nn.relu(graph(op.add(x, constant(shift.reshape(1, 8, 1, 1))))))
    mod = graph.module(graph.conv(x, 8, "t/second", bias=False))
    samples = graph.samples(8)
    new = Equalize(samples, INT8)(mod)
    bright = {"x": 4 * samples["x"][:1]}
    assert error(InsertQDQ(samples, INT8)(new), mod, bright) < 1.1 * error(InsertQDQ(samples, INT8)(mod), mod, bright)


def test_only_layers_of_the_policy_count():
    mod, samples = depthwise_network(op.nn.relu, 3)
    assert Equalize(samples, Policy.uniform(bits=32))(mod)["main"].same_as(mod["main"])
