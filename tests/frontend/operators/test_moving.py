"""Slices, pads, tiles, splits and what else puts values in other places."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import ModelError
from nnfuze_tvm.graph.dataflow import bindings, op_name
from tests.frontend.operators.one_node import check, imported, one_node

RNG = np.random.default_rng(0)
LAST = 2**63 - 1
BIG = np.arange(12).reshape(3, 4) + 2**40


def floats(*shape):
    return RNG.standard_normal(shape).astype("float32")


BOUNDS = st.one_of(st.integers(-12, 12), st.sampled_from([LAST, -LAST - 1, 2**31 - 1, -(2**31)]))


@settings(max_examples=60, deadline=None)
@given(start=BOUNDS, end=BOUNDS, step=st.sampled_from([1, 2, 7, -1, -3, LAST]), axis=st.integers(-2, 1))
def test_a_slice_takes_what_python_takes(start, end, step, axis):
    columns = (np.array([value]) for value in (start, end, axis, step))
    check("Slice", [np.arange(63.0).reshape(7, 9), *columns], (1, 2, 3, 4), reference=True)


def test_slices_were_attributes():
    check("Slice", [floats(2, 9)], starts=[-3], ends=[100], axes=[1], opset=9)
    check("Slice", [floats(3, 9)], starts=[1, 0], ends=[3, -2], opset=9)


@pytest.mark.parametrize("mode", ["constant", "reflect", "edge", "wrap"])
@pytest.mark.parametrize("pads", [(1, 2), (0, 3), (4, 0), (-1, 2), (1, -3), (-2, -2), (0, 0), (11, 9)])
def test_pads(mode, pads):
    amounts = np.array([0, 0, pads[0], 0, 0, pads[1]])
    # ONNX Runtime reflects once, the reference crops nothing.
    check("Pad", [floats(1, 2, 5), amounts], (1,), mode=mode, opset=19, reference=max(pads) > 5)


@pytest.mark.parametrize(
    ("data", "fill"),
    [
        (BIG, np.array(2**60 + 1)),
        (BIG, None),
        (floats(3, 4), np.float32(-np.inf)),
        (floats(3, 4) > 0, np.array(True)),
        (floats(3, 4) > 0, None),
    ],
    ids=["int64", "int64-0", "-inf", "bool", "bool-0"],
)
def test_a_pad_keeps_its_value(data, fill):
    fills = [] if fill is None else [fill]
    check("Pad", [data, np.array([1, 0, 0, 2]), *fills], (1, 2), kernels=fill is not None and data is not BIG)


def test_pads_by_a_computed_value_and_by_axes():
    check("Pad", [floats(3, 4), np.array([1, 0, 0, 2]), np.array(3.0, "float32")], (1,))
    check("Pad", [floats(1, 2, 5, 5), np.array([1, 2, 2, 1]), None, np.array([-1, -2])], (1, 3), mode="reflect")
    check("Pad", [floats(1, 2, 5)], pads=[0, 0, 1, 0, 0, 2], value=3.0, opset=7)


def test_a_reflecting_pad_is_one_kernel():
    network, _ = one_node("Pad", [floats(1, 1, 64), np.array([0, 0, 9, 0, 0, 9])], (1,), mode="reflect")
    lowered = build.lower(imported(network), resolve("host"))
    assert len([binding for binding in bindings(lowered["main"]) if op_name(binding.value) == "call_tir"]) == 1


@pytest.mark.parametrize("repeats", [(2, 3), (1, 1), (0, 2), (1, 4)])
@pytest.mark.parametrize("shape", [(2, 3), (2, 1)])
def test_tiles(shape, repeats):
    check("Tile", [np.arange(np.prod(shape)).reshape(shape), np.array(repeats)], (1,))


def test_a_network_that_tvm_would_write_twice_is_built():
    network, feeds = one_node("Tile", [floats(2, 3), np.array([2, 3])], (1,))
    mod = imported(network)
    answer = Runner(build.build(mod, resolve("host")), *signature(mod)).run(feeds)["net"]
    np.testing.assert_array_equal(answer, np.tile(feeds["x0"], (2, 3)))


@pytest.mark.parametrize(
    ("data", "shape"), [(floats(3, 1), [2, 1, 6]), (floats(3, 4), [1]), (floats(), [2, 2]), (floats(1) > 0, [3])]
)
def test_expansions(data, shape):
    check("Expand", [data, np.array(shape)], (1,))


def test_splits():
    check("Split", [floats(2, 9), np.array([2, 0, 7])], (1,), axis=-1, outputs=3)
    check("Split", [floats(2, 10)], axis=1, num_outputs=3, outputs=3)
    check("Split", [floats(2, 9)], axis=1, split=[4, 5], outputs=2, opset=11)
    check("Split", [floats(4, 9)], outputs=2, opset=13)
    check("Split", [floats(4, 9)], outputs=1, opset=13)


def test_concatenations():
    check("Concat", [BIG, np.array([[2**50] * 4])], (1,), axis=-2)
    check("Concat", [floats(2, 3), np.zeros((2, 0), "float32")], (1,), axis=1)
    check("Concat", [floats(2, 3) > 0, floats(1, 3) > 0], axis=0)


@pytest.mark.parametrize("mode", ["DCR", "CRD"])
def test_depth_and_space(mode):
    check("DepthToSpace", [floats(2, 8, 2, 3)], blocksize=2, mode=mode)
    check("SpaceToDepth", [floats(1, 2, 4, 6)], blocksize=2)


@pytest.mark.parametrize("constant", [(), (1,)])
def test_sequences_are_reversed(constant):
    check("ReverseSequence", [floats(4, 3, 2), np.array([1, 4, 2])], constant)
    check("ReverseSequence", [floats(3, 4), np.array([1, 4, 3])], constant, batch_axis=0, time_axis=1)


@pytest.mark.parametrize(("shape", "axes"), [([5, 3], None), ([2, 9], [-1, 0]), ([4], [1])])
def test_what_is_cropped_or_padded_stays_in_the_middle(shape, axes):
    given_axes = {} if axes is None else {"axes": axes}
    check("CenterCropPad", [floats(4, 5), np.array(shape)], (1,), reference=True, **given_axes)


def test_where_and_transpose():
    check("Where", [floats(2, 3) > 0, np.arange(3) + 2**40, np.array(2**41)], (2,))
    check("Transpose", [floats(2, 3, 4)])
    check("Transpose", [floats(2, 3, 4)], perm=[0, 2, 1])


@pytest.mark.parametrize(
    ("op", "operands", "attributes", "reason"),
    [
        ("Slice", (floats(5), np.array([1]), np.array([3])), {}, "starts that are computed"),
        ("Pad", (floats(5), np.array([1, 1])), {}, "pads that are computed"),
        ("Tile", (floats(5), np.array([2])), {}, "repeats that are computed"),
        ("SpaceToDepth", (floats(1, 1, 3, 4),), {"blocksize": 2}, "3 x 4 values are no blocks"),
        ("Concat", (floats(2, 3), floats(3, 4)), {"axis": 0}, "can't be joined"),
    ],
)
def test_what_can_not_be_said_statically_is_refused(op, operands, attributes, reason):
    network, _ = one_node(op, [*operands], **attributes)
    with pytest.raises(ModelError, match=f"^net: node 'node' \\({op}\\): .*{reason}"):
        imported(network)
