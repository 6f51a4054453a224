"""Normalization: every output, axis and type, and what is refused of it."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.operators.one_node import check, numbers, one_node, refusal

DATA = numbers(2, 6, 4, 5) * 2 + 3


@pytest.mark.parametrize("axis", [0, 1, -2, -1])
@pytest.mark.parametrize("outputs", [("y",), ("y", "mean", "inverse"), ("y", "", "inverse")])
@pytest.mark.parametrize("given", [(1,), ()])
def test_layer_normalization(axis, outputs, given):
    shape = DATA.shape[axis:]
    check("LayerNormalization", [DATA, numbers(*shape), numbers(*shape, seed=1)], given, axis=axis, outputs=outputs)


@pytest.mark.parametrize("shape", [(1,), (5,), (4, 1), (2, 1, 1, 1)])
def test_layer_normalization_with_scales_that_are_broadcast(shape):
    check("LayerNormalization", [DATA, numbers(*shape)], [1], axis=2)
    check("LayerNormalization", [DATA, numbers(*shape)], axis=2)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 5e-3), ("float64", 1e-6)])
def test_layer_normalization_of_other_types(dtype, tolerance):
    operands = [each.astype(dtype) for each in (DATA, numbers(5), numbers(5, seed=1))]
    check("LayerNormalization", operands, [1, 2], tolerance=tolerance, kernels=True)


def root_mean_square(data, scale, axes, epsilon=1e-5):
    return (data / np.sqrt(np.square(data).mean(axes, keepdims=True) + epsilon) * scale).astype(data.dtype)


@pytest.mark.parametrize("axis", [0, 2, -1])
@pytest.mark.parametrize("constant", [True, False])
def test_root_mean_squares(axis, constant):
    axes = tuple(range(axis % 4, 4))
    for scale in (numbers(*DATA.shape[axis:]), numbers(2, 1, 1, 1)):
        want = [root_mean_square(DATA, scale, axes)]
        check("RMSNormalization", [DATA, scale], [1] if constant else [], want=want, opset=23, axis=axis)


def test_kernels_that_reduce_all_axes():
    scale = numbers(*DATA.shape)
    want = [root_mean_square(DATA, scale, (0, 1, 2, 3))]
    check("RMSNormalization", [DATA, scale], [1], want=want, opset=23, axis=0, kernels=True)
    check("LayerNormalization", [DATA, scale], [1], axis=0, kernels=True)


@pytest.mark.parametrize("summand", [None, numbers(5, seed=2)])
@pytest.mark.parametrize("outputs", [("y",), ("y", "", "", "total")])
def test_sums_that_are_normalized(summand, outputs):
    data, skip, gamma, beta = numbers(2, 3, 5), numbers(2, 3, 5, seed=1), numbers(5), numbers(5, seed=1)
    node = {"outputs": outputs, "epsilon": 1e-5}
    check("com.microsoft.SkipLayerNormalization", [data, skip, gamma, beta, summand], [2, 3, 4], **node)
    check("com.microsoft.SkipSimplifiedLayerNormalization", [data, skip, gamma, summand], [2, 3], **node)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_moments_of_channels(rank):
    data = numbers(2, 6, *[4, 5, 3][:rank]) * 0.5 + 2
    scale, bias, variance = numbers(6), numbers(6, seed=1), np.abs(numbers(6, seed=2)) + 0.1
    check("InstanceNormalization", [data, scale, bias], [1, 2])
    check("GroupNormalization", [data, scale[:3], bias[:3]], [1, 2], opset=18, num_groups=3)
    check("GroupNormalization", [data, scale, bias], [1, 2], opset=21, num_groups=3)
    for opset in (7, 9, 14, 15):
        check("BatchNormalization", [data, scale, bias, bias, variance], [1, 2, 3, 4], opset=opset, epsilon=1e-3)
    if rank == 2:
        check("MeanVarianceNormalization", [data])


def test_moments_of_small_values_far_from_zero():
    data = numbers(1, 4, 64, seed=3) * 0.1 + 50
    check("InstanceNormalization", [data, numbers(4), numbers(4, seed=1)], [1, 2], kernels=True, tolerance=5e-4)


@pytest.mark.parametrize("size", [1, 3, 5, 9])
def test_neighbouring_channels(size):
    check("LRN", [DATA], size=size, alpha=0.1, beta=0.5, bias=2.0)


def test_an_even_number_of_neighbours_has_more_behind():
    squares = np.square(DATA)
    padded = np.pad(squares, [(0, 0), (1, 2), (0, 0), (0, 0)])
    total = sum(padded[:, first : first + 6] for first in range(4))
    check("LRN", [DATA], size=4, want=[DATA / (1 + 1e-4 / 4 * total) ** np.float32(0.75)])


@pytest.mark.parametrize("p", [1, 2])
@pytest.mark.parametrize("axis", [0, 1, -1])
def test_norms(p, axis):
    data = numbers(3, 4, 5)
    data[0] = 0
    check("LpNormalization", [data], p=p, axis=axis)


@pytest.mark.parametrize(
    ("op", "shapes", "node", "reason"),
    [
        ("BatchNormalization", [(2, 3, 4)] + [(3,)] * 4, {"training_mode": 1}, "training mode is not supported"),
        ("BatchNormalization", [(2, 3)] + [(3,)] * 4, {"opset": 9, "outputs": ("y", "m")}, "training mode"),
        ("BatchNormalization", [(2, 3, 4)] + [(12,)] * 4, {"opset": 7, "spatial": 0}, "spatial 0 is not supported"),
        ("LayerNormalization", [(2, 3), (3,)], {"stash_type": 16}, "stash_type 16 is not supported"),
        ("GroupNormalization", [(2, 4, 3), (3,), (3,)], {"num_groups": 3}, "4 channels are no 3 groups"),
    ],
)
def test_refusals(op, shapes, node, reason):
    message = refusal(one_node(op, [numbers(*shape) for shape in shapes], **node)[0])
    assert f"({op})" in message and reason in message
