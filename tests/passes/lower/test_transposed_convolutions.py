"""TransposedConvolutions: equal values whatever the attributes, and what follows is computed before it is spread."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.compress.half_precision import HalfPrecision
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.transposed_convolutions import TransposedConvolutions
from tests.graph.calls import calls, examples
from tests.schedules.kernels import single_function


def network(rng, shape, weights, follow, quantized=False, **attributes):
    """Return a transposed convolution with what ``follow`` emits behind it, and data for it."""
    rank = len(shape) - 2
    call = getattr(op.nn, f"conv{rank}d_transpose")

    def body(builder, params):
        kernel = relax.const(rng.standard_normal(weights).astype("float32"))
        data = params[0]
        if quantized:
            data = codes(builder, data)
            kernel = builder.emit(
                op.dequantize(
                    relax.const(rng.integers(-127, 128, weights).astype("int8")),
                    relax.const(rng.uniform(0.01, 0.03, weights[1]).astype("float32")),
                    relax.const(np.zeros(weights[1], "int8")),
                    axis=1,
                )
            )
        return follow(builder, builder.emit(call(data, kernel, **attributes)))

    data = rng.standard_normal(shape).astype("float32")
    return single_function({"x": (shape, "float32")}, body), {"x": data}


def codes(builder, value, scale=0.05):
    parameters = (relax.const(np.float32(scale)), relax.const(np.int8(0)))
    narrow = builder.emit(op.quantize(value, *parameters, axis=1, out_dtype="int8"))
    return builder.emit(op.dequantize(narrow, *parameters, axis=1))


def operators(mod):
    return [op_name(binding.value) for binding in bindings(mod["main"])]


def check(mod, inputs):
    """Check that the pass leaves no transposed convolution, and the values as they are; return the new module."""
    new = TransposedConvolutions()(mod)
    assert not any("transpose" in name for name in operators(new))
    (want,), (got,) = evaluate(mod["main"], inputs), evaluate(new["main"], inputs)
    assert got.shape == want.shape and got.dtype == want.dtype
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * max(1.0, float(np.abs(want).max())))
    return new


AXIS = st.tuples(
    st.integers(1, 6),  # extent
    st.integers(1, 5),  # kernel
    st.integers(1, 4),  # stride
    st.integers(1, 3),  # dilation
    st.integers(0, 3),  # padding in front
    st.integers(0, 3),  # padding behind
    st.integers(0, 3),  # output padding
)


@settings(max_examples=60, deadline=None)
@given(axes=st.lists(AXIS, min_size=1, max_size=3), groups=st.sampled_from([1, 2, 4]), seed=st.integers(0, 99))
def test_any_transposed_convolution_is_a_convolution(axes, groups, seed):
    extents, kernel, strides, dilation, before, after, extra = zip(*axes, strict=True)
    # An output padding below the stride; and something must be left of every axis.
    assume(all(e < s for e, s in zip(extra, strides, strict=True)))
    assume(
        all((n - 1) * s + d * (k - 1) + 1 + e > a + b for n, k, s, d, a, b, e in axes),
    )
    rng = np.random.default_rng(seed)
    mod, inputs = network(
        rng,
        (2, 4, *extents),
        (4, 3, *kernel),
        lambda builder, value: value,
        strides=strides,
        dilation=dilation,
        padding=(*before, *after),
        output_padding=extra,
        groups=groups,
    )
    check(mod, inputs)


@pytest.mark.parametrize("groups", [1, 2])
def test_what_follows_element_by_element_comes_before_the_spreading(groups):
    """A bias per channel, an activation and a scale: they run on the convolution's channels."""
    rng = np.random.default_rng(0)
    bias = rng.standard_normal((1, 3 * groups, 1, 1)).astype("float32")

    def follow(builder, value):
        value = builder.emit(op.nn.relu(builder.emit(op.add(value, relax.const(bias)))))
        return builder.emit(op.multiply(relax.const(np.float32(3.0)), value))

    mod, inputs = network(rng, (1, 4, 5, 6), (4, 3, 3, 2), follow, strides=(2, 3), groups=groups)
    new = check(mod, inputs)
    names = operators(new)
    assert max(names.index(name) for name in ("add", "nn.relu", "multiply")) < names.index("reshape")


