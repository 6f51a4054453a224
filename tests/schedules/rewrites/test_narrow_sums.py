"""Which kernels add products in int16; that their sums are right is tested on emulated boards."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.contraction import NARROW_PRODUCTS
from tests.schedules.kernels import assembly, fused_kernels, single_function


def layer(weights):
    """Return a pointwise layer ``[1, 8, 8, I]`` of int8 with the weights ``[O, I]``."""
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}
    return single_function(
        {"x": ((1, 8, 8, weights.shape[1]), "int8")},
        lambda builder, params: builder.emit(
            relax.op.nn.conv2d(params[0], relax.const(weights[:, None, None]), **layouts)
        ),
    )


def weights(most, inputs, outputs=32):
    return np.random.default_rng(0).choice([-most, most], (outputs, inputs)).astype("int8")


@pytest.mark.parametrize(
    ("board", "most", "narrow"),
    [("rpi3", 7, True), ("rpi4", 7, True), ("rpi4", 127, False), ("rpi5", 7, False), ("rpi4", 1, True)],
)
def test_only_small_weights_without_dot_products_are_summed_narrowly(board, most, narrow):
    text = assembly(layer(weights(most, 256)), resolve(board))
    pairs, products = text.count("sadalp") + text.count("saddlp"), text.count("smlal") + text.count("smull")
    assert (products >= 4 * pairs > 0) == narrow


@pytest.mark.parametrize(("most", "count"), [(7, 72), (15, 32), (127, None)])
def test_a_kernel_knows_how_many_products_fit(most, count):
    (kernel,) = fused_kernels(layer(weights(most, 256)), resolve("rpi4")).values()
    assert kernel["main"].attrs.get(NARROW_PRODUCTS) == count


def test_a_kernel_of_several_layers_counts_the_fewest():
    values = [weights(most, 128) for most in (1, 9)]
    layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}

    def body(builder, params):
        convs = [relax.op.nn.conv2d(params[0], relax.const(each[:, None, None]), **layouts) for each in values]
        return relax.Tuple([builder.emit(conv) for conv in convs])

    found = fused_kernels(single_function({"x": ((1, 8, 8, 128), "int8")}, body), resolve("rpi4"))
    assert [kernel["main"].attrs.get(NARROW_PRODUCTS) for kernel in found.values()] == [56]
