"""Samples one behind the other, and by inference."""

import numpy as np
import pytest

from nnfuze_tvm.graph.samples import by_inference, in_a_row


@pytest.mark.parametrize("batch", [1, 4])
def test_both_ways_to_keep_samples_hold_the_same(batch):
    row = np.arange(2 * batch * 3).reshape(2 * batch, 3)
    inferences = row.reshape(2, batch, 3)
    for given in (row, inferences):
        np.testing.assert_array_equal(in_a_row(given, (batch, 3)), row)
        np.testing.assert_array_equal(by_inference(given, (batch, 3)), inferences)


@pytest.mark.parametrize("array", [np.zeros((1, 3)), np.zeros((5, 4)), np.zeros(3), np.zeros((0, 3))])
def test_anything_else_stays_as_it_is(array):
    assert by_inference(array, (1, 3)) is array
    assert in_a_row(array, (1, 3)) is array


def test_what_fills_no_batch_is_left_to_whoever_counts():
    array = np.zeros((5, 3))
    assert by_inference(array, (2, 3)) is array


def test_numbers_have_no_batch():
    array = np.zeros(4)
    assert in_a_row(array, ()) is array and by_inference(array, ()) is array
