"""WholeColumns: equal values, whole vectors of columns."""

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
from nnfuze_tvm.passes.lower.whole_columns import WholeColumns
from tests.helpers import keeps_values
from tests.schedules.kernels import schedule_and_run, single_function


def network(rng, shape, columns, bias=None, relu=False):
    weights = relax.const(rng.standard_normal((shape[-1], columns)).astype("float32"))

    def body(builder, params):
        value = builder.emit(op.matmul(params[0], weights))
        if bias is not None:
            addend = rng.standard_normal([columns if size is None else size for size in bias]).astype("float32")
            value = builder.emit(op.add(value, relax.const(addend)))
        return builder.emit(op.nn.relu(value)) if relu else value

    data = rng.standard_normal(shape).astype("float32")
    return single_function({"x": (shape, "float32")}, body), {"x": data}


def products(mod):
    return [b.value for b in bindings(mod["main"]) if op_name(b.value) == "matmul"]


def check(mod, inputs):
    return keeps_values(WholeColumns(), mod, inputs)


@settings(max_examples=40, deadline=None)
@given(
    batch=st.lists(st.sampled_from([1, 2, 65]), min_size=1, max_size=2),
    rows=st.integers(1, 40),
    columns=st.sampled_from([3, 64, 65, 66, 68, 130]),
    bias=st.sampled_from([None, (None,), (1, None), (1,), ()]),
    relu=st.booleans(),
)
def test_any_product_keeps_its_values(batch, rows, columns, bias, relu):
    check(*network(np.random.default_rng(0), (*batch, rows), columns, bias, relu))


@pytest.mark.parametrize(("rows", "columns", "computed"), [(32, 65, 80), (32, 130, 144), (32, 68, 68), (8, 65, 65)])
def test_odd_columns_become_whole_vectors(rows, columns, computed):
    new = check(*network(np.random.default_rng(0), (5, rows), columns, (None,), relu=True))
    (call,) = products(new)
    assert static_shape(call)[-1] == computed


@pytest.mark.parametrize(("columns", "computed"), [(65, 80), (130, 160), (250, 256), (257, 288)])
def test_the_sums_of_a_single_row_make_several_vectors_at_a_time(columns, computed):
    new = check(*network(np.random.default_rng(0), (1, 32), columns, (None,), relu=True))
    (call,) = products(new)
    assert static_shape(call)[-1] == computed


def test_what_follows_element_by_element_is_computed_before_the_cut():
    new = check(*network(np.random.default_rng(0), (1, 5, 32), 65, (None,), relu=True))
    assert [op_name(b.value) for b in bindings(new["main"])][:4] == ["matmul", "add", "nn.relu", "strided_slice"]


def test_constants_along_another_axis_of_equal_length_wait_for_the_cut():
    rng = np.random.default_rng(0)
    new = check(*network(rng, (1, 65, 32), 65, (65, 1)))
    assert [op_name(b.value) for b in bindings(new["main"])] == ["matmul", "strided_slice", "add"]


@pytest.mark.parametrize("per_column", [False, True])
def test_quantized_weights_stay_integers(per_column):
    rng = np.random.default_rng(0)
    codes = relax.const(rng.integers(-127, 128, (32, 65)).astype("int8"))
    scale = relax.const(rng.uniform(0.01, 0.1, 65 if per_column else ()).astype("float32"))
    zero = relax.const(rng.integers(-3, 4, 65).astype("int8") if per_column else np.int8(2))

    def body(builder, params):
        weights = builder.emit(op.dequantize(codes, scale, zero, axis=1))
        return builder.emit(op.matmul(params[0], weights))

    mod = single_function({"x": ((4, 32), "float32")}, body)
    new = check(mod, {"x": rng.standard_normal((4, 32)).astype("float32")})
    (call,) = products(new)
    assert static_shape(call) == (4, 80)
    dequantized = next(b.value for b in bindings(new["main"]) if op_name(b.value) == "dequantize")
    assert str(dequantized.args[0].ty.dtype) == "int8"


def test_weights_that_are_computed_stay():
    shapes = {"x": ((4, 32), "float32"), "w": ((32, 65), "float32")}
    mod = single_function(shapes, lambda builder, params: builder.emit(op.matmul(params[0], params[1])))
    (call,) = products(WholeColumns()(mod))
    assert static_shape(call) == (4, 65)


def test_a_whole_network_keeps_its_values():
    mod, inputs = network(np.random.default_rng(0), (1, 7, 33), 121, (None,), relu=True)
    (want,) = evaluate(mod["main"], inputs)
    (got,) = schedule_and_run(mod, resolve("host"), inputs).outputs
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * float(np.abs(want).max()))
