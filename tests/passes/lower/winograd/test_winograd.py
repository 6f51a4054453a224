"""Winograd: which convolutions it takes, and what becomes of the values."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax, tirx

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import library_of
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.winograd.winograd import Winograd, best_tiles
from nnfuze_tvm.passes.lower.winograd.winograd_kernel import Shape, prim_func
from nnfuze_tvm.passes.lower.winograd.winograd_weights import fit, taps, transform_weights


def conv_module(shape, outputs, kernel=3, dtype="float32", constant=True, largest=9, **attrs):
    """Return a module with one convolution, ``a.conv/1``, of constant or fed weights."""
    channels = shape[-1] // attrs.get("groups", 1)
    weights = (
        np.random.default_rng(0).integers(-largest, largest + 1, (outputs, kernel, kernel, channels)).astype(dtype)
    )
    x = relax.Var("x", relax.TensorType(shape, dtype))
    w = relax.Var("w", relax.TensorType(weights.shape, dtype))
    builder = relax.BlockBuilder()
    with builder.function("main", [x] if constant else [x, w]):
        with builder.dataflow():
            layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
            value = relax.op.nn.conv2d(x, relax.const(weights) if constant else w, **layouts, **attrs)
            conv = builder.emit(value, "a.conv/1")
            result = builder.emit_output(relax.Tuple([relax.op.nn.relu(conv)]))
        builder.emit_func_output(result)
    return builder.get(), weights


def operators(mod):
    return [op_name(binding.value) for binding in bindings(mod["main"])]


def test_layer_becomes_a_call_of_one_kernel_and_keeps_its_name():
    mod, weights = conv_module((1, 12, 12, 16), 24, padding=1)
    after = Winograd(integers=False, far_macs=2)(mod)
    relax.analysis.well_formed(after)
    assert operators(after)[0] == "call_tir"
    first = bindings(after["main"])[0]
    assert first.var.name == bindings(mod["main"])[0].var.name
    (packed,) = [arg for arg in first.value.args[1] if not isinstance(arg, tvm.ir.Var)]
    assert packed.value.numpy().dtype == np.float32
    np.testing.assert_allclose(packed.value.numpy(), transform_weights(weights, 4), rtol=1e-6)
    assert len([f for f in after.functions.values() if isinstance(f, tirx.PrimFunc)]) == 1


@pytest.mark.parametrize(
    ("shape", "outputs", "attrs"),
    [
        ((1, 12, 12, 16), 16, {"strides": 2, "padding": 1}),
        ((1, 12, 12, 16), 16, {"dilation": 2, "padding": 2}),
        ((1, 12, 12, 16), 16, {"groups": 2, "padding": 1}),
        ((1, 12, 12, 16), 16, {"kernel": 5, "padding": 2}),
        ((1, 12, 12, 16), 16, {"constant": False, "padding": 1}),
        ((1, 12, 12, 16), 16, {"dtype": "int8", "out_dtype": "int32", "padding": 1}),
        ((1, 12, 12, 3), 16, {"padding": 1}),
        ((1, 12, 12, 16), 17, {"padding": 1}),
        ((1, 2, 2, 512), 512, {"padding": 1}),
    ],
)
def test_everything_else_stays_direct(shape, outputs, attrs):
    mod, _ = conv_module(shape, outputs, **attrs)
    assert operators(Winograd(integers=False, far_macs=2)(mod))[:2] == ["nn.conv2d", "nn.relu"]


@pytest.mark.parametrize(
    ("size", "channels", "edge"), [(32, 16, 4), (8, 64, 4), (56, 64, 4), (14, 256, 4), (7, 512, 2), (1, 64, 0)]
)
def test_larger_tiles_where_images_are_large(size, channels, edge):
    assert best_tiles(size, size, channels, channels, far_macs=2)[0] == edge


@pytest.mark.parametrize(("far_macs", "edge"), [(1.3, 4), (2, 2), (20, 0)])
def test_fewer_weights_where_memory_is_slow(far_macs, edge):
    assert best_tiles(8, 8, 256, 256, far_macs)[0] == edge


def test_small_tiles_in_float16():
    mod, _ = conv_module((1, 12, 12, 16), 24, padding=1, dtype="float16")
    after = Winograd(integers=False, far_macs=2)(mod)
    relax.analysis.well_formed(after)
    call = bindings(after["main"])[0].value
    assert op_name(call) == "call_tir"
    at_points = call.args[1].fields[1]
    assert (str(at_points.ty.dtype.dtype), static_shape(at_points)) == ("float16", (16, 24, 16))


def test_integers_where_asked_for():
    attrs = {"dtype": "int8", "out_dtype": "int32", "padding": 1}
    taken = Winograd(integers=True, far_macs=2)
    relax.analysis.well_formed(taken(conv_module((1, 12, 12, 16), 24, **attrs)[0]))
    assert operators(taken(conv_module((1, 12, 12, 16), 24, **attrs)[0]))[0] == "call_tir"


@pytest.mark.parametrize(("largest", "points"), [(9, 36), (127, 16)])
def test_smaller_tiles_where_sums_might_not_fit(largest, points):
    mod, _ = conv_module((1, 12, 12, 500), 16, dtype="int8", largest=largest, out_dtype="int32", padding=1)
    call = bindings(Winograd(integers=True, far_macs=0.1)(mod)["main"])[0].value
    assert static_shape(call.args[1].fields[1])[0] == points


def test_direct_where_no_sums_are_sure_to_fit():
    mod, _ = conv_module((1, 12, 12, 9000), 8, dtype="int8", largest=127, out_dtype="int32", padding=1)
    assert operators(Winograd(integers=True, far_macs=0.1)(mod))[0] == "nn.conv2d"


@pytest.mark.parametrize("dtype", ["int8", "uint8"])
@pytest.mark.parametrize("sign", [-1, 1])
@pytest.mark.parametrize(("m", "channels"), [(2, 900), (4, 16), (4, 229)])
def test_largest_integers_are_exact(m, channels, sign, dtype):
    """Data of one value, of which transforms make large sums; the most channels whose outputs 26 bits hold."""
    shape = Shape(1, 8, 8, channels, 1, (1, 1, 1, 1), m, dtype)
    data = np.full((1, 8, 8, channels), 127 if dtype == "uint8" else -128, dtype)
    weights = np.full((1, 3, 3, channels), sign * 127, "int8")
    got = convolved(shape, data, weights)
    inside = 9 * channels * 127 * sign * int(data[0, 0, 0, 0])
    np.testing.assert_array_equal(got[0, 1:7, 1:7, 0], np.full((6, 6), inside))
    assert got[0, 0, 0, 0] == inside // 9 * 4


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), m=st.sampled_from([2, 4]), channels=st.sampled_from([1, 3, 40]), data=st.data())
def test_extreme_integers_are_exact(seed, m, channels, data):
    """Only the ends of what int8 holds, in signs that transforms may add up."""
    rng = np.random.default_rng(seed)
    shape = Shape(1, 6, 6, channels, 3, (1, 1, 1, 1), m, "int8")
    image = rng.choice(np.array([-128, 127], "int8"), (1, 6, 6, channels))
    weights = rng.choice(np.array(data.draw(st.sampled_from([[-127, 127], [-127, 0, 1]])), "int8"), (3, 3, 3, channels))
    assert fit(taps(weights), m)
    padded = np.pad(image.astype("int64"), ((0, 0), (1, 1), (1, 1), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    want = np.einsum("nyxcab,oabc->nyxo", windows, weights.astype("int64"))
    np.testing.assert_array_equal(convolved(shape, image, weights), want)


def convolved(shape: Shape, data: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return what the kernel makes, not scheduled."""
    out = tvm.runtime.tensor(np.zeros((1, shape.out_height, shape.out_width, shape.outputs), "int32"))
    kernel = library_of({"kernel": prim_func(shape)})["kernel"]
    kernel(tvm.runtime.tensor(data), tvm.runtime.tensor(transform_weights(weights, shape.m, shape.computed)), out)
    return out.numpy()


