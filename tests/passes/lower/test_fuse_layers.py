"""FuseLayers: what FuseOps makes, and every call named after the layers that it computes."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.passes.lower.fuse_layers import FuseLayers
from tests.helpers import run_module

WIDTH = 4


def weight(seed):
    return np.random.default_rng(seed).standard_normal((WIDTH, WIDTH)).astype("float32")


def network():
    """Dense layers with equal shapes, and products of two of their results; one is computed twice."""
    emitter = dataflow.Emitter()
    x = value = tvm.ir.Var("x", relax.TensorType([WIDTH, WIDTH], "float32"))
    for n in range(3):
        left = emitter.emit(relax.op.nn.relu(emitter.emit(relax.op.matmul(value, relax.const(weight(n))), f"t/l{n}")))
        right = emitter.emit(relax.op.nn.relu(emitter.emit(relax.op.matmul(left, relax.const(weight(9))), f"t/r{n}")))
        value = emitter.emit(relax.op.matmul(left, right), f"t/product{n}")
    again = emitter.emit(relax.op.exp(x), "lv")
    once_more = emitter.emit(relax.op.exp(x), "lv")
    main = emitter.finish([x], [value, again, once_more]).with_attr("global_symbol", "main")
    return ir.with_task_outputs(tvm.IRModule({"main": main}), [ir.TaskOutput("t", name) for name in "yab"])


def fused(last):
    phases = [relax.transform.LegalizeOps(), relax.transform.AnnotateTIROpPattern(), last]
    return tvm.transform.Sequential(phases)(network())


def test_every_call_has_its_own_layers_name():
    main = fused(FuseLayers())["main"]
    calls = {b.var.name: b.value for b in dataflow.bindings(main) if ir.layers_of(b.var)}
    assert list(calls) == [f"t/{name}{n}" for n in range(3) for name in ("l", "r", "product")]
    for n in range(3):
        for name, seed in ((f"t/l{n}", n), (f"t/r{n}", 9)):
            (constant,) = (arg for arg in calls[name].args if isinstance(arg, tvm.ir.GenericConst))
            np.testing.assert_array_equal(constant.value.numpy(), weight(seed))
    assert len({str(calls[f"t/l{n}"].op) for n in range(3)}) == 1, "one function for layers of one shape"


def test_only_names_change():
    ours, plain = fused(FuseLayers()), fused(relax.transform.FuseOps())
    tvm.ir.assert_structural_equal(ours, plain)
    x = {"x": np.random.default_rng(5).standard_normal((WIDTH, WIDTH)).astype("float32")}
    for got, expected in zip(run_module(ours, x), run_module(network(), x), strict=True):
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-4)


def test_kernels_know_their_layers_in_the_end():
    kernels = metrics.kernels(build.lower(network(), resolve("host")))
    found = [layer for kernel in kernels for layer in kernel.layers]
    assert sorted(found) == sorted(f"t/{name}{n}" for n in range(3) for name in ("l", "r", "product"))
    for kernel in kernels:
        assert not kernel.layers or len(kernel.layers) == kernel.calls
