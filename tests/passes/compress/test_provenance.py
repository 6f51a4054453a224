"""Layers that a pass makes obey what the policy says of the layers that they were made out of."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm import graph
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.errors import PolicyError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name, output_fields, substitute, with_main
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.batching.batch_branches import BatchBranches
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk


def dense(emitter, data, width, name, seed):
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((ir.static_shape(data)[1], width)).astype("float32")
    return emitter.emit(relax.op.matmul(data, constant(weight)), name)


def network(*heads, trunks=("t/trunk/Gemm",)):
    """Return a module of equal trunks, one per name, and a head behind each (or behind the only one)."""
    emitter = Emitter()
    x = relax.Var("x", relax.TensorType((1, 16), "float32"))
    ends = [emitter.emit(relax.op.nn.relu(dense(emitter, x, 16, name, 0))) for name in trunks]
    ends = ends * (len(heads) // len(ends))
    outputs = [dense(emitter, end, 8, name, k) for k, (end, name) in enumerate(zip(ends, heads, strict=True), 1)]
    main = emitter.finish([x], outputs).with_attr("global_symbol", "main")
    mod = tvm.IRModule({"main": main})
    return ir.with_task_outputs(mod, [ir.TaskOutput(name.split("/")[0], "y") for name in heads])


def split(mod, suffixes=(".thin", ".wide")):
    """Make two matrix products of rank 4 of every one, both under new names, as a pass of low rank does."""
    func, emitter, done, made = mod["main"], Emitter(), {}, []
    for binding in bindings(func):
        value, name = substitute(binding.value, done), binding.var.name
        if op_name(value) == "matmul":
            left, values, right = np.linalg.svd(array(value.args[1]), full_matrices=False)
            first = emitter.emit(relax.op.matmul(value.args[0], constant(left[:, :4] * values[:4])), name + suffixes[0])
            value = relax.op.matmul(first, constant(right[:4]))
            done[binding.var] = emitter.emit(value, name + suffixes[1])
            made += [(first.name, name), (done[binding.var].name, name)]
        else:
            done[binding.var] = emitter.emit(value, name)
    mod = with_main(mod, emitter.finish(func.params, [done[out] for out in output_fields(func)], func.attrs))
    for new, origin in made:
        mod = graph.derive(mod, new, origin)
    return mod


def quantized(mod, policy):
    samples = {"x": np.random.default_rng(9).standard_normal((8, 16)).astype("float32")}
    return {layer.name for layer in metrics.layers(InsertQDQ(samples, policy)(mod)) if layer.integer}


TRUNK = {"t/trunk/Gemm.thin", "t/trunk/Gemm.wide"}
HEAD = {"t/head/Gemm.thin", "t/head/Gemm.wide"}


@pytest.mark.parametrize("entry", ["*/head/Gemm", "t/head/Gemm", "t/head/*"])
def test_made_layers_stay_float_as_their_origin_does(entry):
    mod = split(network("t/head/Gemm"))
    policy = Policy.parse({"default": {"bits": 8}, "layers": {entry: {"bits": 32}}})
    policy.validate_layers([layer.name for layer in metrics.layers(mod)], graph.lineage(mod))
    assert quantized(mod, policy) == TRUNK
    opposite = Policy.parse({"layers": {entry: {"bits": 8}, "*.thin": {"bits": 32}}})
    assert quantized(mod, opposite) == HEAD, "a pattern must not mean a name that only a pass knows"


def test_float16_and_keep_follow_too():
    mod = split(network("t/head/Gemm"))
    policy = Policy.parse({"layers": {"*/head/Gemm": {"bits": 16, "keep": 0.5}}})
    half = HalfPrecision(policy)(mod)["main"]
    assert {b.var.name for b in bindings(half) if str(b.var.ty.dtype) == "float16"} >= HEAD
    lineage = graph.lineage(mod)
    assert policy.for_layer("t/head/Gemm.thin", lineage).keep == 0.5
    assert policy.states("t/head/Gemm.thin", "keep", lineage) and not policy.states(
        "t/trunk/Gemm.wide", "keep", lineage
    )


def test_of_layers_that_were_made_of_made_layers():
    mod = split(split(network("t/head/Gemm")), (".a", ".b"))
    names = {layer.name for layer in metrics.layers(mod)}
    assert len(names) == 8
    policy = Policy.parse({"default": {"bits": 8}, "layers": {"*/head/Gemm": {"bits": 32}}})
    assert quantized(mod, policy) == {name for name in names if "trunk" in name}


def test_a_name_that_only_a_pass_knows_is_no_layer():
    mod = split(network("t/head/Gemm"))
    policy = Policy.parse({"layers": {"t/head/Gemm.thin": {"bits": 32}}})
    with pytest.raises(PolicyError, match=r"unknown layer 't/head/Gemm\.thin'; nearest: t/head/Gemm"):
        policy.validate_layers([layer.name for layer in metrics.layers(mod)], graph.lineage(mod))


def test_through_a_shared_trunk():
    """The trunk of the second task is dropped; what is said of it holds for what the first one's is split into."""
    mod = ShareTrunk()(network("a/head/Gemm", "b/head/Gemm", trunks=("a/trunk/Gemm", "b/trunk/Gemm")))
    assert ir.aliases(mod) == {"b/trunk/Gemm": "a/trunk/Gemm"}
    mod = split(mod)
    assert graph.lineage(mod).names("a/trunk/Gemm.wide") == ["a/trunk/Gemm", "b/trunk/Gemm"]
    policy = Policy.parse({"layers": {"b/trunk/*": {"bits": 8}}})
    policy.validate_layers([layer.name for layer in metrics.layers(mod)], graph.lineage(mod))
    assert quantized(mod, policy) == {"a/trunk/Gemm.thin", "a/trunk/Gemm.wide"}


def test_through_batched_branches():
    """Made layers of two tasks in one kernel stand for both tasks' layers."""
    mod = BatchBranches()(split(network("a/head/Gemm", "b/head/Gemm")))
    assert set(ir.aliases(mod)) >= {"b/head/Gemm.thin"}
    lineage = graph.lineage(mod)
    assert lineage.names("a/head/Gemm.thin") == ["a/head/Gemm", "b/head/Gemm"]
    policy = Policy.parse({"default": {"bits": 8}, "layers": {"b/head/Gemm": {"bits": 32}}})
    assert policy.for_layer("a/head/Gemm.thin", lineage).weights == 32
    made = Policy.parse({"layers": {"b/head/Gemm.thin": {"bits": 32}}})
    with pytest.raises(PolicyError, match="unknown layer"):
        made.validate_layers([layer.name for layer in metrics.layers(mod)], lineage)