@settings(max_examples=12, deadline=None)
@given(
    seed=st.integers(0, 10_000),
    m=st.sampled_from([2, 4]),
    n=st.integers(1, 2),
    size=st.tuples(st.integers(3, 11), st.integers(3, 11)),
    pad=st.tuples(*[st.integers(0, 2)] * 4),
)
def test_kernel_is_a_convolution(seed, m, n, size, pad):
    shape = Shape(n, *size, 3, 2, pad, m)
    rng = np.random.default_rng(seed)
    data = rng.standard_normal((n, *size, 3)).astype("float32")
    weights = rng.standard_normal((2, 3, 3, 3)).astype("float32")
    padded = np.pad(data.astype("float64"), ((0, 0), (pad[0], pad[2]), (pad[1], pad[3]), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, (3, 3), axis=(1, 2))
    want = np.einsum("nyxcab,oabc->nyxo", windows, weights)
    out = tvm.runtime.tensor(np.full(want.shape, np.nan, "float32"))
    assert out.shape == (n, shape.out_height, shape.out_width, 2)
    at_points = transform_weights(weights, m)
    kernel = library_of({"kernel": prim_func(shape)})["kernel"]
    kernel(tvm.runtime.tensor(data), tvm.runtime.tensor(at_points), out)
    np.testing.assert_allclose(out.numpy(), want, atol=2e-5 * np.abs(want).max())
