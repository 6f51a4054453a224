"""QuantizeWithin: the layers that spoil the outputs stay float, as few as the budget asks for."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.dataflow import Emitter, bindings
from nnfuze_tvm.passes.compress.error import error_bound, output_error
from nnfuze_tvm.passes.compress.insert_qdq import INT8, InsertQDQ, Seen
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.within_budget import QuantizeWithin, choice_of

ALL = Policy.uniform(bits=8)
SAMPLES = {"x": np.random.default_rng(1).standard_normal((6, 4, 10, 10)).astype("float32")}


def network(decades=3.0, stored=False):
    """Return four convolutions; what the depthwise one reads is spread over decades from channel to channel.

    Weights may be stored in 8 bits, behind a dequantize.
    """
    rng, emitter = np.random.default_rng(0), Emitter()
    spread = np.logspace(0, -decades, 16, dtype="float32")[:, None, None, None]
    x = relax.Var("x", relax.TensorType((1, 4, 10, 10), "float32"))

    def conv(data, outputs, inputs, name, scale=1.0, groups=1, size=3):
        weight = rng.standard_normal((outputs, inputs // groups, size, size)).astype("float32") * scale
        filters = relax.const(weight)
        if stored:
            steps = np.abs(weight).max((1, 2, 3)) / 127
            codes = relax.const(np.rint(weight / steps[:, None, None, None]).astype("int8"))
            zeros = relax.const(np.zeros(outputs, "int8"))
            filters = emitter.emit(op.dequantize(codes, relax.const(steps), zeros, axis=0, out_dtype="float32"))
        return emitter.emit(op.nn.conv2d(data, filters, padding=size // 2, groups=groups), name)

    y = emitter.emit(op.nn.relu(conv(x, 16, 4, "t/first", spread)))
    y = emitter.emit(op.nn.relu(conv(y, 16, 16, "t/depthwise", 1 / spread, groups=16)))
    y = emitter.emit(op.nn.relu(conv(y, 16, 16, "t/wide")))
    y = conv(y, 3, 16, "t/last", size=1)
    mod = tvm.IRModule({"main": emitter.finish([x], [y]).with_attr("global_symbol", "main")})
    return ir.with_task_outputs(mod, [ir.TaskOutput("t", "y")])


def quantizer(samples, corrects):
    return partial(InsertQDQ, samples, bias_correction=corrects, executor=evaluate.executor, seen=Seen())


def within(mod, max_error, policy=ALL, samples=SAMPLES):
    said = []
    result = QuantizeWithin(quantizer, policy, INT8, samples, max_error, said.append)(mod)
    relax.analysis.well_formed(result)
    return result, choice_of(result), said


def error(mod, exact):
    def answers(module):
        run = evaluate.executor(module)
        return [run({"x": sample[None]})[0] for sample in SAMPLES["x"]]

    return error_bound(answers(mod), answers(exact))


def test_the_layer_that_spoils_the_outputs_stays_float():
    mod = network()
    result, choice, said = within(mod, 0.05)
    assert list(choice.layers) == ["t/depthwise"] and choice.samples == 6
    assert choice.before["t:y"] == pytest.approx(error(InsertQDQ(SAMPLES, ALL)(mod), mod))
    assert choice.after["t:y"] == pytest.approx(error(result, mod))
    assert choice.after["t:y"] <= 0.05 < choice.before["t:y"]
    assert choice.layers["t/depthwise"] >= choice.before["t:y"]  # alone, without its bias corrected
    assert list(ir.float_layers(result)) == ["t/depthwise"]
    assert any("layer 4 of 4 alone" in each for each in said)


@pytest.mark.parametrize("stored", [False, True])
def test_the_choice_is_a_policy_and_always_the_same(stored):
    mod = network(stored=stored)
    result, choice, _ = within(mod, 0.05)
    assert list(choice.layers) == ["t/depthwise"] and choice.after["t:y"] == pytest.approx(error(result, mod), rel=0.05)
    policy = Policy.parse(choice.policy)
    policy.validate_layers([b.var.name for b in bindings(mod["main"]) if "/" in b.var.name])
    tvm.ir.assert_structural_equal(InsertQDQ(SAMPLES, policy)(mod)["main"], result["main"])
    assert within(mod, 0.05)[1] == choice


@pytest.mark.parametrize(("decades", "max_error"), [(0.0, 0.1), (3.0, 1.0)])
def test_within_the_budget_the_result_is_that_of_plain_int8(decades, max_error):
    mod = network(decades)
    result, choice, said = within(mod, max_error)
    tvm.ir.assert_structural_equal(InsertQDQ(SAMPLES, ALL)(mod)["main"], result["main"])
    assert choice.layers == {} and choice.after == choice.before
    assert not any("alone" in each for each in said)


def test_what_the_policy_says_of_a_layer_is_not_changed():
    mod = network()
    policy = Policy(
        default={"bits": 8}, layers={"*/depth*": {"bits": 8}, "t/wide": {"keep": 0.5}, "t/first": {"bits": 32}}
    )
    result, choice, _ = within(mod, 0.05, policy)
    assert "t/depthwise" not in choice.layers and "t/first" not in choice.layers
    assert choice.after["t:y"] > 0.05, "no choice is within the budget"
    assert choice.after["t:y"] == pytest.approx(error(result, mod))
    chosen = Policy.parse(choice.policy)
    assert chosen.for_layer("t/wide").keep == 0.5 and chosen.for_layer("t/first").precision.weights == 32


def test_a_policy_may_leave_nothing_to_choose():
    result, choice, _ = within(network(), 0.05, Policy(layers={"*": {"bits": 8}}))
    assert choice.layers == {} and choice.after == choice.before and choice.after["t:y"] > 0.05
    tvm.ir.assert_structural_equal(InsertQDQ(SAMPLES, ALL)(network())["main"], result["main"])


def test_errors_are_those_on_samples_that_the_quantizer_has_not_seen():
    """Every other sample is ten times as large: out of the range of the others."""
    mod, size = network(0.0), np.tile([1, 10], 4)[:, None, None, None]
    samples = {"x": np.random.default_rng(2).standard_normal((8, 4, 10, 10)).astype("float32") * size}
    samples = {"x": samples["x"].astype("float32")}
    result, choice, _ = within(mod, 10.0, samples=samples)
    assert choice.samples == 4 and choice.before["t:y"] > 0.5
    tvm.ir.assert_structural_equal(InsertQDQ(samples, ALL)(mod)["main"], result["main"])


def test_layers_of_one_origin_stay_float_together():
    mod = ir.with_aliases(ir.derive(network(), "t/depthwise", "t/given"), {"u/given": "t/depthwise"})
    mod = ir.derive(mod, "t/wide", "t/given")
    _, choice, _ = within(mod, 0.05)
    assert list(choice.layers) == ["t/depthwise", "t/wide"]
    assert choice.policy["layers"] == {"t/given": {"bits": 32}}


@settings(max_examples=5, deadline=None)
@given(st.floats(0.003, 0.3), st.floats(0, 4))
def test_any_budget_is_kept_where_all_layers_may_be_float(max_error, decades):
    mod = network(decades)
    result, choice, _ = within(mod, max_error)
    assert error(result, mod) <= max_error + 1e-9
    assert set(choice.layers) <= set(ir.float_layers(result))


@pytest.mark.parametrize(
    ("answer", "exact", "expected"),
    [
        ([1.0, 3.0], [1.0, 2.0], np.sqrt(0.5) / 0.5),
        ([100.0, 101.0], [100.0, 100.0], np.sqrt(0.5) / 100),
        ([0.5, 0.5], [0.0, 0.0], 0.5),
        ([1.0, np.inf], [1.0, np.inf], 0.0),
        ([1.0, np.nan], [1.0, 2.0], np.inf),
        ([], [], 0.0),
        ([1, 2, 3, 4], [1, 2, 3, 5], 0.25),
    ],
)
def test_errors_of_outputs(answer, exact, expected):
    kind = None if isinstance(sum(exact), int) and exact else "float32"
    got = output_error([np.array(answer, kind)], [np.array(exact, kind)])
    assert got == pytest.approx(expected, abs=1e-12)


def test_a_bound_is_the_error_where_inferences_are_alike_and_holds_where_they_are_not():
    rng = np.random.default_rng(0)
    exact = [rng.standard_normal((1, 5)).astype("float32") for _ in range(8)]
    alike = [each + np.float32(0.25) for each in exact]
    assert error_bound(alike, exact) == pytest.approx(output_error(alike, exact), rel=1e-3)
    assert error_bound(alike[:1], exact[:1]) == output_error(alike[:1], exact[:1])
    assert error_bound(exact, exact) == 0
    held = 0
    for _ in range(200):
        wanted = rng.standard_normal((400, 1))
        found = wanted + 0.1 * rng.standard_normal((400, 1))
        held += error_bound(found[:8], wanted[:8]) >= output_error(found[8:], wanted[8:])
    # The spread of the outputs, too, is taken from the few.
    assert held > 150
    codes = [np.array([0, 0]), np.array([0, 1]), np.array([1, 1])]
    assert output_error(codes, [np.zeros(2, "int64")] * 3) < error_bound(codes, [np.zeros(2, "int64")] * 3) <= 1
