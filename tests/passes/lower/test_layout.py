"""ToNHWC: equal values, and no transposes but those at the borders."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.ir import Call, IRModule, Var

from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.passes import ToNHWC
from tests.helpers import evaluate_module

op = relax.op


def network(rng, blocks, size=6, channels=4, quantized=False):
    """Return an NCHW network of convolutions with what ``blocks`` names between them."""
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((1, channels, size, size), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            value = skip = data
            for kind in ["conv", *blocks]:
                if kind == "conv":
                    skip = value
                    value = builder.emit(convolution(builder, rng, value, channels, quantized))
                elif kind == "relu":
                    value = builder.emit(op.nn.relu(value))
                elif kind == "scale":
                    factor = rng.standard_normal((1, channels, 1, 1)).astype("float32")
                    value = builder.emit(op.multiply(value, relax.const(factor)))
                elif kind == "add":
                    value = builder.emit(op.add(value, skip))
                elif kind == "pool":
                    value = builder.emit(op.nn.max_pool2d(value, (3, 3), (1, 1), (1, 1)))
                elif kind == "concat":
                    both = builder.emit(op.concat([value, skip], axis=1))
                    value = builder.emit(op.strided_slice(both, [1], [0], [channels]))
                elif kind == "reflect":
                    sides = [builder.emit(op.strided_slice(value, [3], [at], [at - 2], [-1])) for at in (2, size - 2)]
                    wide = builder.emit(op.concat([sides[0], value, sides[1]], axis=3))
                    value = builder.emit(op.strided_slice(wide, [2, 3], [0, 1], [size, size + 1]))
                elif kind == "shuffle":
                    apart = builder.emit(op.reshape(value, (1, 2, channels // 2, size, size)))
                    turned = builder.emit(op.permute_dims(apart, [0, 2, 1, 3, 4]))
                    value = builder.emit(op.reshape(turned, (1, channels, size, size)))
                elif kind == "quantize":
                    value = quantize(builder, value)
                elif kind.startswith("norm"):
                    value = builder.emit(normalized(rng, value, int(kind[-1]), (channels, size, size)))
            pooled = builder.emit(op.mean(value, [2, 3], keepdims=True))
            flat = builder.emit(op.reshape(pooled, (1, channels)))
            result = builder.emit_output(relax.Tuple([flat, value]))
        builder.emit_func_output(result)
    return builder.get()


def quantize(builder, value):
    scale, zero = relax.const(np.float32(0.05)), relax.const(np.int8(0))
    codes = builder.emit(op.quantize(value, scale, zero, axis=1, out_dtype="int8"))
    return builder.emit(op.dequantize(codes, scale, zero, axis=1, out_dtype="float32"))


def normalized(rng, value, count, shape):
    """Return values normalized over the last so many axes, with weights of their own everywhere."""
    gamma, beta = (relax.const(rng.standard_normal(shape[-count:]).astype("float32")) for _ in range(2))
    return op.nn.layer_norm(value, gamma, beta, list(range(-count, 0)))


def convolution(builder, rng, value, channels, quantized):
    shape = (channels, channels, 3, 3)
    if not quantized:
        weights = relax.const(0.3 * rng.standard_normal(shape).astype("float32"))
    else:
        codes = relax.const(rng.integers(-127, 128, shape).astype("int8"))
        scale = relax.const(rng.uniform(0.001, 0.01, channels).astype("float32"))
        zero = relax.const(np.zeros(channels, "int8"))
        weights = builder.emit(op.dequantize(codes, scale, zero, axis=0, out_dtype="float32"))
    return op.nn.conv2d(value, weights, padding=1)


def operators(mod):
    return [op_name(b.value) for b in bindings(mod["main"]) if isinstance(b.value, Call)]


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 1000),
    blocks=st.lists(
        st.sampled_from(
            [
                "conv",
                "relu",
                "scale",
                "add",
                "pool",
                "concat",
                "reflect",
                "shuffle",
                "quantize",
                "norm1",
                "norm2",
                "norm3",
            ]
        ),
        min_size=1,
        max_size=6,
    ),
    quantized=st.booleans(),
)
def test_values_do_not_change(seed, blocks, quantized):
    rng = np.random.default_rng(seed)
    mod = network(rng, blocks, quantized=quantized)
    data = {"x": rng.standard_normal((1, 4, 6, 6)).astype("float32")}
    moved = ToNHWC()(mod)
    relax.analysis.well_formed(moved)
    for want, got in zip(evaluate_module(mod, data), evaluate_module(moved, data), strict=True):
        # A code on the edge may round the other way when sums are taken in another order.
        tolerance = 0.051 if "quantize" in blocks else 1e-4 * max(np.ptp(want), 1)
        assert np.quantile(np.abs(got - want), 0.98) <= tolerance


@pytest.mark.parametrize("count", [1, 2, 3])
def test_what_is_normalized_over_channels_and_places_has_its_own_weights(count):
    mod = network(np.random.default_rng(0), [f"norm{count}", "conv"])
    data = {"x": np.random.default_rng(1).standard_normal((1, 4, 6, 6)).astype("float32")}
    for want, got in zip(evaluate_module(mod, data), evaluate_module(ToNHWC()(mod), data), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-4 * np.ptp(want))


def test_quantized_chain_has_one_transpose_at_each_border():
    mod = ToNHWC()(
        network(np.random.default_rng(0), ["relu", "quantize", "conv", "add", "relu", "quantize"], quantized=True)
    )
    names = operators(mod)
    assert names.count("permute_dims") == 2
    work = [name for name in names if name != "dequantize"]
    assert work[0] == "permute_dims" and work[-1] == "permute_dims"
    # The pooled tensor needs none: its spatial axes have length one.
    assert names.count("reshape") == 1


def test_channels_are_shuffled_last():
    mod = ToNHWC()(network(np.random.default_rng(0), ["shuffle", "conv"]))
    turns = [b.value for b in bindings(mod["main"]) if isinstance(b.value, Call) and op_name(b.value) == "permute_dims"]
    # One at each border, and that of the shuffle between them.
    assert [len(turn.attrs.axes) for turn in turns] == [4, 5, 4]


def test_slices_follow_the_layout():
    names = operators(ToNHWC()(network(np.random.default_rng(0), ["reflect", "conv"])))
    assert names.count("permute_dims") == 2


def test_weights_are_rearranged_at_compile_time():
    mod = ToNHWC()(network(np.random.default_rng(0), ["conv"], quantized=True))
    for binding in bindings(mod["main"]):
        if op_name(binding.value) == "nn.conv2d":
            assert binding.value.attrs.data_layout == "NHWC"
            assert binding.value.attrs.kernel_layout == "OHWI"
        if op_name(binding.value) == "dequantize":
            assert int(binding.value.attrs.axis) == 0


def test_single_channel_input_needs_no_transpose():
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((1, 1, 8, 8), "float32"))
    weights = np.ones((8, 1, 3, 3), "float32")
    with builder.function("main", [data]):
        with builder.dataflow():
            value = builder.emit(op.nn.conv2d(data, relax.const(weights)))
            pooled = builder.emit_output(builder.emit(op.mean(value, [2, 3], keepdims=True)))
        builder.emit_func_output(pooled)
    assert "permute_dims" not in operators(ToNHWC()(builder.get()))


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_a_layer_that_is_an_output_keeps_its_name_and_poolings_run_channels_last(rank):
    """The transpose behind the layer has none; what only pools has no convolution whose layout it could follow."""
    rng = np.random.default_rng(0)
    emitter = Emitter()
    x = Var("x", relax.TensorType((1, 4, *[6] * rank), "float32"))
    weights = relax.const(rng.standard_normal((8, 4, *[3] * rank)).astype("float32"))
    layer = emitter.emit(getattr(op.nn, f"conv{rank}d")(x, weights), "task/layer")
    pooled = emitter.emit(getattr(op.nn, f"max_pool{rank}d")(x, (2,) * rank, (2,) * rank), "task/pool")
    mod = IRModule({"main": emitter.finish([x], [layer, pooled]).with_attr("global_symbol", "main")})
    new = ToNHWC()(mod)
    named = {b.var.name: b.value for b in bindings(new["main"]) if "/" in b.var.name}
    assert {name: op_name(value) for name, value in named.items()} == {
        "task/layer": f"nn.conv{rank}d",
        "task/pool": f"nn.max_pool{rank}d",
    }
    assert str(named["task/layer"].attrs.data_layout)[-1] == str(named["task/pool"].attrs.layout)[-1] == "C"
    inputs = {"x": rng.standard_normal((1, 4, *[6] * rank)).astype("float32")}
    for got, want in zip(evaluate_module(new, inputs), evaluate_module(mod, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-5)


def test_what_two_layers_read_is_transposed_once():
    rng = np.random.default_rng(0)
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType((1, 4, 8, 8), "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            read = builder.emit(op.nn.relu(data))
            results = []
            for size in (1, 3):
                weights = relax.const(rng.standard_normal((4, 4, size, size)).astype("float32"))
                value = builder.emit(op.nn.conv2d(read, weights, padding=size // 2))
                results.append(builder.emit(op.mean(value, [2, 3])))
            results = builder.emit_output(relax.Tuple(results))
        builder.emit_func_output(results)
    mod = builder.get()
    moved = ToNHWC()(mod)
    assert operators(moved).count("permute_dims") == 1
    inputs = {"x": rng.standard_normal((1, 4, 8, 8)).astype("float32")}
    for want, got in zip(evaluate_module(mod, inputs), evaluate_module(moved, inputs), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
