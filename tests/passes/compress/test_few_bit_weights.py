"""FewBitWeights: dense layers of floats whose weights have few bits."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.compress.few_bit_weights import W4, W8, FewBitWeights
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from tests.helpers import evaluate_module
from tests.schedules import kernels


def network(inputs=128, outputs=24):
    """A pointwise convolution, ``conv``, and a dense layer, ``dense``."""
    rng = np.random.default_rng(inputs)
    filters, weights = (rng.standard_normal(shape).astype("float32") for shape in ((4, 2, 1, 1), (inputs, outputs)))

    def body(builder, variables):
        conv = builder.emit(op.nn.conv2d(variables[0], relax.const(filters)), "conv")
        flat = builder.emit(op.reshape(conv, (1, inputs)))
        return relax.Tuple([builder.emit(op.matmul(flat, relax.const(weights)), "dense")])

    mod = kernels.single_function({"x": ((1, 2, 1, inputs // 4), "float32")}, body)
    return mod, {"x": rng.standard_normal((1, 2, 1, inputs // 4)).astype("float32")}


def few_bits(mod, precision, **layers):
    policy = Policy.parse({"default": dict(zip(("weights", "activations"), precision, strict=False)), "layers": layers})
    return FewBitWeights(policy, precision)(mod)


@pytest.mark.parametrize(("precision", "error"), [(W4, 0.15), (W8, 0.01)])
@pytest.mark.parametrize("inputs", [128, 96, 100])
def test_dense_layers_are_near_to_what_they_were(precision, error, inputs):
    mod, data = network(inputs)
    new = few_bits(mod, precision)
    (want,), (got,) = evaluate_module(mod, data), evaluate_module(new, data)
    assert 0 < np.linalg.norm(got - want) < error * np.linalg.norm(want)
    np.testing.assert_allclose(evaluate_module(WeightOnly()(new), data)[0], got, rtol=0, atol=1e-5 * np.abs(got).max())
    assert "call_tir" in {op_name(b.value) for b in bindings(WeightOnly()(new)["main"])}


def test_samples_tell_which_errors_make_up_for_each_other():
    rng = np.random.default_rng(0)
    weights = rng.standard_normal((128, 24)).astype("float32")
    mod = kernels.single_function(
        {"x": ((1, 128), "float32")},
        lambda builder, given: relax.Tuple([builder.emit(op.matmul(given[0], relax.const(weights)), "dense")]),
    )
    mixed = (rng.standard_normal((32, 128)) * np.geomspace(2, 0.1, 128)).astype("float32")
    seen, others = (rng.standard_normal((600, 32)).astype("float32") @ mixed for _ in range(2))
    policy = Policy.uniform(weights=4, activations=32)
    blind, seeing = FewBitWeights(policy, W4)(mod), FewBitWeights(policy, W4, {"x": seen})(mod)
    errors = [
        sum(
            np.linalg.norm(evaluate_module(each, {"x": x[None]})[0] - evaluate_module(mod, {"x": x[None]})[0])
            for x in others[:50]
        )
        for each in (blind, seeing)
    ]
    assert 0 < errors[1] < 0.6 * errors[0]


def test_other_layers_stay_and_say_so():
    mod, _ = network()
    assert ir.float_layers(few_bits(mod, W4)) == {
        "conv": "only dense layers have a form with weights alone of few bits"
    }


def test_what_the_policy_leaves_in_float32_stays():
    mod, data = network()
    new = few_bits(mod, W4, dense={"bits": 32}, conv={"bits": 32})
    np.testing.assert_array_equal(evaluate_module(new, data)[0], evaluate_module(mod, data)[0])
    assert not ir.float_layers(new)
