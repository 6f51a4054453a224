"""Convolutions of every rank, their padding, and what is made of them."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.frontend.operators.one_node import check, numbers, one_node, refusal


@st.composite
def convolutions(draw):
    """A convolution's spatial sizes and attributes."""
    rank = draw(st.integers(1, 3))
    sizes, kernel = ([draw(st.integers(*span)) for _ in range(rank)] for span in ((7, 9), (1, 4)))
    attributes = {"strides": [draw(st.integers(1, 3)) for _ in range(rank)], "group": draw(st.sampled_from([1, 2, 4]))}
    mode = draw(st.sampled_from(["NOTSET", "NOTSET", "SAME_UPPER", "SAME_LOWER", "VALID"]))
    if mode == "NOTSET":
        attributes["pads"] = [draw(st.integers(0, kernel[n % rank])) for n in range(2 * rank)]
        attributes["dilations"] = [draw(st.integers(1, 2)) for _ in range(rank)]
    else:
        attributes["auto_pad"] = mode
    return sizes, kernel, attributes


@settings(max_examples=30, deadline=None)
@given(convolutions(), st.booleans())
def test_convolutions(convolution, constant):
    sizes, kernel, attributes = convolution
    weight = numbers(8, 4 // attributes["group"], *kernel)
    check("Conv", [numbers(1, 4, *sizes), weight, numbers(8)], [1, 2] if constant else [2], **attributes)


@settings(max_examples=40, deadline=None)
@given(convolutions(), st.booleans(), st.data())
def test_transposed_convolutions(convolution, constant, data):
    sizes, kernel, attributes = convolution
    rank = len(sizes)
    extra = [data.draw(st.integers(0, stride - 1)) for stride in attributes["strides"]]
    if data.draw(st.booleans()):
        attributes["output_padding"] = extra
    elif "pads" in attributes:
        natural = [
            (n - 1) * s + (k - 1) * d + 1
            for n, s, k, d in zip(sizes, attributes["strides"], kernel, attributes["dilations"], strict=True)
        ]
        del attributes["pads"]
        attributes["output_shape"] = [
            n - data.draw(st.integers(0, k - 1)) for n, k in zip(natural, kernel, strict=True)
        ]
    weight = numbers(4, 8 // attributes["group"], *kernel)
    operands = [numbers(1, 4, *sizes), weight, numbers(8)]
    assert len(attributes["strides"]) == rank
    check("ConvTranspose", operands, [1, 2] if constant else [2], **attributes)


def test_what_is_larger_than_all_products_is_zero():
    data, weight = numbers(1, 2, 3), numbers(2, 1, 2)
    natural = np.convolve(data[0, 0], weight[0, 0]) + np.convolve(data[0, 1], weight[1, 0])
    want = np.concatenate([natural, [0, 0]]).astype("float32")[None, None] + 1
    operands = [data, weight, np.ones(1, "float32")]
    check("ConvTranspose", operands, [1, 2], want=[want], kernels=True, output_shape=[6])


def test_kernels_of_dilated_transposed_convolutions():
    operands = [numbers(1, 4, 5, 6), numbers(4, 2, 3, 2)]
    check("ConvTranspose", operands, kernels=True, dilations=[2, 3], strides=[2, 1], group=2, pads=[1, 0, 2, 1])


@pytest.mark.parametrize("rank", [1, 2])
def test_blocks_are_added_up(rank):
    sizes, block = [6, 5][:rank], [3, 2][:rank]
    attributes = {"strides": [2, 1][:rank], "pads": [1, 0, 0, 1] if rank == 2 else [1, 0]}
    counts = [3, 5][:rank]
    data = numbers(2, 2 * int(np.prod(block)), int(np.prod(counts)))
    check("Col2Im", [data, np.array(sizes), np.array(block)], [1, 2], **attributes)


@pytest.mark.parametrize(("groups", "fields"), [(1, 1), (2, 2)])
@pytest.mark.parametrize("masked", [False, True])
def test_taps_with_offsets(groups, fields, masked):
    counts = (4, 5)
    operands = [
        numbers(1, 4, 7, 6),
        numbers(4, 4 // groups, 3, 2),
        numbers(1, fields * 12, *counts),
        numbers(4),
        numbers(1, fields * 6, *counts, seed=1) if masked else None,
    ]
    attributes = {"strides": [2, 1], "pads": [1, 0, 1, 0], "group": groups, "offset_group": fields}
    check("DeformConv", operands[: 5 if masked else 4], [1, 3], **attributes)


@pytest.mark.parametrize(
    ("op", "shapes", "attributes", "reason"),
    [
        ("Conv", [(1, 2, 3, 3, 3, 3), (2, 2, 1, 1, 1, 1)], {}, "4 spatial dimensions are not supported"),
        ("Conv", [(1, 2, 5, 5), (2, 2, 3)], {}, "its kernel has 1 spatial dimensions, its data 2"),
        ("ConvTranspose", [(1, 2, 5), (2, 2, 3)], {"pads": [9, 9]}, "its result would have the shape [-11]"),
        ("ConvTranspose", [(1, 2, 5), (2, 2, 3)], {"auto_pad": "SAME"}, "auto_pad 'SAME' is not supported"),
        ("Col2Im", [(1, 5, 4), (2,), (2,)], {}, "computed from data is not supported"),
        ("DeformConv", [(1, 2, 5), (2, 2, 3), (1, 3, 3)], {}, "1 spatial dimensions are not supported"),
    ],
)
def test_refusals(op, shapes, attributes, reason):
    message = refusal(one_node(op, [numbers(*shape) for shape in shapes], **attributes)[0])
    assert f"({op})" in message and reason in message
