"""Kernels that skip blocks of weights: sums of integers are the same bits as NumPy's, on every class of targets."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import block_sparsity
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate, executor
from nnfuze_tvm.passes.lower.skip_blocks import SkipBlocks
from tests.schedules import kernels

HOST = resolve("host")
# Kernel, strides, padding, dilation.
CASES = {
    "dense": None,
    "1x1": ((1, 1), {}),
    "3x3": ((3, 3), {"padding": [1, 1, 1, 1]}),
    "strided": ((3, 3), {"padding": [1, 0, 0, 1], "strides": [2, 1]}),
    "dilated": ((3, 3), {"padding": [2, 2, 2, 2], "dilation": [2, 2]}),
}


def network(kind: str, dtype: str, sparsity: float, outputs: int = 32, inputs: int = 48) -> tvm.IRModule:
    """Return a layer with weights of which such a part of the blocks is zero, a bias, and a bound."""
    rng, whole = np.random.default_rng(0), dtype != "float32"
    kernel = () if kind == "dense" else CASES[kind][0]
    shape = (1, outputs, inputs, *kernel)
    weights = rng.integers(-127, 128, shape) if whole else rng.standard_normal(shape)
    weights = weights.astype("int8" if whole else "float32")
    stay = max(1, round((1 - sparsity) * inputs / block_sparsity.INPUTS))
    count = inputs // block_sparsity.INPUTS
    kept = np.stack([np.sort(rng.permutation(count)[:stay]) for _ in range(outputs // block_sparsity.OUTPUTS)])
    own = block_sparsity.of_rows(block_sparsity.in_rows(weights, kept), kept, inputs)[0]
    out = "int32" if whole else "float32"
    bias = relax.const(rng.integers(-99, 99, outputs).astype(out))

    def body(builder, values):
        if kind == "dense":
            sums = op.matmul(values[0], relax.const(own.T.copy()), out_dtype=out)
        else:
            attrs = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": out, **CASES[kind][1]}
            sums = op.nn.conv2d(values[0], relax.const(own.transpose(0, 2, 3, 1).copy()), **attrs)
        return builder.emit(op.maximum(builder.emit(op.add(builder.emit(sums), bias)), relax.const(np.array(-5, out))))

    return kernels.single_function({"x": ((3, inputs) if kind == "dense" else (1, 7, 9, inputs), dtype)}, body)


def data(dtype: str, shape: tuple[int, ...]) -> np.ndarray:
    rng = np.random.default_rng(1)
    if dtype == "float32":
        return rng.standard_normal(shape).astype(dtype)
    return rng.integers(*{"uint8": (0, 128), "int8": (-128, 128)}[dtype], shape).astype(dtype)


def skipping(mod: tvm.IRModule, target: tvm.target.Target = HOST) -> tvm.IRModule:
    """Return the module whose layer skips blocks, whatever that costs."""
    return SkipBlocks(lambda work, block=None: work.products, unsigned=build.machine(target).unsigned)(mod)


@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8"])
@pytest.mark.parametrize("kind", CASES)
def test_results_are_those_of_the_whole_weights(kind: str, dtype: str) -> None:
    mod = network(kind, dtype, 0.75)
    x = data(dtype, tuple(int(size) for size in mod["main"].params[0].ty.shape.values))
    got = kernels.schedule_and_run(skipping(mod), HOST, {"x": x})
    (want,) = evaluate(mod["main"], {"x": x})
    assert "sparse" in got.rules.values() and "fallback" not in got.rules.values()
    if dtype == "float32":
        np.testing.assert_allclose(got.outputs[0], want, atol=1e-4 * np.abs(want).max())
    else:
        np.testing.assert_array_equal(got.outputs[0], want)


@given(
    sparsity=st.floats(0.05, 0.99),
    outputs=st.integers(1, 4),
    inputs=st.integers(2, 9),
    dtype=st.sampled_from(["uint8", "int8"]),
    kind=st.sampled_from(sorted(CASES)),
)
@settings(max_examples=6, deadline=None)
def test_integers_of_any_shape_are_the_same_bits(sparsity, outputs, inputs, dtype, kind) -> None:
    mod = network(kind, dtype, sparsity, outputs * block_sparsity.OUTPUTS, inputs * block_sparsity.INPUTS)
    x = data(dtype, tuple(int(size) for size in mod["main"].params[0].ty.shape.values))
    got = kernels.schedule_and_run(skipping(mod), HOST, {"x": x})
    np.testing.assert_array_equal(got.outputs[0], evaluate(mod["main"], {"x": x})[0])


@pytest.mark.parametrize("target", ["x86-64-v3", "aarch64", "aarch64+dotprod", "aarch64+i8mm", "armv7"])
@pytest.mark.parametrize("dtype", ["float32", "uint8", "int8"])
def test_every_class_of_targets_has_a_kernel(dtype: str, target: str) -> None:
    lowered = build.lower(network("3x3", dtype, 0.9), resolve(target))
    rules = [str(func.attrs["nnfuze.rule"]) for func in lowered.functions.values() if "nnfuze.rule" in func.attrs]
    assert "sparse" in rules and "fallback" not in rules


def test_what_does_not_pay_stays() -> None:
    def calls(mod: tvm.IRModule) -> list[str]:
        return [op_name(b.value) for b in bindings(mod["main"])]

    mod = network("3x3", "float32", 0.5)
    assert "nn.conv2d" in calls(SkipBlocks(lambda work, block=None: 2.5 if block else 2.0)(mod))
    assert "call_tir" in calls(SkipBlocks(lambda work, block=None: 1.5 if block else 2.0)(mod))
    # Another kernel that multiplies less is the measure then.
    assert "nn.conv2d" in calls(SkipBlocks(lambda work, block=None: 1.5 if block else 2.0, lambda _: 0.5)(mod))


def test_unscheduled_kernels_say_the_same() -> None:
    mod = network("3x3", "float32", 0.75)
    x = data("float32", (1, 7, 9, 48))
    (want,), (got,) = evaluate(mod["main"], {"x": x}), executor(skipping(mod))({"x": x})
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())
