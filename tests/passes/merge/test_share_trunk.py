"""ShareTrunk: what is computed twice is computed once, and nothing else changes."""

from __future__ import annotations

import numpy as np
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R

from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk
from tests.helpers import evaluate_module


def weight(seed, *shape):
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")


def chain(task, seeds, width=4):
    """A function of dense layers, one per seed: equal seeds are equal weights."""
    emitter = dataflow.Emitter()
    x = value = tvm.ir.Var("x", relax.TensorType([1, width], "float32"))
    for index, seed in enumerate(seeds):
        value = emitter.emit(relax.op.matmul(value, relax.const(weight(seed, width, width))), f"{task}/{index}")
        value = emitter.emit(relax.op.nn.relu(value))
    return emitter.finish([x], [value]).with_attr("global_symbol", task)


def module(**tasks):
    mod = tvm.IRModule({task: chain(task, seeds) for task, seeds in tasks.items()})
    return MergeTasks()(ir.with_task_outputs(mod, [ir.TaskOutput(task, "y") for task in tasks]))


def layers(mod):
    return [
        binding.var.name for binding in dataflow.bindings(mod["main"]) if dataflow.op_name(binding.value) == "matmul"
    ]


def test_golden():
    one, two = relax.const(weight(0, 2, 2)), relax.const(weight(1, 2, 2))

    @I.ir_module
    class Before:
        @R.function
        def main(x: R.Tensor((1, 2), "float32")):
            with R.dataflow():
                a = R.nn.relu(x)
                b = R.matmul(a, one)
                c = R.nn.relu(x)
                d = R.matmul(c, one)
                e = R.matmul(d, two)
                f = R.split(e, 2, axis=1)
                g = R.split(e, 2, axis=1)
                h = R.add(f[0], g[1])
                R.output(b, d, h)
            return (b, d, h)

    @I.ir_module
    class After:
        @R.function
        def main(x: R.Tensor((1, 2), "float32")):
            with R.dataflow():
                a = R.nn.relu(x)
                b = R.matmul(a, one)
                e = R.matmul(b, two)
                f = R.split(e, 2, axis=1)
                f0 = f[0]
                f1 = f[1]
                h = R.add(f0, f1)
                R.output(b, h)
            return (b, b, h)

    tvm.ir.assert_structural_equal(ShareTrunk()(Before)["main"], After["main"])


def test_tree_of_tasks():
    mod = ShareTrunk()(module(a=[0, 1, 2], b=[0, 1, 3], c=[0, 4, 3], d=[5, 1, 2]))
    assert layers(mod) == ["a/0", "a/1", "a/2", "b/2", "c/1", "c/2", "d/0", "d/1", "d/2"]
    assert ir.aliases(mod) == {"b/0": "a/0", "b/1": "a/1", "c/0": "a/0"}
    relax.analysis.well_formed(mod)


def test_equal_constants_are_stored_once():
    mod = ShareTrunk()(module(a=[0, 1], b=[1, 0]))
    assert len(layers(mod)) == 4
    constants = [b.value.args[1] for b in dataflow.bindings(mod["main"]) if "/" in b.var.name]
    assert constants[0].same_as(constants[3]) and constants[1].same_as(constants[2])


def test_a_last_bit_counts():
    x = tvm.ir.Var("x", relax.TensorType([1, 2], "float32"))
    emitter = dataflow.Emitter()
    zeros = np.zeros((1, 2), "float32")
    values = [zeros, -zeros, zeros.astype("int32").view("float32"), zeros[0]]
    outputs = [emitter.emit(relax.op.add(x, relax.const(value))) for value in values]
    mod = ShareTrunk()(tvm.IRModule({"main": emitter.finish([x], outputs)}))
    fields = dataflow.output_fields(mod["main"])
    assert fields[0].same_as(fields[2])
    assert len({field.name for field in fields}) == 3


def test_attributes_count():
    x = tvm.ir.Var("x", relax.TensorType([1, 2, 5, 5], "float32"))
    kernel = relax.const(weight(0, 2, 2, 3, 3))
    emitter = dataflow.Emitter()
    outputs = [
        emitter.emit(relax.op.nn.conv2d(x, kernel, padding=padding, strides=strides))
        for padding, strides in ((0, 1), (1, 1), (0, 2), (0, 1))
    ]
    outputs.append(emitter.emit(relax.op.sum(x, axis=1)))
    outputs.append(emitter.emit(relax.op.sum(x, axis=1, keepdims=True)))
    mod = ShareTrunk()(tvm.IRModule({"main": emitter.finish([x], outputs)}))
    assert len({field.name for field in dataflow.output_fields(mod["main"])}) == 5


def test_random_and_opaque_calls_stay():
    ty = relax.TensorType([2], "float32")
    x = tvm.ir.Var("x", ty)
    emitter = dataflow.Emitter()
    outputs = [emitter.emit(relax.op.call_pure_packed("noise", x, ty_args=ty)) for _ in range(2)]
    outputs += [emitter.emit(relax.op.nn.dropout(x, 0.5)) for _ in range(2)]
    mod = ShareTrunk()(tvm.IRModule({"main": emitter.finish([x], outputs)}))
    assert len(dataflow.bindings(mod["main"])) == 4


def test_twice_is_once():
    mod = ShareTrunk()(module(a=[0, 1, 2], b=[0, 1, 3]))
    again = ShareTrunk()(mod)
    tvm.ir.assert_structural_equal(mod, again)
    assert ir.aliases(again) == ir.aliases(mod)


def distinct_prefixes(tasks):
    return len({tuple(seeds[: depth + 1]) for seeds in tasks for depth in range(len(seeds))})


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=4), min_size=2, max_size=8))
def test_shares_exactly_the_common_prefixes(seeds):
    """Chains from one input are a tree of prefixes: as many kernels must be left as the tree has nodes."""
    before = module(**{f"t{index}": chosen for index, chosen in enumerate(seeds)})
    after = ShareTrunk()(before)
    relax.analysis.well_formed(after)
    assert len(layers(after)) == distinct_prefixes(seeds)
    assert set(ir.aliases(after)) == set(layers(before)) - set(layers(after))
    assert ir.task_outputs(after) == ir.task_outputs(before)


@settings(max_examples=20)
@given(st.lists(st.lists(st.integers(0, 1), min_size=1, max_size=3), min_size=2, max_size=4))
def test_values_do_not_change(seeds):
    before = module(**{f"t{index}": chosen for index, chosen in enumerate(seeds)})
    x = weight(99, 1, 4)
    for left, right in zip(
        evaluate_module(before, {"x": x}), evaluate_module(ShareTrunk()(before), {"x": x}), strict=True
    ):
        np.testing.assert_array_equal(left, right)
