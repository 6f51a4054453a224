from __future__ import annotations

import math
from collections import Counter

import numpy as np
import pytest
from tvm import relax

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.simplify.fuse_gelu import FuseGelu
from tests.helpers import evaluate_module

OP = relax.op
ROOT_2 = math.sqrt(2)


def const(value):
    return relax.const(np.float32(value))


def module(build):
    block = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((3, 17), "float32"))
    with block.function("main", [x]):
        with block.dataflow():
            out = block.emit_output(relax.Tuple(build(block.emit, x)))
        block.emit_func_output(out)
    return block.get().with_attr("nnfuze.outputs", ["t:y"])


def gate(emit, x, root=ROOT_2, one=1.0):
    return emit(OP.add(emit(OP.erf(emit(OP.divide(x, const(root))))), const(one)))


def gate_by_product(emit, x):
    return emit(OP.add(const(1.0), emit(OP.erf(emit(OP.multiply(const(math.sqrt(0.5)), x))))))


def of_a_product(emit, x):
    y = emit(OP.multiply(emit(OP.multiply(x, x)), const(3.0)))
    return [emit(OP.multiply(emit(OP.multiply(y, gate(emit, y))), const(0.5)))]


WRITTEN = {
    "half_last": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(x, gate(emit, x))), const(0.5)))],
    "half_first": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(x, const(0.5))), gate_by_product(emit, x)))],
    "half_at_the_gate": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(const(0.5), gate(emit, x))), x))],
    "by_two": lambda emit, x: [emit(OP.divide(emit(OP.multiply(gate(emit, x), x)), const(2.0)))],
    "of_a_product": of_a_product,
}

ALMOST = {
    "other_root": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(x, gate(emit, x, 1.5))), const(0.5)))],
    "other_half": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(x, gate(emit, x))), const(0.6)))],
    "other_one": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(x, gate(emit, x, one=2.0))), const(0.5)))],
    "no_x": lambda emit, x: [emit(OP.multiply(gate(emit, x), const(0.5)))],
    "other_x": lambda emit, x: [emit(OP.multiply(emit(OP.multiply(emit(OP.nn.relu(x)), gate(emit, x))), const(0.5)))],
    "x_squared": lambda emit, x: [
        emit(OP.multiply(emit(OP.multiply(emit(OP.multiply(x, x)), gate(emit, x))), const(0.5)))
    ],
}


def check(mod):
    x = (np.random.default_rng(0).standard_normal((3, 17)) * 3).astype("float32")
    new = FuseGelu()(mod)
    relax.analysis.well_formed(new)
    assert list(new.attrs["nnfuze.outputs"]) == ["t:y"]
    for got, want in zip(evaluate_module(new, {"x": x}), evaluate_module(mod, {"x": x}), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    return Counter(op_name(b.value) for b in bindings(new["main"]))


@pytest.mark.parametrize("name", WRITTEN)
def test_every_way_to_write_it(name):
    ops = check(module(WRITTEN[name]))
    assert ops["nn.gelu"] == 1
    assert ops["erf"] == ops["add"] == ops["divide"] == 0


@pytest.mark.parametrize("name", ALMOST)
def test_what_only_looks_like_it_stays(name):
    assert check(module(ALMOST[name]))["nn.gelu"] == 0


def test_what_others_read_is_still_computed():
    def build(emit, x):
        half_open = emit(OP.multiply(x, gate(emit, x)))
        return [emit(OP.multiply(half_open, const(0.5))), half_open]

    ops = check(module(build))
    assert ops["nn.gelu"] == ops["erf"] == 1
