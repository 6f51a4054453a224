"""What picks and replaces values by index."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from tests.frontend.operators.one_node import check, imported, one_node
from tests.helpers import compiled, run_module

RNG = np.random.default_rng(0)
# Indices are inputs, or weights.
KNOWN = pytest.mark.parametrize("constant", [(), (1,)], ids=["computed", "constant"])


def floats(*shape):
    return RNG.standard_normal(shape).astype("float32")


@KNOWN
@pytest.mark.parametrize("axis", [0, -1])
@pytest.mark.parametrize("indices", [[-1, 0, -3], 2, [[-1, 1], [0, -2]], [1, 2, 3], [2, 1, 0], [0, 2], [1, 1]])
def test_gathers(indices, axis, constant):
    check("Gather", [floats(5, 4), np.array(indices)], constant, axis=axis)


@KNOWN
def test_gathers_of_elements(constant):
    check("GatherElements", [floats(3, 4), np.array([[0, -1, 1], [1, 0, -2]])], constant, axis=0)
    check("GatherElements", [floats(3, 4), np.array([[0, -1], [1, 3]], "int32")], constant, axis=-1)


@KNOWN
@pytest.mark.parametrize(
    ("shape", "indices", "batch"),
    [
        ((3, 4, 2), [[0, 1], [-1, -2]], 0),
        ((3, 4, 2), [[[2, -1]], [[0, 0]]], 0),
        ((3, 4), [[1], [2]], 0),
        ((2, 4, 2), [[1], [-2]], 1),
        ((2, 2, 4), [[[1], [-2]], [[0], [0]]], 2),
    ],
)
def test_gathers_of_places(shape, indices, batch, constant):
    check("GatherND", [floats(*shape), np.array(indices)], constant, batch_dims=batch)


REDUCTIONS = ("none", "add", "mul", "max", "min")


@pytest.mark.parametrize(
    ("reduction", "dtype", "constant"),
    [*product(REDUCTIONS, ["float32", "int64"], [(1,)]), ("none", "float32", ()), ("add", "int64", ())],
)
def test_scatters(reduction, dtype, constant):
    data, rows = ((floats(*shape) * 9).astype(dtype) for shape in ((5, 3), (2, 3)))
    # Without a reduction nobody says which of two updates of one place wins.
    rounds = [[1], [3]] if reduction == "none" else [[1], [-4]]
    check("ScatterND", [data, np.array(rounds), rows], constant, reduction=reduction)
    check("ScatterND", [data, np.array([[1, 2], [-3, 0]]), rows[:, 0]], constant, reduction=reduction)
    check("ScatterElements", [data, np.array([[-1, 0, 2], [0, 1, 1]]), rows], constant, axis=0, reduction=reduction)
    check("ScatterElements", [data[:2], np.array([[-1, 0, 1], [0, 1, 2]]), rows], constant, axis=1, reduction=reduction)


def test_many_updates_of_one_place():
    data, updates = floats(1, 3), floats(1, 9)
    check("ScatterElements", [data, np.zeros((1, 9), int), updates], (1,), axis=1, reduction="add")


def test_scatters_are_built():
    data, indices, updates = floats(5, 3), np.array([[1], [-2]]), floats(2, 3)
    check("ScatterND", [data, indices, updates], kernels=True)
    check("ScatterND", [data, indices, updates], (1,), reduction="max", kernels=True)


@pytest.mark.parametrize("dtype", ["float32", "int64", "int8", "uint8"])
@pytest.mark.parametrize(("largest", "axis"), [(1, -1), (0, 0)])
def test_the_largest_of_equal_ones_come_in_order(dtype, largest, axis):
    data = np.abs(np.round(floats(4, 9) * 3)).astype(dtype)
    check("TopK", [data, np.array([3])], (1,), outputs=2, axis=axis, largest=largest, reference=dtype != "int64")


def test_the_largest_are_found_by_kernels():
    check("TopK", [np.round(floats(2, 9)), np.array([4])], (1,), outputs=2, kernels=True)
    check("TopK", [floats(2, 9)], outputs=2, opset=9, k=3)
    check("TopK", [floats(2, 9), np.array([0])], (1,), outputs=2)


@pytest.mark.parametrize("axis", [0, 1, -1])
def test_one_hot(axis):
    values = np.array([0.5, 2.0], "float32")
    check("OneHot", [np.array([0, -1, 2, 7, -9]), np.array(4), values], (1, 2), axis=axis)
    check("OneHot", [np.array([[0.0, 3.0]], "float32"), np.array([4.0], "float32"), values], (1,), axis=axis)


@settings(max_examples=30, deadline=None)
@given(offset=st.one_of(st.integers(-7, 7), st.just(2**40)), upper=st.integers(0, 1), rows=st.integers(1, 5))
def test_triangles(offset, upper, rows):
    check("Trilu", [np.ones((2, rows, 4)), np.array(offset)], (1,), upper=upper, reference=True)


def test_triangles_of_truth_values():
    check("Trilu", [floats(4, 5) > 0, np.array(1)], (1,), reference=True)


@pytest.mark.parametrize("chosen", [[True, False, True], [False] * 3, [True, True]])
def test_compressions(chosen):
    for axis in ({"axis": 0}, {"axis": -1}, {}):
        check("Compress", [floats(3, 4), np.array(chosen)], (1,), **axis)


@pytest.mark.parametrize(
    ("op", "operands", "constant", "reason"),
    [
        ("Gather", (floats(3, 4), np.array([5])), (1,), "an index is out of range"),
        ("TopK", (floats(9), np.array([3])), (), "counts that are computed"),
        ("Compress", (floats(2), np.array([True, False])), (), "conditions that are computed"),
        ("NonZero", (floats(3),), (), "the shape of the result depends on data"),
        ("Trilu", (floats(3, 3), np.array(1)), (), "diagonals that are computed"),
    ],
)
def test_what_depends_on_data_is_refused(op, operands, constant, reason):
    network, _ = one_node(op, [*operands], constant, outputs=2 if op == "TopK" else 1)
    with pytest.raises(ModelError, match=f"^net: node 'node' \\({op}\\): .*{reason}"):
        imported(network)


def test_an_index_that_is_computed_reads_nothing_outside():
    network, _ = one_node("Gather", [np.arange(4.0), np.array([0])])
    mod = imported(network)
    feeds = {"x0": np.arange(4.0), "x1": np.array([2**40])}
    assert run_module(mod, feeds, level=0)[0] == [3.0]


def test_a_computed_place_that_is_not_there_is_the_nearest_one():
    rows = np.arange(12, dtype="float32").reshape(4, 3)
    network, feeds = one_node("Gather", [rows, np.array([1, 9, -1, -7])], (0,))
    (got,) = run_module(build.lower(imported(network), resolve("host")), feeds)
    np.testing.assert_array_equal(got, rows[[1, 3, 3, 0]])


FAR = np.array([[1, 2**40, -(2**40)]] * 3)
PLACES = np.array([[[0, 0], [2**40, -9], [1, 7]]])


@pytest.mark.parametrize(
    ("op", "operands", "which", "sizes"),
    [
        ("GatherElements", [floats(3, 5), FAR], 1, 5),
        ("GatherND", [floats(2, 5, 3), PLACES], 1, (2, 5)),
        ("ScatterElements", [floats(3, 5), FAR, floats(3, 3)], 1, 5),
        ("ScatterND", [floats(2, 5, 3), PLACES, floats(1, 3, 3)], 1, (2, 5)),
        ("MaxUnpool", [floats(1, 1, 1, 3), FAR[:1].reshape(1, 1, 1, 3)], 1, 12),
        ("RoiAlign", [floats(2, 1, 4, 4), np.float32([[0, 0, 3, 3]] * 3), FAR[0]], 2, 2),
    ],
)
def test_computed_places_that_are_not_there_are_the_nearest_ones(op, operands, which, sizes):
    """By the kernels themselves: with other places they would read and write what is nobody's."""
    attributes = {
        "GatherElements": {"axis": 1},
        "ScatterElements": {"axis": 1},
        "MaxUnpool": {"kernel_shape": [2, 2], "strides": [2, 2]},
    }
    network, feeds = one_node(op, operands, **attributes.get(op, {}))
    run = compiled(imported(network), level=0)
    (got,) = run(feeds)
    size = np.array(sizes)
    counted = np.where(operands[which] < 0, operands[which] + size, operands[which])
    (want,) = run({**feeds, f"x{which}": np.clip(counted, 0, size - 1)})
    np.testing.assert_array_equal(got, want)
