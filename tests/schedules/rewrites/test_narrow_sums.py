"""Products of small weights are added in int16; on ARM, that their sums are right is tested on emulated boards."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.contraction import NARROW_PRODUCTS
from tests.schedules.kernels import assembly, fused_kernels, single_function


def layer(weights, dtype="int8"):
    """Return a pointwise layer ``[1, 8, 8, I]`` with the weights ``[O, I]``."""
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}
    return single_function(
        {"x": ((1, 8, 8, weights.shape[1]), dtype)},
        lambda builder, params: builder.emit(
            relax.op.nn.conv2d(params[0], relax.const(weights[:, None, None]), **layouts)
        ),
    )


def weights(most, inputs, outputs=32):
    return np.random.default_rng(0).choice([-most, most], (outputs, inputs)).astype("int8")


@pytest.mark.parametrize(
    ("board", "most", "narrow"),
    [
        ("rpi3", 7, True),
        ("rpi4", 7, True),
        ("rpi4", 63, True),
        ("rpi4", 127, False),
        ("rpi5", 7, False),
        ("rpi5", 63, False),
        ("rpi4", 1, True),
    ],
)
def test_only_small_weights_without_dot_products_are_summed_narrowly(board, most, narrow):
    text = assembly(layer(weights(most, 256)), resolve(board))
    pairs, products = text.count("sadalp") + text.count("saddlp"), text.count("smlal") + text.count("smull")
    assert (products >= 4 * pairs > 0) == narrow


@pytest.mark.parametrize("dtype", ["uint8", "int8"])
@pytest.mark.parametrize(("most", "narrow"), [(7, True), (127, False)])
def test_only_small_weights_are_summed_narrowly_with_avx2(dtype, most, narrow):
    text = assembly(layer(weights(most, 256), dtype), resolve("x86-64-v3"))
    assert ("vpaddw" in text) == narrow
    if narrow:
        assert text.count("vpmaddubsw") >= text.count("vpmaddwd") > 0
        assert ("vpsignb" in text) == (dtype == "int8")


@given(
    most=st.sampled_from([1, 2, 7, 8, 15, 32, 63, 64]),
    inputs=st.integers(1, 90).map(lambda n: 4 * n),
    outputs=st.sampled_from([8, 12, 24, 32]),
    dtype=st.sampled_from(["uint8", "int8"]),
    extreme=st.booleans(),
    seed=st.integers(0, 99),
)
def test_sums_are_those_of_numpy(most, inputs, outputs, dtype, extreme, seed):
    rng = np.random.default_rng(seed)
    low, high = (0, 127) if dtype == "uint8" else (-128, 127)
    own = rng.integers(-most, most + 1, (outputs, inputs)).astype("int8")
    data = rng.integers(low, high + 1, (1, 8, 8, inputs)).astype(dtype)
    if extreme:  # every product of one channel is as large as it can be
        own[0] = rng.choice([-most, most], inputs)
        data[:] = np.where(own[0] > 0, high, low)
    machine = relax.VirtualMachine(build.build(layer(own, dtype), resolve("host")), tvm.cpu())
    (got,) = machine["main"](tvm.runtime.tensor(data))
    np.testing.assert_array_equal(got.numpy(), data.astype("int32") @ own.T.astype("int32"))


def test_of_weights_that_are_less_small_eight_at_a_time_are_with_avx2():
    text = assembly(layer(weights(63, 256), "uint8"), resolve("x86-64-v3"))
    assert text.count("vpmaddubsw") == 2 * text.count("vpmaddwd") == 2 * text.count("vpaddw") > 0
    assert "vpaddw" not in assembly(layer(weights(63, 256), "int8"), resolve("x86-64-v3"))


@pytest.mark.parametrize(("most", "count"), [(7, [72, 72]), (15, [32, 32]), (63, [8, 8]), (64, None), (127, None)])
def test_a_kernel_knows_how_many_products_fit(most, count):
    (kernel,) = fused_kernels(layer(weights(most, 256)), resolve("rpi4")).values()
    found = kernel["main"].attrs.get(NARROW_PRODUCTS)
    assert (found and list(found)) == count


def test_a_kernel_of_several_layers_counts_the_fewest():
    values = [weights(most, 128) for most in (1, 9)]
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}

    def body(builder, params):
        convs = [relax.op.nn.conv2d(params[0], relax.const(each[:, None, None]), **layouts) for each in values]
        return relax.Tuple([builder.emit(conv) for conv in convs])

    found = fused_kernels(single_function({"x": ((1, 8, 8, 128), "int8")}, body), resolve("rpi4"))
    assert [list(kernel["main"].attrs[NARROW_PRODUCTS]) for kernel in found.values()] == [[56, 56]]
