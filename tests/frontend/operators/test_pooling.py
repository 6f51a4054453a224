"""Windows and what pools them, in one, two and three dimensions."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given, settings
from hypothesis import strategies as st

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from tests.frontend.operators.one_node import check, numbers, one_node, refusal


@st.composite
def poolings(draw):
    """A pooling that ONNX Runtime takes: a window that is larger than its padding, and not than its data."""
    rank = draw(st.integers(1, 3))
    sizes = [draw(st.integers(5, 8)) for _ in range(rank)]
    kernel = [draw(st.integers(1, 3)) for _ in range(rank)]
    attributes = {"kernel_shape": kernel, "strides": [draw(st.integers(1, k)) for k in kernel]}
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode != "NOTSET":
        return sizes, {**attributes, "auto_pad": mode}
    attributes["pads"] = [draw(st.integers(0, kernel[n % rank] - 1)) for n in range(2 * rank)]
    attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    attributes["ceil_mode"] = draw(st.integers(0, 1))
    return sizes, attributes


@settings(max_examples=40, deadline=None)
@given(poolings(), st.sampled_from(["float32", "int8", "uint8"]))
def test_largest_values(pooling, dtype):
    sizes, attributes = pooling
    check("MaxPool", [(numbers(2, 3, *sizes) * 30).astype(dtype)], **attributes)


@settings(max_examples=40, deadline=None)
@given(poolings(), st.integers(0, 1))
def test_averages(pooling, include):
    sizes, attributes = pooling
    check("AveragePool", [numbers(2, 3, *sizes)], count_include_pad=include, **attributes)


@settings(max_examples=25, deadline=None)
@given(poolings(), st.integers(0, 1), st.booleans())
def test_where_the_largest_values_are(pooling, order, equal):
    sizes, attributes = pooling
    data = numbers(2, 3, *sizes)
    data = np.round(data) if equal else data
    check("MaxPool", [data], outputs=("y", "z"), storage_order=order, **attributes)


@pytest.mark.parametrize("p", [1, 2, 3])
def test_norms_of_windows(p):
    window = {"kernel_shape": [3, 2], "strides": [2, 1], "pads": [1, 0, 1, 1]}
    check("LpPool", [numbers(1, 2, 7, 8)], p=p, **window)
    check("LpPool", [numbers(1, 2, 7, 8)], p=p, kernel_shape=[3, 3], dilations=[2, 1], strides=[2, 2], ceil_mode=1)


@pytest.mark.parametrize("rank", [1, 2, 3])
@pytest.mark.parametrize("op", ["GlobalMaxPool", "GlobalAveragePool", "GlobalLpPool"])
def test_whole_images(op, rank):
    check(op, [numbers(2, 3, *[4, 5, 3][:rank])])


def test_values_return_to_where_they_were():
    indices = np.array([[[[5, 7], [13, 15]]]])
    data = np.array([[[[1, 2], [3, 4]]]], "float32")
    whole = np.zeros(16, "float32")
    whole[indices.ravel()] = data.ravel()
    whole = whole.reshape(1, 1, 4, 4)
    window = {"kernel_shape": [2, 2], "strides": [2, 2]}
    check("MaxUnpool", [data, indices], kernels=True, **window)
    # The indices are those of the image that was pooled, not of the larger one.
    larger = np.pad(whole, [(0, 0), (0, 0), (0, 1), (0, 2)])
    check("MaxUnpool", [data, indices, np.array(larger.shape)], [2], want=[larger], kernels=True, **window)


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER"])
def test_kernels_see_what_padding_is_implied(mode):
    window = {"kernel_shape": [3, 2], "strides": [2, 3], "auto_pad": mode}
    check("MaxPool", [numbers(1, 4, 7, 8)], kernels=True, outputs=("y", "z"), **window)
    check("AveragePool", [numbers(1, 4, 7, 8)], kernels=True, **window)


@pytest.mark.parametrize(
    ("attributes", "reason"),
    [
        ({"auto_pad": "SAME_UPPER", "dilations": [2, 2]}, "auto_pad with dilations is not supported"),
        ({"auto_pad": "SAME_UPPER", "strides": [6, 1]}, "auto_pad with windows apart is not supported"),
        ({"auto_pad": "ALL"}, "auto_pad 'ALL' is not supported"),
        ({"pads": [0, -1, 0, 0]}, "negative pads are not supported"),
        ({"pads": [0, 0]}, "2 pads for 2 spatial dimensions are not supported"),
        ({"pads": [3, 0, 0, 0]}, "a window that lies in the padding only is not supported"),
        ({"dilations": [5, 1]}, "its windows are larger than its padded data"),
        ({"strides": [0, 1]}, "strides [0, 1] for 2 spatial dimensions are not supported"),
    ],
)
def test_refusals(attributes, reason):
    message = refusal(one_node("MaxPool", [numbers(1, 1, 6, 6)], kernel_shape=[3, 3], **attributes)[0])
    assert "(MaxPool)" in message and reason in message


@pytest.mark.parametrize("kernels", [False, True])
@pytest.mark.parametrize("rank", [1, 2])
def test_what_is_no_number_counts_as_nothing(rank, kernels):
    data = numbers(1, 16, *[9] * rank)
    data[np.random.default_rng(0).random(data.shape) < 0.3] = np.nan
    data[0, 0] = -np.inf
    windows = np.lib.stride_tricks.sliding_window_view(data, [3] * rank, axis=tuple(range(2, 2 + rank)))
    want = np.fmax.reduce(windows, tuple(range(2 + rank, 2 + 2 * rank)), initial=-np.inf)
    if not kernels:
        check("MaxPool", [data], want=[want], kernel_shape=[3] * rank)
        return
    model, feeds = one_node("MaxPool", [data], kernel_shape=[3] * rank)
    mod = tvm.transform.Sequential(pipeline.merge_phases(None))(load([model], tasks=["net"]))
    (got,) = Runner(build.build(mod, resolve("host")), *signature(mod)).run(feeds).values()
    np.testing.assert_array_equal(got, want)