def test_what_differs_within_a_channel_waits():
    rng = np.random.default_rng(0)
    plane = rng.standard_normal((1, 1, 10, 12)).astype("float32")
    mod, inputs = network(
        rng,
        (1, 4, 5, 6),
        (4, 3, 2, 2),
        lambda builder, value: builder.emit(op.add(value, relax.const(plane))),
        strides=(2, 2),
    )
    names = operators(check(mod, inputs))
    assert names.index("add") > names.index("reshape")


def test_two_results_in_one_form_are_added_in_it():
    rng = np.random.default_rng(0)

    def follow(builder, value):
        return builder.emit(op.add(value, builder.emit(op.nn.relu(value))))

    mod, inputs = network(rng, (1, 4, 5), (4, 3, 4), follow, strides=2, padding=1)
    names = operators(check(mod, inputs))
    assert names.index("add") < names.index("reshape") and names.count("reshape") == 2


def test_a_result_of_wide_kernels_is_cut_only_where_it_must_be():
    """Kernel and stride that are equal make nothing that isn't a result: no slice, and one axis is a view."""
    rng = np.random.default_rng(0)
    mod, inputs = network(rng, (1, 4, 5), (4, 3, 2), lambda builder, value: value, strides=2)
    assert operators(check(mod, inputs)) == ["nn.conv1d", "permute_dims", "reshape", "reshape", "permute_dims"]


@pytest.mark.parametrize("rank", [1, 2])
def test_quantized_layers_become_integer_ones(rank):
    """The weights' codes are rearranged, their scales follow, and 8-bit codes are what is spread."""
    rng = np.random.default_rng(1)

    def follow(builder, value):
        bias = builder.emit(
            op.reshape(
                builder.emit(
                    op.dequantize(
                        relax.const(rng.integers(-500, 500, 3).astype("int32")),
                        relax.const(rng.uniform(1e-3, 2e-3, 3).astype("float32")),
                        relax.const(np.zeros(3, "int32")),
                        axis=0,
                    )
                ),
                (1, 3, *[1] * rank),
            )
        )
        return codes(builder, builder.emit(op.nn.relu(builder.emit(op.add(value, bias)))), 0.1)

    attributes = {"strides": (2,) * rank, "padding": (1,) * (2 * rank)}
    mod, inputs = network(rng, (1, 8, *[6] * rank), (8, 3, *[4] * rank), follow, quantized=True, **attributes)
    new = check(mod, inputs)
    integer = RealizeInteger()(new)
    assert not integer.attrs["nnfuze.float_layers"]
    moved = [b.value for b in bindings(integer["main"]) if op_name(b.value) == "permute_dims"]
    assert moved and all(str(call.ty.dtype.dtype) in ("int8", "uint8") for call in moved)
    # Integer sums are exact, so requantized codes differ from the float graph's by a rounding at most.
    (got,), (want,) = evaluate(integer["main"], inputs, _library(integer)), evaluate(mod["main"], inputs)
    assert np.abs(got - want).max() <= 0.1 * 1.001
    assert (np.abs(got - want) > 1e-5).mean() < 0.02


def _library(mod):
    kernels = {
        gvar.name_hint: func.with_attr("global_symbol", gvar.name_hint)
        for gvar, func in mod.functions_items()
        if isinstance(func, tvm.tirx.PrimFunc)
    }
    return tvm.tirx.build(tvm.IRModule(kernels), target="llvm") if kernels else None


def test_quantized_weights_in_float16_are_no_constants():
    """A file's weights in 8 bits behind a cast: such a layer is computed as TVM does it."""
    mod, data = calls(examples("transposed_convolution"))
    quantized = InsertQDQ(data, Policy.uniform(bits=8))(mod)
    half = HalfPrecision(Policy.uniform(bits=16))(quantized)
    kernels = metrics.kernels(build.lower(half, resolve("rpi5")))
    assert {name for kernel in kernels for name in kernel.layers} >= set(examples("transposed_convolution"))
