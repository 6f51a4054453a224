"""Phases apart: equal values whatever the attributes, no more products than there are, and only where it pays."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tvm import relax, tirx
from tvm.relax import op

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.lower.transposed_convolutions import TransposedConvolutions
from tests.graph.calls import calls
from tests.passes.lower.test_transposed_convolutions import AXIS, network, operators
from tests.schedules.kernels import schedule_and_run


def library(mod):
    kernels = {
        gvar.name_hint: func.with_attr("global_symbol", gvar.name_hint)
        for gvar, func in mod.functions_items()
        if isinstance(func, tirx.PrimFunc)
    }
    return tvm.tirx.build(tvm.IRModule(kernels), target="llvm") if kernels else None


def check(mod, inputs):
    """Check that the pass keeps the values and leaves no transposed convolution; return the new module."""
    new = TransposedConvolutions()(mod)
    assert not any("transpose" in name for name in operators(new))
    (want,), (got,) = evaluate(mod["main"], inputs), evaluate(new["main"], inputs, library(new))
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))
    return new


def convolutions(mod):
    return [b.value for b in bindings(mod["main"]) if op_name(b.value).startswith("nn.conv")]


def macs(mod):
    return sum(ops.OPERATORS[op_name(call)].macs(call) for call in convolutions(mod))


@settings(max_examples=40, deadline=None)
@given(axes=st.lists(AXIS, min_size=1, max_size=2), seed=st.integers(0, 99))
def test_any_transposed_convolution_keeps_its_values(axes, seed):
    extents, kernel, strides, dilation, before, after, extra = zip(*axes, strict=True)
    assume(all(e < s for e, s in zip(extra, strides, strict=True)))
    assume(all((n - 1) * s + d * (k - 1) + 1 + e > a + b for n, k, s, d, a, b, e in axes))
    mod, inputs = network(
        np.random.default_rng(seed),
        (2, 70, *extents),
        (70, 16, *kernel),
        lambda builder, value: builder.emit(op.nn.relu(value)),
        strides=strides,
        dilation=dilation,
        padding=(*before, *after),
        output_padding=extra,
    )
    check(mod, inputs)


def three_by_three(channels=64, outputs=32, quantized=False, **attributes):
    def follow(builder, value):
        bias = np.random.default_rng(1).standard_normal((1, outputs, 1, 1)).astype("float32")
        return builder.emit(op.nn.relu(builder.emit(op.add(value, relax.const(bias)))))

    attributes = {"strides": (2, 2), "padding": (1, 1, 1, 1), "output_padding": (1, 1), **attributes}
    shapes = ((1, channels, 7, 6), (channels, outputs, 3, 3))
    return network(np.random.default_rng(0), *shapes, follow, quantized=quantized, **attributes)


def test_three_taps_and_stride_two_are_nine_products():
    """Each phase has its own taps on a grid without a rim, its own bias and activation; then they are interleaved."""
    mod, inputs = three_by_three()
    new = check(mod, inputs)
    assert sorted(tuple(call.args[1].value.shape[2:]) for call in convolutions(new)) == [(1, 1), (1, 2), (2, 1), (2, 2)]
    assert macs(new) == 9 * 64 * 32 * 7 * 6
    names = operators(new)
    assert names.count("add") == names.count("nn.relu") == 4 and names.count("call_tir") == 1
    assert max(i for i, name in enumerate(names) if name == "nn.relu") < names.index("call_tir")


@pytest.mark.parametrize(
    "network",
    [
        three_by_three(channels=8),  # few products: kernels cost more
        three_by_three(outputs=12),  # vectors of a single phase aren't whole
        three_by_three(quantized=True),  # integers are multiplied four at a time
        three_by_three(strides=(3, 3)),  # nine kernels
    ],
    ids=["few inputs", "odd outputs", "int8", "many phases"],
)
def test_where_it_does_not_pay_phases_stay_together(network):
    mod, _ = network
    assert len(convolutions(TransposedConvolutions()(mod))) == 1


@pytest.mark.parametrize("kernel", [(2, 2), (4, 4)])
def test_phases_of_equally_many_taps_stay_together(kernel):
    mod, inputs = network(
        np.random.default_rng(0), (1, 64, 5, 6), (64, 32, *kernel), lambda builder, value: value, strides=(2, 2)
    )
    assert len(convolutions(check(mod, inputs))) == 1


def test_kernels_of_phases_are_the_layers():
    """Built and run: the layer's name is on the kernels of all its phases, none is the fallback's."""
    example = ops.operator.Example(
        ((1, 64, 7, 6), (64, 32, 3, 3)),
        lambda data, weights: op.nn.conv2d_transpose(data, weights, strides=2, padding=1, output_padding=1),
        constants=1,
    )
    mod, _ = calls({"task/conv": example})
    found = list(metrics.kernels(build.lower(mod, resolve("host"))))
    assert sum(list(kernel.layers) == ["task/conv"] for kernel in found if kernel.rule == "conv2d") == 4
    assert all(kernel.rule != "fallback" for kernel in found)


def test_built_kernels_keep_the_values():
    mod, inputs = three_by_three()
    got = schedule_and_run(mod, resolve("host"), inputs)
    (want,) = evaluate(mod["main"], inputs)
    np.testing.assert_allclose(got.outputs[0], want, rtol=0, atol=1e-5 * float(np.abs(want).max()))


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("attributes", [{}, {"groups": 2}, {"dilation": 2}], ids=["plain", "groups", "dilation"])
def test_weights_that_are_no_constants_are_left_to_tvm(rank, attributes):
    call = getattr(op.nn, f"conv{rank}d_transpose")
    shapes = ((1, 16, *[5] * rank), (16, 8, *[3] * rank))
    example = ops.operator.Example(
        shapes, lambda data, weights: call(data, weights, strides=2, padding=1, **attributes)
    )
    mod, data = calls({"task/conv": example})
    machine = relax.VirtualMachine(build.build(mod, resolve("host")), tvm.cpu())
    (got,) = machine["main"](*(tvm.runtime.tensor(data[param.name]) for param in mod["main"].params))
    (want,) = evaluate(mod["main"], data)
    np.testing.assert_allclose(got.numpy(), want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
