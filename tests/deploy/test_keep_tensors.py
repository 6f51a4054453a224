"""Tensors at one place are one object; what a network computes stays."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax, topi
from tvm.script import tirx as T

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.keep_tensors import KeepTensors
from nnfuze_tvm.graph.dataflow import bindings, op_name

LAYERS = 6


@T.prim_func(private=True, s_tir=True)
def double(x: T.Buffer((4, 4), "float32")) -> None:
    T.func_attr({"tirx.noalias": True})
    for i, j in T.grid(4, 4):
        with T.sblock("double"):
            row, column = T.axis.remap("SS", [i, j])
            x[row, column] = x[row, column] * T.float32(2)


def network() -> tvm.IRModule:
    """Return products in a row, of which the first and the last two are outputs."""
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    weights = relax.const(np.random.default_rng(0).standard_normal((4, 4)).astype("float32"))
    builder = relax.BlockBuilder()
    with builder.function("main", [x]):
        with builder.dataflow():
            values = [x]
            for _ in range(LAYERS):
                values.append(builder.emit(relax.op.matmul(values[-1], weights)))
            result = builder.emit_output(relax.Tuple([values[1], *values[-2:]]))
        builder.emit_func_output(result)
    return builder.get()


def test_one_object_for_one_place() -> None:
    target = tvm.target.Target("llvm")
    data = np.random.default_rng(1).standard_normal((4, 4)).astype("float32")
    usual = relax.get_pipeline("default_build")
    answers, counts = [], []
    for passes in ([usual], [usual, KeepTensors()]):
        with target:
            main = tvm.transform.Sequential(passes)(network())["main"]
        counts.append([op_name(binding.value) for binding in bindings(main)])
        pipeline = tvm.transform.Sequential(passes)
        executable = relax.build(network(), target, relax_pipeline=pipeline, exec_mode="compiled")
        machine = relax.VirtualMachine(executable, tvm.cpu())
        runs = [machine["main"](tvm.runtime.tensor(data)) for _ in range(2)]
        answers.append([field.numpy() for run in runs for field in run])
    np.testing.assert_array_equal(*answers)
    before, after = ([names.count(f"vm.{kind}") for kind in ("alloc_tensor", "kill_object")] for names in counts)
    assert before[0] == LAYERS
    assert after[0] < before[0]
    assert after[1] == 0 < before[1]


def test_what_is_computed_in_place_is_the_same_object() -> None:
    x = relax.Var("x", relax.TensorType((4, 4), "float32"))
    builder = relax.BlockBuilder()
    kernel = builder.add_func(double, "double")
    with builder.function("main", [x]):
        with builder.dataflow():
            value = builder.emit(builder.call_te(topi.add, x, x))
            for _ in range(LAYERS):
                value = builder.emit(relax.op.call_tir_inplace(kernel, [value], [0], x.ty))
            result = builder.emit_output(relax.Tuple([value]))
        builder.emit_func_output(result)
    target = tvm.target.Target("llvm")
    keeping = build._calling()
    without = [each for each in keeping if not isinstance(each, KeepTensors)]
    counts = []
    for passes in (without, keeping):
        with target:
            main = tvm.transform.Sequential(passes)(builder.get())["main"]
        counts.append(sum(isinstance(binding.value, tvm.ir.Var) for binding in bindings(main)))
    assert counts[0] >= LAYERS and counts[1] == 0
    machine = relax.VirtualMachine(build.generate(builder.get(), target), tvm.cpu())
    data = np.random.default_rng(1).standard_normal((4, 4)).astype("float32")
    (got,) = machine["main"](tvm.runtime.tensor(data))
    np.testing.assert_array_equal(got.numpy(), data * 2 ** (LAYERS + 1))
