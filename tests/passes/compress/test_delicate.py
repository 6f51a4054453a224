"""What 8 bits on a linear scale can't hold stays float: what goes into logarithms, roots and quotients."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.script import relax as R

from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name, operands
from nnfuze_tvm.passes.compress.delicate import Delicate
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.helpers import evaluate_module


class Network:
    """Builds a network of dense layers over ``[1, 8]``."""

    def __init__(self):
        self.rng = np.random.default_rng(0)
        self.emitter = Emitter()
        self.x = relax.Var("x", R.Tensor((1, 8), "float32"))

    def __call__(self, value):
        return self.emitter.emit(value)

    def layer(self, data, name, bias=False, positive=False):
        weight = self.rng.standard_normal((8, 8)).astype("float32")
        y = self.emitter.emit(op.matmul(data, relax.const(np.abs(weight) if positive else weight)), f"t/{name}")
        return self(op.add(y, relax.const(self.rng.standard_normal(8).astype("float32")))) if bias else y

    def module(self, *outputs):
        func = self.emitter.finish([self.x], outputs).with_attr("global_symbol", "main")
        mod = tvm.IRModule({"main": func})
        return ir.with_task_outputs(mod, [ir.TaskOutput("t", f"y{k}") for k in range(len(outputs))])

    def samples(self):
        return {"x": self.rng.standard_normal((4, 8)).astype("float32")}

    def quantized(self, *outputs):
        mod = self.module(*outputs)
        return InsertQDQ(self.samples(), Policy.uniform(bits=8))(mod)


def number(value):
    return relax.const(np.float32(value))


def square(x):
    return op.multiply(x, x)


def positive(x):
    return op.add(square(x), number(1e-6))


STEEP = {
    "log": op.log,
    "log of a power": lambda x: op.log(positive(x)),
    "log of a bounded value": lambda x: op.log(op.maximum(x, number(1e-5))),
    "sqrt": lambda x: op.sqrt(op.nn.relu(x)),
    "power": lambda x: op.power(op.abs(x), number(0.3)),
    "divide": lambda x: op.divide(number(1.0), x),
    "rsqrt": op.rsqrt,
    "atan2": lambda x: op.atan2(x, number(1.0)),
    "log of a sum": lambda x: op.log(op.sum(positive(x), -1)),
    "log of a root": lambda x: op.log(op.sqrt(positive(x))),
    "log of a part": lambda x: op.log(op.strided_slice(op.concat([x, x], 1), [1], [2], [9])),
}
EVEN = {
    "magnitude": lambda x: op.sqrt(op.sum(square(x), -1)),
    "sigmoid": op.sigmoid,
    "softmax": op.nn.softmax,
    "log of a softmax": lambda x: op.log(op.nn.softmax(x)),
    "log of exp": lambda x: op.log(op.add(op.exp(x), number(1.0))),
    "silu": lambda x: op.multiply(x, op.sigmoid(x)),
    "normalized": lambda x: op.divide(x, op.sqrt(op.mean(positive(x), -1, keepdims=True))),
    "scaled": lambda x: op.divide(x, number(3.0)),
    "cube": lambda x: op.power(x, number(3.0)),
}


@pytest.mark.parametrize("name", [*STEEP, *EVEN])
def test_what_follows_a_layer_decides(name):
    network = Network()
    y = network({**STEEP, **EVEN}[name](network.layer(network.x, "a")))
    mod = network.module(y)
    layer = next(b.var for b in bindings(mod["main"]) if b.var.name == "t/a")
    assert (layer in Delicate(mod["main"]).causes) == (name in STEEP)


@settings(max_examples=25, deadline=None)
@given(st.lists(st.sampled_from([0.25, 0.5, 2.0, 3.0, -1.0]), min_size=1, max_size=3))
def test_degrees_multiply(exponents):
    network = Network()
    y = network.layer(network.x, "a")
    layer = y
    for exponent in exponents:
        y = network(op.power(y, number(exponent)))
    assert (layer in Delicate(network.module(y)["main"]).causes) == (np.prod(exponents) < 1)


def test_a_spectrogram_in_the_network_stays_float():
    network = Network()
    real, imaginary = (network.layer(network.x, name) for name in ("real", "imaginary"))
    power = network(op.add(square(real), square(imaginary)))
    mel = network.layer(power, "mel", positive=True)
    features = network(op.log(op.maximum(mel, number(1e-6))))
    y = network.layer(network(op.nn.relu(network.layer(features, "b", bias=True))), "c", bias=True)
    mod, samples = network.module(y), network.samples()
    result = InsertQDQ(samples, Policy.uniform(bits=8))(mod)
    assert list(ir.float_layers(result)) == ["t/real", "t/imaginary", "t/mel"]
    assert all(reason.startswith("log follows") for reason in ir.float_layers(result).values())
    # The reasons outlive the integers.
    integer = RealizeInteger()(result)
    assert ir.float_layers(integer) == ir.float_layers(result)
    data = {"x": samples["x"][:1]}
    (wanted,), (found,) = evaluate_module(mod, data), evaluate_module(integer, data)
    assert np.abs(found - wanted).max() < 0.1 * np.abs(wanted).max()


def test_the_search_ends_at_learned_layers():
    network = Network()
    inner = network(op.nn.relu(network.layer(network.x, "inner", bias=True)))
    y = network(op.log(positive(network.layer(inner, "last", bias=True))))
    assert list(ir.float_layers(network.quantized(y))) == ["t/last"]


def test_a_mask_reads_what_a_logarithm_reads():
    network = Network()
    spectrum = network.layer(network.x, "transform")
    features = network(op.log(positive(spectrum)))
    mask = network(op.sigmoid(network.layer(features, "mask", bias=True)))
    y = network.layer(network(op.multiply(spectrum, mask)), "back", bias=True)
    result = network.quantized(y)
    assert list(ir.float_layers(result)) == ["t/transform"]
    assert list(ir.float_layers(RealizeInteger()(result))) == ["t/transform"]


def test_a_layer_beside_a_logarithm_reads_8_bits_and_the_logarithm_floats():
    network = Network()
    shared = network(op.reshape(network.layer(network.x, "shared"), (1, 8)))
    logarithm = network(op.log(positive(shared)))
    result = network.quantized(logarithm, network.layer(shared, "beside", bias=True))
    assert list(ir.float_layers(RealizeInteger()(result))) == ["t/shared"]
    by_name = {b.var: b.value for b in bindings(result["main"])}
    squares = [value for value in by_name.values() if op_name(value) == "multiply"]
    assert [op_name(by_name[arg]) for value in squares for arg in value.args] == ["reshape", "reshape"]


SAID = [name for name, operator in ops.OPERATORS.items() if operator.degrees is not None and operator.examples]


@pytest.mark.parametrize("name", SAID)
def test_operators_grow_as_they_say(name):
    operator = ops.OPERATORS[name]
    for example in operator.examples:
        call = example.call(*(relax.Var("x", R.Tensor(shape, "float32")) for shape in example.shapes))
        if len(operands(call)) > 1:
            continue
        (degree,) = ops.degrees(call)
        assert degree is not None
        small = np.linspace(1e-4, 2e-4, int(np.prod(example.shapes[0]))).reshape(example.shapes[0])
        once, tenfold = (operator.evaluate(call, values).astype("float64") for values in (small, small * 10))
        if degree == 0:
            assert np.all(np.abs(tenfold - once) > 1)
        else:
            np.testing.assert_allclose(tenfold / once, 10.0**degree, rtol=0.01)
