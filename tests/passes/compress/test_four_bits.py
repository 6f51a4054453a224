"""Weights of 4 bits: codes that are right for what layers see, and integers that are those of a plain reference."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.four_bits import METHOD, FourBits
from nnfuze_tvm.passes.compress.free_weights import with_free_weights
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.method import Inputs, asked
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.rounding import best_scales, nearest, rounded, towards
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.helpers import evaluate_module
from tests.passes.compress.prune.test_prune_channels import Net
from tests.passes.compress.test_repair import samples_of

POLICY = Policy.uniform(weights=4, activations=8)


def network(kind: str) -> tuple[Net, tvm.IRModule]:
    """Return two layers with a rectifier between."""
    net = Net(*((4, 12) if kind == "dense" else (1, 12, 6, 6)))
    if kind == "dense":
        y = net(relax.op.matmul(net.x, net.const(12, 16)), "first")
        y = net(relax.op.nn.relu(net(relax.op.add(y, net.const(16)))))
        return net, net.module(net(relax.op.matmul(y, net.const(16, 8)), "layer"))
    y = net(relax.op.nn.conv2d(net.x, net.const(16, 12, 1, 1)), "first")
    y = net(relax.op.nn.relu(net(relax.op.add(y, net.const(1, 16, 1, 1)))))
    groups = {"grouped": 4, "depthwise": 16}.get(kind, 1)
    if kind == "transposed":
        call = relax.op.nn.conv2d_transpose(y, net.const(16, 4, 2, 2), strides=2, groups=2)
    else:
        call = relax.op.nn.conv2d(y, net.const(16, 16 // groups, 3, 3), padding=1, groups=groups)
    return net, net.module(net(call, "layer"))


def codes_of(mod: tvm.IRModule) -> list[np.ndarray]:
    """Return the constants behind a dequantize."""
    found = (b.value for b in bindings(mod["main"]) if op_name(b.value) == "dequantize")
    return [array(call.args[0]) for call in found if not isinstance(call.args[0], tvm.ir.Var)]


@pytest.mark.parametrize("kind", ["dense", "3x3", "grouped", "depthwise", "transposed"])
def test_layers_become_integers_with_these_codes(kind: str) -> None:
    net, mod = network(kind)
    samples = samples_of(net, 8)
    mod = FourBits(samples, POLICY)(mod)
    codes = codes_of(mod)
    assert len(codes) == 2 and all(np.abs(each).max() == 7 for each in codes)
    quantized = InsertQDQ(samples, POLICY)(mod)
    assert all(any(np.array_equal(own, each) for own in codes_of(quantized)) for each in codes)
    free = with_free_weights(quantized["main"])
    shaken = dict(quantized.functions_items()) | {quantized.get_global_var("main"): free}
    want, got = (
        evaluate_module(tvm.IRModule(f), {"x": samples["x"][: len(samples["x"]) // 8]})[0]
        for f in (dict(quantized.functions_items()), shaken)
    )
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    realized = RealizeInteger()(pipeline.layout_phase()(quantized))
    layers = [b.value for b in bindings(realized["main"]) if ops.is_layer(b.value)]
    assert [str(layer.ty.dtype) for layer in layers] == ["int32"] * 2


def test_the_policy_asks_for_both_stages_and_mixes_kinds() -> None:
    names = {"w4a8": POLICY, "int8": Policy.uniform(bits=8)}
    for name, policy in names.items():
        stages = [method.name for method in asked(pipeline.METHODS, [policy.for_layer("layer")])]
        assert stages == (["w4a8", "int8"] if name == "w4a8" else ["int8"])
    net, mod = network("dense")
    samples = samples_of(net, 8)
    mixed = Policy(layers={"first": {"bits": 8}, "layer": {"weights": 4, "activations": 8}})
    for each in [*METHOD.passes(Inputs(mixed, samples)), InsertQDQ(samples, mixed)]:
        mod = each(mod)
    assert [int(np.abs(each).max()) for each in codes_of(mod)] == [127, 7]


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**31), st.integers(2, 40), st.integers(1, 80))
def test_sums_are_off_by_no_more_than_with_the_nearest_codes(seed: int, size: int, count: int) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((5, size))
    inputs = rng.standard_normal((count, size)) @ rng.standard_normal((size, size)) * rng.random(size)
    gram = inputs.T @ inputs
    scale = best_scales(weight, np.diag(gram), 7)
    codes = rounded(weight, gram, scale[:, None], 7)
    assert np.array_equal(codes, np.rint(codes)) and np.abs(codes).max() <= 7
    errors = [
        np.square(inputs @ (each * scale[:, None] - weight).T).sum(0)
        for each in (codes, nearest(weight, scale[:, None], 7))
    ]
    assert (errors[0] <= errors[1] * (1 + 1e-6) + 1e-9).all()


def test_correlated_inputs_make_up_for_each_other() -> None:
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((16, 64))
    inputs = rng.standard_normal((512, 8)) @ rng.standard_normal((8, 64)) + 0.1 * rng.standard_normal((512, 64))
    gram = inputs.T @ inputs
    scale = best_scales(weight, np.diag(gram), 7)
    codes = rounded(weight, gram, scale[:, None], 7), nearest(weight, scale[:, None], 7)
    errors = [np.square(inputs @ (each * scale[:, None] - weight).T).sum() for each in codes]
    assert errors[0] < errors[1] / 4


def test_weights_make_up_for_inputs_that_changed() -> None:
    rng = np.random.default_rng(0)
    weight, inputs = rng.standard_normal((4, 6)), rng.standard_normal((400, 6))
    changed = inputs @ (np.eye(6) + 0.3 * rng.standard_normal((6, 6)))
    new = towards(weight, changed.T @ changed, inputs.T @ changed)
    wanted = inputs @ weight.T
    left, right = (np.square(changed @ each.T - wanted).sum() for each in (new, weight))
    assert left < right / 20
