"""WholeRows: equal sums, of whole groups of products."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.lower.whole_rows import WholeRows
from tests.schedules.kernels import schedule_and_run, single_function


def network(shape, columns, dtype="int8", weights="int8"):
    rng = np.random.default_rng(0)
    matrix = relax.const(rng.integers(-127, 128, (shape[-1], columns)).astype(weights))
    mod = single_function(
        {"x": (shape, dtype)}, lambda builder, params: builder.emit(op.matmul(params[0], matrix, out_dtype="int32"))
    )
    return mod, {"x": rng.integers(0 if dtype == "uint8" else -128, 128, shape).astype(dtype)}


@settings(max_examples=30, deadline=None)
@given(
    batch=st.lists(st.sampled_from([1, 3]), min_size=1, max_size=2),
    rows=st.integers(1, 40),
    columns=st.sampled_from([3, 16, 20]),
    dtype=st.sampled_from(["int8", "uint8"]),
)
def test_any_product_keeps_its_sums(batch, rows, columns, dtype):
    mod, inputs = network((*batch, rows), columns, dtype)
    want = evaluate(mod["main"], inputs)
    np.testing.assert_array_equal(evaluate(WholeRows()(mod)["main"], inputs), want)


@pytest.mark.parametrize(
    ("rows", "columns", "weights", "computed"),
    [
        (33, 20, "int8", 36),
        (32, 20, "int8", 32),
        (9, 20, "int8", 9),
        (33, 3, "int8", 33),
        (33, 5, "int8", 36),
        (33, 20, "int16", 33),
    ],
)
def test_sums_are_of_whole_groups(rows, columns, weights, computed):
    mod, _ = network((1, rows), columns, weights=weights)
    (call,) = (b.value for b in bindings(WholeRows()(mod)["main"]) if op_name(b.value) == "matmul")
    assert static_shape(call.args[1])[0] == computed


def test_a_kernel_has_the_same_sums():
    mod, inputs = network((1, 37), 24)
    (want,) = evaluate(mod["main"], inputs)
    got = schedule_and_run(mod, resolve("host"), inputs)
    np.testing.assert_array_equal(got.outputs[0], want)
