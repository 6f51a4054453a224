"""Images of another size, by every way in which ONNX states it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnfuze_tvm.frontend.operators import interpolation
from tests.frontend.operators.one_node import check, numbers, one_node, refusal

MODES = ["half_pixel", "asymmetric", "align_corners", "pytorch_half_pixel", "half_pixel_symmetric"]
ROUNDINGS = ["round_prefer_floor", "round_prefer_ceil", "floor", "ceil"]


def resize(data, scales=None, sizes=None, roi=None, **node):
    operands = [data, roi, None if scales is None else np.array(scales, "float32"), sizes]
    operands[3] = None if sizes is None else np.array(sizes)
    while operands[-1] is None:
        operands.pop()
    check("Resize", operands, range(1, len(operands)), **node)


@st.composite
def targets(draw, rank):
    """Spatial sizes, and scales or sizes for them and for the batch and the channels."""
    sizes = [draw(st.integers(3, 7)) for _ in range(rank)]
    if draw(st.booleans()):
        # Halves are ties, which the last bit decides.
        return sizes, {"scales": [1, 1, *(draw(st.sampled_from([2, 3, 0.6, 0.7, 1.5, 2.6, 1])) for _ in sizes)]}
    return sizes, {"sizes": [1, 2, *(draw(st.integers(1, 12)) for _ in sizes)]}


def skips(mode, sizes, target):
    """Tell whether runtimes disagree on a case."""
    wanted = target.get("scales", [1, 1])[2:]
    return mode == "align_corners" and any((n * scale) % 1 for n, scale in zip(sizes, wanted, strict=False))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(targets), st.sampled_from(MODES[:4]), st.sampled_from(ROUNDINGS))
def test_nearest(target, mode, rounding):
    sizes, given = target
    if not skips(mode, sizes, given):
        data = (numbers(1, 2, *sizes) * 50).astype("int8")
        resize(data, **given, coordinate_transformation_mode=mode, nearest_mode=rounding)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 3).flatmap(targets), st.sampled_from(MODES), st.booleans())
def test_linear(target, mode, antialias):
    sizes, given = target
    if not skips(mode, sizes, given):
        data = numbers(1, 2, *sizes)
        resize(data, **given, mode="linear", coordinate_transformation_mode=mode, antialias=int(antialias))


@settings(max_examples=40, deadline=None)
@given(targets(2), st.sampled_from(MODES), st.booleans(), st.booleans(), st.sampled_from([-0.5, -0.75]))
def test_cubic(target, mode, antialias, exclude, a):
    sizes, given = target
    if not skips(mode, sizes, given):
        node = {"antialias": int(antialias), "exclude_outside": int(exclude), "cubic_coeff_a": a}
        resize(numbers(1, 2, *sizes), **given, mode="cubic", coordinate_transformation_mode=mode, **node)


def test_regions():
    roi = np.array([0.1, -0.2, 0.9, 1.3], "float32")
    node = {"coordinate_transformation_mode": "tf_crop_and_resize", "extrapolation_value": 7.0, "axes": [2, 3]}
    for mode in ("nearest", "linear", "cubic"):
        resize(numbers(1, 2, 5, 7), sizes=[8, 3], roi=roi, mode=mode, **node)


@pytest.mark.parametrize(("policy", "size"), [("not_larger", (3, 6)), ("not_smaller", (5, 8))])
def test_the_ratio_of_sides_is_kept(policy, size):
    node = {"axes": [3, 2], "keep_aspect_ratio_policy": policy, "mode": "linear"}
    data = numbers(1, 1, 4, 7)
    axes = [
        interpolation.Axis(n, m, 6 / 7 if policy == "not_larger" else 5 / 4) for n, m in zip((4, 7), size, strict=True)
    ]
    if policy == "not_smaller":
        axes[1] = interpolation.Axis(7, 9, 5 / 4)
    rows, columns = (axis.weights("half_pixel", interpolation.linear(), False, False) for axis in axes)
    want = (rows @ data[0, 0] @ columns.T).astype("float32")[None, None]
    resize(data, sizes=[6, 5], want=[want], **node)


@pytest.mark.parametrize("opset", [7, 9, 10, 11])
@pytest.mark.parametrize("mode", ["nearest", "linear"])
def test_before_there_was_a_choice(opset, mode):
    data = numbers(1, 2, 3, 4)
    scales = np.array([1, 1, 2, 2.6], "float32")
    if opset == 7:
        check("Upsample", [data], opset=7, mode=mode, scales=scales.tolist())
    elif opset == 9:
        check("Upsample", [data, scales], [1], opset=9, mode=mode)
    elif opset == 10:
        for each in (scales, np.array([1, 1, 0.6, 0.7], "float32")):
            check("Resize", [data, each], [1], opset=10, mode=mode)
    else:
        empty = np.zeros(0, "float32")
        check("Resize", [data, empty, scales], [1, 2], opset=11, mode=mode)
        check("Resize", [data, empty, empty, np.array([1, 2, 5, 6])], [1, 2, 3], opset=11, mode=mode)


@pytest.mark.parametrize("scale", [2, 0.3])
@pytest.mark.parametrize("mode", ["nearest", "linear", "cubic"])
def test_kernels(mode, scale):
    node = {"antialias": 1} if scale < 1 and mode != "nearest" else {}
    resize(numbers(1, 4, 8, 9), scales=[1, 1, scale, scale], mode=mode, kernels=True, **node)


def test_half_precision_is_computed_in_single():
    data = numbers(1, 2, 5, 6, dtype="float16")
    want = [data.astype("float32")]
    for axis, n in ((2, 5), (3, 6)):
        table = interpolation.Axis(n, 9, 9 / n).weights("half_pixel", interpolation.linear(), False, False)
        want = [np.moveaxis(np.moveaxis(want[0], axis, -1) @ table.T, -1, axis)]
    resize(data, sizes=[1, 2, 9, 9], mode="linear", want=[want[0].astype("float16")], tolerance=2e-3)


@pytest.mark.parametrize("target", [(4, 3), (8, 9), (3, 10), (5, 6)])
def test_the_middle_stays(target):
    data = numbers(2, 5, 6, 2)
    check("CenterCropPad", [data, np.array(target)], [1], axes=[1, -2], opset=18)


def test_taps_of_a_row():
    index, weight = interpolation.taps(np.array([[0, 0.25, 0.75, 0], [1, 0, 0, 0]]))
    assert weight.tolist() == [[0.25, 0.75], [1, 0]]
    assert index.tolist() == [[1, 2], [0, 0]]


@pytest.mark.parametrize(
    ("operands", "node", "reason"),
    [
        ([None, np.array([1, 2], "float32")], {}, "2 scales for 3 dimensions are not supported"),
        ([None, None, np.array([3, 3])], {}, "2 sizes for 3 axes are not supported"),
        ([None, np.array([1, 1, 0.1], "float32")], {}, "its result would have the shape [1, 2, 0]"),
        ([None, None, np.array([1, 2, 3])], {"mode": "area"}, "mode 'area' is not supported"),
        ([None, None, np.array([1, 2, 3])], {"nearest_mode": "up"}, "nearest_mode 'up' is not supported"),
        ([None, None, np.array([1, 2, 3])], {"coordinate_transformation_mode": "no"}, "'no' is not supported"),
        (
            [None, np.array([1, 1, 0.7], "float32")],
            {"mode": "linear", "coordinate_transformation_mode": "align_corners"},
            "align_corners with scales that make no whole sizes is not supported",
        ),
    ],
)
def test_refusals(operands, node, reason):
    message = refusal(one_node("Resize", [numbers(1, 2, 5), *operands], range(1, 4), **node)[0])
    assert "(Resize)" in message and reason in message


def test_what_depends_on_data_is_refused():
    message = refusal(one_node("Resize", [numbers(1, 2, 5), None, np.array([1, 1, 2], "float32")])[0])
    assert "scales computed from data are not supported" in message
    integers = np.arange(10, dtype="uint8").reshape(1, 2, 5)
    message = refusal(one_node("Resize", [integers, None, np.array([1, 1, 2], "float32")], [2], mode="linear")[0])
    assert "interpolation of uint8 is not supported" in message
