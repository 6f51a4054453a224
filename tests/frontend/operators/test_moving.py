"""Values that are moved, picked and written, against ONNX Runtime; a case per way that an importer may go wrong."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.frontend.operators.one_node import check, one_node, refusal

DATA = np.random.default_rng(0).standard_normal((2, 5, 6)).astype("float32")
WIDE = np.random.default_rng(1).standard_normal((1, 8, 4, 6)).astype("float32")
FAR = 2**63 - 1

bounds = st.integers(-8, 8) | st.sampled_from([FAR, -FAR - 1, 2**31, -(2**31) - 1])


@given(st.tuples(bounds, bounds, st.sampled_from([1, 2, 3, -1, -2, -3])), st.sampled_from([-1, 1, 2]))
def test_any_slice(part, axis):
    start, end, step = part
    operands = [DATA, *(np.array([value]) for value in (start, end, axis, step))]
    check(*one_node("Slice", operands, known=(1, 2, 3, 4)))


@pytest.mark.parametrize(
    "attributes", [{"starts": [0, -3], "ends": [2, FAR]}, {"axes": [-1], "starts": [1], "ends": [-1]}]
)
def test_slices_of_old(attributes):
    check(*one_node("Slice", [DATA], opset=9, **attributes))


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [[0, 2, 3, 0, 1, 4], [1, 0, 2, 0, 0, 2], [0, -2, 3, 0, 0, -4]])
def test_pads(mode, pads):
    if mode == "reflect":
        pads = [0, *pads[1:]]
    check(*one_node("Pad", [DATA, np.array(pads)], known=(1,), opset=19, mode=mode))


def test_pads_of_some_axes_with_a_value():
    operands = [DATA, np.array([1, 2]), np.array(-np.inf, "float32"), np.array([-1])]
    check(*one_node("Pad", operands, known=(1, 2, 3), opset=18))


@pytest.mark.parametrize(
    ("operator", "operands", "attributes"),
    [
        ("Tile", [np.array([1, 2, 3])], {}),
        ("Expand", [np.array([3, 1, 1, 6])], {}),
        ("Gather", [np.array([[0, -1], [2, 3]])], {"axis": 1}),
        ("Gather", [np.array(-1)], {"axis": -1}),
        ("GatherElements", [np.array([[[0, -1]], [[1, 3]]])], {"axis": 1}),
        ("GatherND", [np.array([[0, -1], [1, 3]])], {}),
        ("GatherND", [np.array([[[0, -1], [2, 3]], [[1, 1], [-5, 0]]])], {"batch_dims": 1}),
        ("CumSum", [np.array(-1)], {"exclusive": 1, "reverse": 1}),
        ("Trilu", [np.array(-1)], {"upper": 0}),
        ("ReduceMean", [np.zeros(0, "int64")], {"noop_with_empty_axes": 1}),
    ],
)
@pytest.mark.parametrize("constant", [True, False])
def test_places(operator, operands, attributes, constant):
    if not constant and not operator.startswith("Gather"):
        pytest.skip("what its shape depends on is a constant")
    check(*one_node(operator, [DATA, *operands], known=(1,) if constant else (), opset=18, **attributes))


@pytest.mark.parametrize("reduction", ["none", "add", "mul", "max", "min"])
def test_scattered_values(reduction):
    update = np.random.default_rng(2).standard_normal((3, 6)).astype("float32")
    places = np.array([[0, -1], [1, 3], [0, 2]])
    check(*one_node("ScatterND", [DATA, places, update], known=(1,), opset=18, reduction=reduction))
    places = np.array([[[0, -1]], [[1, 3]]])
    operands = [DATA, places, update[:2, None, :2]]
    check(*one_node("ScatterElements", operands, opset=18, axis=1, reduction=reduction))


@pytest.mark.parametrize(
    ("operator", "mode"), [("DepthToSpace", "DCR"), ("DepthToSpace", "CRD"), ("SpaceToDepth", None)]
)
def test_depth(operator, mode):
    check(*one_node(operator, [WIDE], blocksize=2, **({"mode": mode} if mode else {})))


@pytest.mark.parametrize(("sizes", "count"), [([2, 3], 2), ([2, 0, 3], 3), (None, 3)])
def test_splits(sizes, count):
    operands = [DATA] if sizes is None else [DATA, np.array(sizes)]
    attributes = {"num_outputs": count} if sizes is None else {}
    check(*one_node("Split", operands, count, known=range(1, len(operands)), opset=18, axis=1, **attributes))


@pytest.mark.parametrize("largest", [0, 1])
def test_the_first_of_equal_values(largest):
    ties = np.random.default_rng(3).integers(0, 4, (3, 9)).astype("float32")
    network, feeds = one_node("TopK", [ties, np.array([5])], 2, known=(1,), largest=largest)
    check(network, feeds)
    check(network, feeds, build=True)


def test_classes():
    operands = [np.array([[1, -1, 3], [9, 0, 2]]), np.array(4), np.array([-1, 5], "float32")]
    check(*one_node("OneHot", operands, known=(1, 2), axis=1))


def test_what_has_no_elements():
    check(*one_node("Concat", [DATA, np.zeros((2, 0, 6), "float32")], known=(1,), axis=1))
    check(*one_node("ReduceSum", [np.zeros((2, 0, 4), "float32"), np.array([1])], known=(1,)))
    check(*one_node("Slice", [DATA, np.array([3]), np.array([3])], known=(1, 2)))


def test_numbers_of_64_bits():
    check(*one_node("Mul", [np.arange(6).reshape(2, 3), np.array(2**40)], known=(1,)))
    check(*one_node("Where", [np.array([[True], [False]]), np.array([2**40, 5, -(2**50)]), np.array(7)], known=(1,)))


def test_built_kernels():
    """Two equal kernels in one network, and one of each kind of copy."""
    check(*one_node("CumSum", [DATA, np.array(1)], known=(1,), reverse=1), build=True)
    check(*one_node("Pad", [DATA, np.array([0, 2, 3, 0, 1, 4])], known=(1,), mode="reflect"), build=True)
    check(*one_node("GatherND", [DATA, np.array([[0, -1], [1, 3]])]), build=True)


@pytest.mark.parametrize(
    ("operator", "operands", "reason"),
    [
        ("Slice", [np.array([0]), np.array([3])], "starts that is computed"),
        ("Tile", [np.array([1, 2, 1])], "repeats that is computed"),
        ("TopK", [np.array([2])], "K that is computed"),
        ("Expand", [np.array([2, 5, 6])], "shape that is computed"),
    ],
)
def test_shapes_that_depend_on_data(operator, operands, reason):
    network, _ = one_node(operator, [DATA, *operands], 2 if operator == "TopK" else 1)
    assert f"node 'node' ({operator}): {reason}" in refusal(network)
