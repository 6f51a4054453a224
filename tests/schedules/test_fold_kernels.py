"""Kernels of constants run at compile time; the others keep their layers' names."""

import numpy as np
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.schedules.fold_kernels import FoldKernels

WEIGHTS = np.arange(12, dtype="float32").reshape(3, 4)


def module() -> tvm.IRModule:
    """Return ``x + transpose(double(weights))``, the sum bound a second time as ``task/sum``."""

    @I.ir_module(check_well_formed=False, s_tir=True)
    class Module:
        @T.prim_func(private=True, s_tir=True)
        def double(a: T.Buffer((3, 4), "float32"), b: T.Buffer((3, 4), "float32")):
            for i, j in T.grid(3, 4):
                with T.sblock("double"):
                    v, w = T.axis.remap("SS", [i, j])
                    b[v, w] = a[v, w] * T.float32(2)

        @T.prim_func(private=True, s_tir=True)
        def transpose(a: T.Buffer((3, 4), "float32"), b: T.Buffer((4, 3), "float32")):
            for i, j in T.grid(4, 3):
                with T.sblock("transpose"):
                    v, w = T.axis.remap("SS", [i, j])
                    b[v, w] = a[w, v]

        @T.prim_func(private=True, s_tir=True)
        def add(a: T.Buffer((4, 3), "float32"), b: T.Buffer((4, 3), "float32"), c: T.Buffer((4, 3), "float32")):
            for i, j in T.grid(4, 3):
                with T.sblock("add"):
                    v, w = T.axis.remap("SS", [i, j])
                    c[v, w] = a[v, w] + b[v, w]

    builder = relax.BlockBuilder(Module)
    x = relax.Var("x", R.Tensor((4, 3), "float32"))
    kernels = {gvar.name_hint: gvar for gvar in Module.get_global_vars()}

    def call(name: str, args: list, shape: tuple[int, int]) -> relax.Expr:
        return relax.call_tir(kernels[name], args, R.Tensor(shape, "float32"))

    with builder.function("main", [x]):
        with builder.dataflow():
            doubled = builder.emit(call("double", [relax.const(WEIGHTS)], (3, 4)))
            turned = builder.emit(call("transpose", [doubled], (4, 3)))
            total = builder.emit(call("add", [x, turned], (4, 3)))
            named = builder.emit(total, "task_sum")
            out = builder.emit_output(relax.Tuple([named]))
        builder.emit_func_output(out)
    return builder.finalize()


def test_chains_of_kernels_become_one_constant():
    folded = FoldKernels()(module())
    relax.analysis.well_formed(folded)
    (binding,) = (b for b in bindings(folded["main"]) if op_name(b.value) == "call_tir")
    assert binding.value.args[0].name_hint == "add"
    constant = binding.value.args[1].fields[1]
    np.testing.assert_array_equal(constant.value.numpy(), 2 * WEIGHTS.T)


def test_a_result_bound_twice_keeps_the_second_name():
    folded = FoldKernels()(module())
    assert "task_sum" in [b.var.name for b in bindings(folded["main"])]


def test_what_it_computes_stays():
    x = np.random.default_rng(0).standard_normal((4, 3)).astype("float32")
    vm = relax.VirtualMachine(relax.build(FoldKernels()(module()), target="llvm"), tvm.cpu())
    (result,) = vm["main"](tvm.runtime.tensor(x))
    np.testing.assert_array_equal(result.numpy(), x + 2 * WEIGHTS.T)


def test_without_constants_nothing_changes():
    mod = FoldKernels()(module())
    again = FoldKernels()(mod)
    assert [op_name(b.value) for b in bindings(again["main"])] == [op_name(b.value) for b in bindings(mod["main"])]
