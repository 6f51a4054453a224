"""The list of methods is what policies, options and stages are built from: one object adds a way of compressing."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.ir.transform import module_pass

from nnfuze_tvm.errors import InputError, PolicyError
from nnfuze_tvm.graph import evaluate, ir, lineage
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name, output_fields, substitute, with_main
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.passes.compress.method import Features, Inputs, Method, Option, PolicyField, Precision
from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy

INT3 = Precision(3, 32, "int")


@module_pass(opt_level=0, name="RoundWeights")
class RoundWeights:
    """Weights of dense layers to fifteen levels per output."""

    def __init__(self, policy):
        self.policy = policy

    def transform_module(self, mod, _):
        func, emitter, done = mod["main"], Emitter(), {}
        for binding in bindings(func):
            value = substitute(binding.value, done)
            wanted = self.policy.for_layer(binding.var.name, lineage(mod)).precision
            if op_name(value) == "matmul" and isinstance(value.args[1], GenericConst) and wanted == INT3:
                weight = array(value.args[1])
                scale = np.abs(weight).max(0) / 7
                value = relax.op.matmul(value.args[0], constant(np.rint(weight / scale) * scale, "float32"))
            done[binding.var] = emitter.emit(value, binding.var.name)
        return with_main(mod, emitter.finish(func.params, [done[out] for out in output_fields(func)], func.attrs))


METHOD = Method(
    name="int3",
    activity="rounding weights",
    passes=lambda inputs: [RoundWeights(inputs.policy)],
    precision=INT3,
    remark="for weights alone",
)


@pytest.fixture
def three_bits(monkeypatch):
    monkeypatch.setattr(pipeline, "METHODS", (*pipeline.METHODS, METHOD))


def network():
    rng = np.random.default_rng(0)
    emitter = Emitter()
    x = relax.Var("x", relax.TensorType((1, 8), "float32"))
    y = emitter.emit(relax.op.matmul(x, constant(rng.standard_normal((8, 8)).astype("float32"))), "t/body")
    y = emitter.emit(relax.op.matmul(y, constant(rng.standard_normal((8, 3)).astype("float32"))), "t/head")
    mod = tvm.IRModule({"main": emitter.finish([x], [y]).with_attr("global_symbol", "main")})
    return ir.with_task_outputs(mod, [ir.TaskOutput("t", "y")])


def stages(mod, policy):
    """Return the stages of a compilation: the module after each method that the policy asks for."""
    layers = [policy.for_layer(b.var.name) for b in bindings(mod["main"])]
    found = {}
    for one in method.asked(pipeline.METHODS, layers):
        mod = tvm.transform.Sequential(one.passes(Inputs(policy)))(mod)
        found[one.name] = mod
    return found


def levels(mod):
    return {
        b.var.name: max(len(np.unique(column)) for column in array(b.value.args[1]).T) for b in bindings(mod["main"])
    }


def test_bits_are_refused_without_a_method():
    with pytest.raises(PolicyError, match=r"'default\.weights' 5: no method takes it; there are 4, 8, 16 and 32"):
        Policy.parse({"default": {"weights": 5}})
    with pytest.raises(PolicyError, match=r"weights 16 with activations 32: no method takes them"):
        Policy.parse({"default": {"weights": 16}}).validate_layers(["t/head"])
    assert "int3" not in str(method_settings.options(pipeline.METHODS)["quantize"].type)


def test_one_object_makes_three_bits_a_policy_value_an_option_and_a_stage(three_bits):
    policy = Policy.parse({"layers": {"*/body": {"weights": 3}}})
    assert policy.for_layer("t/body").precision == INT3
    mod = network()
    assert levels(mod)["t/body"] == 8
    found = stages(mod, policy)
    assert list(found) == ["int3"]
    rounded = array(bindings(found["int3"]["main"])[0].value.args[1])
    exact = array(bindings(mod["main"])[0].value.args[1])
    scale = np.abs(exact).max(0) / 7
    np.testing.assert_allclose(rounded / scale, np.rint(exact / scale), atol=1e-5)
    np.testing.assert_array_equal(*(array(bindings(m["main"])[1].value.args[1]) for m in (mod, found["int3"])))

    option = method_settings.options(pipeline.METHODS)["quantize"]
    assert "'int3'" in str(option.type) and option.help.endswith(", or int3 for weights alone.")
    asked = Policy().with_default(method_settings.settings(pipeline.METHODS, {"quantize": "int3"}))
    assert asked.for_layer("t/head").precision == INT3
    with pytest.raises(PolicyError, match=r"there are .*weights 3 with activations 32 \(int\)"):
        Policy.parse({"default": {"weights": 4, "activations": 16}}).validate_layers(["t/head"])
    with pytest.raises(PolicyError, match=r"'default\.bits' 4: no method takes it; there are 8, 16 and 32"):
        Policy.parse({"default": {"bits": 4}})


def test_a_method_brings_fields_and_options(monkeypatch):
    """Also a field whose values don't combine by the largest, and an option that sets it."""
    depth = PolicyField("depth", int, 0, "how often a layer is split", combine=min)
    option = Option("depth", int, None, "Depth.", sets=lambda value: {"depth": value})
    one = Method(
        "split", "splitting", lambda _: [], wants=lambda layer: layer.depth > 0, fields=(depth,), options=(option,)
    )
    monkeypatch.setattr(pipeline, "METHODS", (one, *pipeline.METHODS))
    policy = Policy.parse({"layers": {"a/x": {"depth": 3}, "b/x": {"depth": 2}}})
    merged = lineage(ir.with_aliases(network(), {"b/x": "a/x"}))
    assert policy.for_layer("a/x", merged).depth == 2
    assert policy.for_layer("a/x") == LayerPolicy(depth=3)
    assert policy.for_layer("c/x").depth == 0
    assert [m.name for m in method.asked(pipeline.METHODS, [LayerPolicy(depth=1, keep=0.5)])] == ["split", "pruned"]
    assert method_settings.settings(pipeline.METHODS, {"depth": 4, "prune": None}) == {"depth": 4}
    with pytest.raises(PolicyError, match=r"'layers\.a\.depth' should be a valid integer"):
        Policy.parse({"layers": {"a": {"depth": "full"}}})
    monkeypatch.setattr(pipeline, "METHODS", (one, *pipeline.METHODS))
    with pytest.raises(ValueError, match="same name"):
        Policy()


