"""8 bits in training: the same values from floats that may change, and the way back to codes."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.ir import GenericConst
from tvm.relax import op

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, substitute
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.folding import settled
from nnfuze_tvm.passes.compress.free_weights import with_free_weights
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from tests.helpers import evaluate_module

RNG = np.random.default_rng(0)
IMAGES = RNG.normal(size=(8, 4, 6, 6)).astype("float32")
CONVOLUTIONS = {
    "plain": ((6, 4, 3, 3), {}, op.nn.conv2d),
    "depthwise": ((8, 1, 3, 3), {"groups": 4}, op.nn.conv2d),
    "transposed": ((4, 3, 3, 3), {"groups": 2}, op.nn.conv2d_transpose),
}


def quantized(kind: str = "plain") -> tvm.IRModule:
    """Return a convolution and a dense layer in QDQ form, the first with bias, activation and a residual behind it."""
    shape, attributes, operator = CONVOLUTIONS[kind]
    emitter, x = Emitter(), tvm.ir.Var("x", relax.TensorType((1, *IMAGES.shape[1:]), "float32"))
    weight = relax.const(RNG.normal(size=shape).astype("float32"))
    made: Value = emitter.emit(operator(x, weight, padding=1, **attributes), "conv")
    channels = ir.static_shape(made)[1]
    made = emitter.emit(op.add(made, relax.const(RNG.normal(size=(1, channels, 1, 1)).astype("float32"))))
    made = emitter.emit(op.add(emitter.emit(op.nn.relu(made)), made))
    flat = emitter.emit(op.reshape(made, (1, channels * 36)))
    scores = emitter.emit(op.matmul(flat, relax.const(RNG.normal(size=(channels * 36, 3)).astype("float32"))), "dense")
    func = emitter.finish([x], [emitter.emit(op.add(scores, relax.const(np.ones(3, "float32"))))])
    mod = ir.with_task_outputs(tvm.IRModule({"main": func}), [ir.TaskOutput("task", "scores")])
    return InsertQDQ({"x": IMAGES}, Policy.uniform(bits=8))(mod)


def constants(func: relax.Function) -> list[GenericConst]:
    return [leaf for b in bindings(func) for leaf in operands(b.value) if isinstance(leaf, GenericConst)]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_freed_weights_have_the_values_of_their_codes(kind):
    mod = quantized(kind)
    freed = with_free_weights(mod["main"])
    for image in IMAGES:
        (got,), (want,) = evaluate(freed, {"x": image[None]}), evaluate_module(mod, {"x": image[None]})
        np.testing.assert_allclose(got, want, rtol=1e-6)
    weights = [leaf for leaf in constants(freed) if str(leaf.ty.dtype) == "int8" and array(leaf).ndim > 1]
    assert not weights


@pytest.mark.parametrize("kind", CONVOLUTIONS)
def test_what_is_not_changed_comes_back(kind):
    func = quantized(kind)["main"]
    back = settled(with_free_weights(func))
    assert [op_name(b.value) for b in bindings(back)] == [op_name(b.value) for b in bindings(func)]
    for got, want in zip(constants(back), constants(func), strict=True):
        assert got.ty.dtype == want.ty.dtype
        # A bias is the same number of units; its last bit may differ.
        np.testing.assert_allclose(array(got), array(want), rtol=2e-7)


def test_what_was_learnt_is_codes_and_whole_biases():
    """Weights that left the range stay at its ends, and what the graph in training computes is what comes back."""
    freed = with_free_weights(quantized()["main"])
    emitter, values = Emitter(), dict[Value, Value]()
    for leaf in constants(freed):
        if str(leaf.ty.dtype) == "float32" and array(leaf).size > 6:
            values[leaf] = relax.const(array(leaf) * np.float32(-1.7))
    for binding in bindings(freed):
        values[binding.var] = emitter.emit(substitute(binding.value, values), binding.var.name)
    learnt = emitter.finish(freed.params, [values[binding.var]])
    back = settled(learnt)
    codes = [array(leaf) for leaf in constants(back) if str(leaf.ty.dtype) == "int8" and array(leaf).ndim > 1]
    assert len(codes) == 2 and all((each.min(), each.max()) == (-127, 127) for each in codes)
    for image in IMAGES:
        np.testing.assert_array_equal(*(evaluate(func, {"x": image[None]})[0] for func in (learnt, back)))


def test_a_float_function_stays_as_it_is():
    emitter, x = Emitter(), tvm.ir.Var("x", relax.TensorType((1, 4), "float32"))
    func = emitter.finish([x], [emitter.emit(op.matmul(x, relax.const(np.eye(4, dtype="float32"))), "dense")])
    tvm.ir.assert_structural_equal(settled(with_free_weights(func)), func)
