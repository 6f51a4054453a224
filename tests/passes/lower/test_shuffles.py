"""Shuffles: one PrimFunc where a reshape splits, a transpose moves and a reshape joins; equal values."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.shuffles import Shuffles
from tests.helpers import run_module
from tests.schedules.kernels import single_function


def joined(extents, cuts):
    """Return extents with neighbours joined except at the cuts."""
    borders = [0, *sorted(cuts), len(extents)]
    return [int(np.prod(extents[a:b])) for a, b in pairwise(borders)]


@settings(max_examples=20, deadline=None)
@given(data=st.data(), extents=st.lists(st.integers(1, 4), min_size=2, max_size=6))
def test_any_shuffle_keeps_its_values(data, extents):
    axes = data.draw(st.permutations(range(len(extents))))
    cuts = st.sets(st.integers(1, len(extents) - 1))
    source, result = joined(extents, data.draw(cuts)), joined([extents[a] for a in axes], data.draw(cuts))

    def body(builder, params):
        split = builder.emit(op.reshape(params[0], extents))
        return builder.emit(op.reshape(builder.emit(op.permute_dims(split, list(axes))), result))

    mod = single_function({"x": (tuple(source), "float32")}, body)
    new = Shuffles()(mod)
    # Where axes of length one are among them, it may not see which belong together.
    assert min(extents) == 1 or [op_name(b.value) for b in bindings(new["main"])] == ["call_tir"]
    x = np.arange(np.prod(source), dtype="float32").reshape(source)
    np.testing.assert_array_equal(run_module(new, {"x": x})[0], x.reshape(extents).transpose(axes).reshape(result))


@pytest.mark.parametrize("kind", ["used twice", "neither splits nor joins", "a view"])
def test_others_stay_as_they_are(kind):
    def body(builder, params):
        if kind == "neither splits nor joins":
            first = builder.emit(op.reshape(params[0], (6, 4)))
            return builder.emit(op.reshape(builder.emit(op.permute_dims(first, [1, 0])), (3, 8)))
        first = builder.emit(op.reshape(params[0], (4, 3, 2)))
        if kind == "a view":
            return builder.emit(op.nn.relu(builder.emit(op.reshape(first, (12, 2)))))
        moved = builder.emit(op.permute_dims(first, [1, 0, 2]))
        return builder.emit(op.add(builder.emit(op.reshape(moved, (3, 8))), builder.emit(op.reshape(moved, (3, 8)))))

    mod = single_function({"x": ((4, 6), "float32")}, body)
    assert "call_tir" not in [op_name(binding.value) for binding in bindings(Shuffles()(mod)["main"])]


def test_a_view_that_is_moved_on_has_simple_indices():
    """What is cut off a view of split channels is one kernel with the view, so it must know the extents."""

    def body(builder, params):
        split = builder.emit(op.reshape(params[0], (5, 2, 3)))
        return builder.emit(op.strided_slice(builder.emit(op.reshape(split, (10, 3))), [0], [1], [9]))

    mod = single_function({"x": ((5, 6), "float32")}, body)
    new = Shuffles()(mod)
    assert [op_name(binding.value) for binding in bindings(new["main"])] == ["call_tir", "strided_slice"]
    x = np.arange(30, dtype="float32").reshape(5, 6)
    np.testing.assert_array_equal(run_module(new, {"x": x})[0], x.reshape(10, 3)[1:9])


def test_a_constant_in_front_is_left_to_others():
    mod = single_function({"x": ((2,), "float32")}, lambda builder, params: builder.emit(relax.op.nn.relu(params[0])))
    assert [op_name(b.value) for b in bindings(Shuffles()(mod)["main"])] == ["nn.relu"]
