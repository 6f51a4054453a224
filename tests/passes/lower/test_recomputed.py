"""Chains of fused operators: no value is computed again and again, and what a layer's kernel takes in stays there."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.passes.lower.fuse_layers import FuseLayers
from nnfuze_tvm.passes.lower.recomputed import is_stop, with_stops
from tests.helpers import evaluate_module, run_module

SHAPE = [1, 8, 6, 6]


def number(value):
    return relax.const(value, "float32")


def logistic(x):
    return op.multiply(op.multiply(number(3.7), x), op.subtract(number(1.0), x))


def silu(x):
    return op.multiply(x, op.sigmoid(x))


def chain(step, count, first=lambda x: x, last=lambda x: x):
    emitter = dataflow.Emitter()
    x = tvm.ir.Var("x", relax.TensorType(SHAPE, "float32"))
    value = emitter.emit(first(x))
    for _ in range(count):
        value = emitter.emit(step(value))
    main = emitter.finish([x], [emitter.emit(last(value))]).with_attr("global_symbol", "main")
    return ir.with_task_outputs(tvm.IRModule({"main": main}), [ir.TaskOutput("t", "y")])


def convolution(x):
    weights = np.random.default_rng(3).standard_normal((8, 8, 3, 3)).astype("float32")
    bias = np.linspace(-1, 1, 8, dtype="float32").reshape(1, 8, 1, 1)
    return op.add(op.nn.conv2d(x, relax.const(weights), padding=1), relax.const(bias))


def unfused(mod):
    return tvm.transform.Sequential([relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern()])(mod)


def kernels(mod):
    return len(dataflow.bindings(FuseLayers()(unfused(mod))["main"]))


@pytest.mark.parametrize(("step", "longest"), [(logistic, 12), (silu, 4)])
def test_a_long_chain_is_cut_into_pieces(step, longest):
    assert 24 / longest <= kernels(chain(step, 24)) <= 24, "neither one kernel of all nor many of one step"


def test_the_last_value_of_a_piece_is_what_the_next_one_starts_from():
    marked = with_stops(unfused(chain(logistic, 40)))["main"]
    read = [leaf for b in dataflow.bindings(marked) if not is_stop(b.value) for leaf in dataflow.operands(b.value)]
    stopped = [b.value.args[0] for b in dataflow.bindings(marked) if is_stop(b.value)]
    assert stopped
    assert not any(value.same_as(leaf) for value in stopped for leaf in read), "all that read it read the mark"


@pytest.mark.parametrize("step", [logistic, silu])
def test_a_chain_that_is_cut_computes_the_same(step):
    mod = chain(step, 18)
    x = {"x": np.random.default_rng(4).random(SHAPE).astype("float32")}
    lowered = build.lower(mod, resolve("host"))
    (want,) = evaluate_module(chain(step, 18), x)
    (got,) = run_module(lowered, x)
    # The map is chaotic: what differs in the last bit differs everywhere some steps later, so it must not.
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 if step is logistic else 1e-6)


@pytest.mark.parametrize(
    "last",
    [lambda x: x, lambda x: op.concat([x, x, x, x, x, x, x, x, x], 1), lambda x: op.mean(x, [1])],
    ids=["alone", "joined", "averaged"],
)
@pytest.mark.parametrize("count", [1, 2])
def test_activations_stay_in_the_kernel_of_their_layer(last, count):
    mod = unfused(chain(silu, count, convolution, last))
    assert with_stops(mod) is mod


def test_a_long_sum_is_no_such_chain():
    mod = unfused(chain(lambda x: op.add(op.multiply(x, number(0.9)), number(0.1)), 60))
    assert with_stops(mod) is mod