def test_what_options_say_of_the_policy():
    settings = method_settings.settings(
        pipeline.METHODS, {"quantize": "int8", "prune": 0.5, "criterion": "l1", "models": ["a"]}
    )
    assert Policy().with_default(settings).for_layer("a") == LayerPolicy(keep=0.5, bits=8)
    assert method_settings.settings(pipeline.METHODS, {"quantize": None, "prune": None}) == {}


@pytest.mark.parametrize(("name", "value"), [("quantize", "int8"), ("criterion", "activation")])
def test_options_that_need_samples(name, value):
    with pytest.raises(InputError, match=rf"^--{name} {value}: needs sample inputs; give --calibration samples.npz$"):
        method_settings.check_samples(pipeline.METHODS, {name: value})
    method_settings.check_samples(pipeline.METHODS, {"quantize": "fp16", "criterion": "l2", "prune": 0.5})


@pytest.mark.parametrize(
    ("values", "line"),
    [
        ({"criterion": "l1"}, "--criterion l1: changes nothing, since no layer is to be pruned; leave it out"),
        ({"quantize": "fp16", "calibration_method": "mse"}, "--calibration-method mse: .* no layer is to be int8"),
        ({"quantize": "int8", "max_error": 0.2}, "--max-error 0.2: changes nothing without --quantize auto"),
        ({"quantize": "int8", "max_error": 0.1, "criterion": None, "calibration_method": "kl"}, ""),
        ({"quantize": "auto", "prune": 0.5, "max_error": 0.2, "criterion": "l1"}, ""),
    ],
)
def test_options_that_nothing_reads(values, line):
    default = {"quantize": None, "prune": None, **values}
    layer = LayerPolicy(
        **{k: v for k, v in method_settings.settings(pipeline.METHODS, default).items() if v is not None}
    )
    asked = method.asked(pipeline.METHODS, [layer])
    with pytest.raises(InputError, match=f"^{line}") if line else contextlib.nullcontext():
        method_settings.check_used(pipeline.METHODS, asked, default)


def test_what_a_method_needs():
    by_name = {one.name: one for one in pipeline.METHODS}
    with pytest.raises(InputError, match=r"^my\.json: asks for 8 bits, which needs sample inputs"):
        by_name["int8"].check_samples("my.json")
    by_name["pruned"].check_samples("my.json")
    with pytest.raises(InputError, match=r"^--target rpi4: this CPU doesn't compute in float16"):
        by_name["fp16"].check_features({"neon"}, "rpi4")
    by_name["fp16"].check_features({"neon", "fullfp16"}, "rpi5")
    two = Features(frozenset({"a", "b"}), "no")
    Method("x", "", lambda _: [], features=two).check_features({"b"}, "y")


def test_the_executor_that_jobs_hand_in_runs_the_network():
    """Once for the ranges of int8, once for the activations that pruning looks at, with the numbers it gave."""
    mod = network()
    samples = {"x": np.random.default_rng(1).standard_normal((4, 8)).astype("float32")}
    policy = Policy.uniform(keep=0.5, bits=8)
    ran = []

    def executor(asked, _count):
        run = evaluate.executor(asked)
        ran.append(asked)
        return lambda batch: [output * 2 for output in run(batch)]

    def through(**given):
        inputs = Inputs(policy, samples, {"criterion": "activation", "calibration_method": "minmax"}, **given)
        asked = method.asked(pipeline.METHODS, [policy.for_layer("t/body")])
        steps = [step for one in asked for step in one.passes(inputs)]
        return tvm.transform.Sequential(steps)(mod)

    doubled, plain = through(executor=executor), through()
    assert len(ran) == 3
    scales = [
        [float(array(b.value.args[1])) for b in bindings(m["main"]) if op_name(b.value) == "quantize"]
        for m in (doubled, plain)
    ]
    np.testing.assert_allclose(np.divide(*scales), [1, 2])
