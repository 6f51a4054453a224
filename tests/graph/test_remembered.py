"""Remembered: what another function computes alike is not computed again, and all answers are right."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import remembered
from nnfuze_tvm.graph.dataflow import Emitter, op_name, with_values
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.remembered import Remembered


def function():
    """Two branches, a split, and the sum of what comes of them."""
    rng, emitter = np.random.default_rng(0), Emitter()
    x = relax.Var("x", relax.TensorType((2, 6), "float32"))
    weight = relax.const(rng.standard_normal((6, 6)).astype("float32"))
    left = emitter.emit(op.nn.relu(emitter.emit(op.matmul(x, weight), "t/left")))
    parts = emitter.emit(op.split(emitter.emit(op.tanh(x)), 2, axis=1))
    right = emitter.emit(op.concat([relax.TupleGetItem(parts, 1), relax.TupleGetItem(parts, 0)], axis=1))
    return emitter.finish([x], [emitter.emit(op.add(left, right)), right])


@pytest.mark.parametrize(
    ("changed", "computed"),
    [("", 0), ("tanh", 6), ("relu", 2), ("add", 1)],
)
def test_only_what_differs_is_computed(monkeypatch, changed, computed):
    func = function()
    rng = np.random.default_rng(1)
    inputs = [{"x": rng.standard_normal((2, 6)).astype("float32")} for _ in range(2)]
    first = Remembered(tvm.IRModule({"main": func.with_attr("global_symbol", "main")}), inputs)

    def change(value, _, emitter):
        if op_name(value).endswith(changed or "nothing"):
            return op.negative(emitter.emit(value))
        return None

    other = with_values(func, change)
    seen = []

    def counting(*args, known, **options):
        before = len(known)
        result = evaluate(*args, known=known, **options)
        seen.append(len(known) - before)
        return result

    monkeypatch.setattr(remembered, "evaluate", counting)
    answers = first.run(other)
    for arrays, answer, exact in zip(inputs, answers, first.outputs, strict=True):
        for got, want in zip(answer, evaluate(other, arrays), strict=True):
            np.testing.assert_array_equal(got, want)
        assert np.array_equal(answer[0], exact[0]) == (changed == "")
    assert seen == [computed] * 2
