"""Biases that give a quantized layer's sums the means that they have in float."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op
from tvm.script import relax as R

from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.dataflow import Emitter
from nnfuze_tvm.passes.compress.bias_correction import _surely
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy

INT8 = Policy.uniform(bits=8)


def network(seed: int, biased: bool = True, layers: int = 3) -> tvm.IRModule:
    """Convolutions and Relus with weights of a few large numbers: 8 bits are coarse for the others."""
    rng, emitter = np.random.default_rng(seed), Emitter()
    x = relax.Var("x", R.Tensor((1, 4, 8, 8), "float32"))
    y = x
    for n in range(layers):
        weight = rng.standard_normal((4, 4, 3, 3)) * 0.05
        weight[:, n % 4, 1, 1] = 4.0
        y = emitter.emit(op.nn.conv2d(y, relax.const(weight.astype("float32")), padding=1), f"t/{n}")
        if biased:
            y = emitter.emit(op.add(y, relax.const(rng.standard_normal((1, 4, 1, 1)).astype("float32"))))
        y = emitter.emit(op.nn.relu(y)) if n < layers - 1 else y
    mod = tvm.IRModule({"main": emitter.finish([x], [y]).with_attr("global_symbol", "main")})
    return ir.with_task_outputs(mod, [ir.TaskOutput("t", "y")])


def offset(mod: tvm.IRModule, exact: tvm.IRModule, samples: np.ndarray) -> np.ndarray:
    """Return by how much the means of the channels are off, ``[channels]``."""
    answers = [np.concatenate([evaluate.executor(m)({"x": s[None]})[0] for s in samples]) for m in (mod, exact)]
    return np.abs((answers[0] - answers[1]).mean((0, 2, 3)))


@pytest.mark.parametrize("biased", [True, False])
def test_the_means_behind_several_layers_are_right(biased):
    mod = network(0, biased)
    samples = np.random.default_rng(1).uniform(0, 1, (16, 4, 8, 8)).astype("float32")
    plain, corrected = (
        offset(InsertQDQ({"x": samples}, INT8, bias_correction=corrects)(mod), mod, samples)
        for corrects in (False, True)
    )
    assert corrected.max() < 0.2 * plain.max()


def test_one_sample_says_nothing_of_a_mean():
    mod = network(0)
    samples = {"x": np.random.default_rng(1).uniform(0, 1, (1, 4, 8, 8)).astype("float32")}
    plain, corrected = (InsertQDQ(samples, INT8, bias_correction=corrects)(mod) for corrects in (False, True))
    tvm.ir.assert_structural_equal(plain["main"], corrected["main"])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.integers(2, 16))
def test_what_is_chance_is_mostly_left(seed, count):
    rng = np.random.default_rng(seed)
    chance = rng.standard_normal((count, 256))
    assert np.square(_surely(chance)).sum() < 0.5 * np.square(chance.mean(0)).sum()
    sure = 10 + chance
    np.testing.assert_allclose(_surely(sure), sure.mean(0), rtol=0.02)
