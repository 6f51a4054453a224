"""Regions of images."""

from __future__ import annotations

import numpy as np
import pytest

from tests.frontend.operators.one_node import check, numbers, one_node, refusal

ROIS = np.array([[0, 0, 7, 7], [1, 2, 8, 6], [2.5, 1, 3, 4.5], [-3, -2, 20, 9]], "float32")


@pytest.mark.parametrize(
    ("mode", "transformation", "ratio"),
    [
        ("avg", "half_pixel", 2),
        ("avg", "output_half_pixel", 0),
        ("max", "half_pixel", 0),
        ("max", "output_half_pixel", 2),
    ],
)
def test_samples_of_regions(mode, transformation, ratio):
    node = {"mode": mode, "coordinate_transformation_mode": transformation, "output_height": 3, "output_width": 2}
    operands = [numbers(2, 3, 8, 10), ROIS, np.array([0, 1, 1, 0])]
    check("RoiAlign", operands, [1, 2], opset=16, sampling_ratio=ratio, spatial_scale=0.5, **node)


def test_boxes_that_are_selected_are_refused():
    operands = [numbers(1, 6, 4), numbers(1, 1, 6), np.array([3])]
    assert "how many boxes it selects depends on data" in refusal(
        one_node("NonMaxSuppression", operands, [2], opset=11)[0]
    )
