"""Concatenations of many tensors, or of parts that end within vectors: a copy after the other."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import tirx
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes.lower import joins
from tests.schedules import kernels


def network(shapes, axis, dtype="float32"):
    params = {f"x{n}": (shape, dtype) for n, shape in enumerate(shapes)}

    def body(builder, values):
        return builder.emit(op.negative(builder.emit(op.concat(values, axis))))

    return kernels.single_function(params, body)


def joined(mod):
    return [
        func for _, func in mod.functions_items() if isinstance(func, tirx.PrimFunc) and joins.ATTRIBUTE in func.attrs
    ]


@pytest.mark.parametrize(
    ("shapes", "axis"),
    [
        ([(2, 3)] * 18, 0),
        ([(3, size) for size in (3, 64, 1, 7, 13, 20)], 1),
        ([(64, 5), (64, 32)], 1),
        ([(size,) for size in range(1, 7)], -1),
        ([(2, 0 if n == 5 else 3, 4, 1) for n in range(7)], 1),
    ],
)
def test_the_parts_are_where_they_belong(shapes, axis):
    arrays = {f"x{n}": np.random.default_rng(n).standard_normal(s).astype("float32") for n, s in enumerate(shapes)}
    target = resolve("host")
    mod = network(shapes, axis)
    assert len(joined(kernels.fuse(mod, target))) == 1
    got = kernels.schedule_and_run(mod, target, arrays)
    assert set(got.rules.values()) == {"elementwise"}
    np.testing.assert_array_equal(got.outputs[0], -np.concatenate(list(arrays.values()), axis))


@pytest.mark.parametrize(("shapes", "axis"), [([(2, 3)] * 4, 1), ([(2, 16)] * 16, 1), ([(2, 3, 8)] * 9, 1)])
def test_few_parts_or_whole_vectors_are_fused_with_what_reads_them(shapes, axis):
    fused = kernels.fuse(network(shapes, axis), resolve("host"))
    assert not joined(fused)
    assert sum(isinstance(func, tirx.PrimFunc) for func in fused.functions.values()) == 1


def test_a_tuple_that_is_computed_is_left_to_tvm():
    def body(builder, values):
        return builder.emit(op.concat(builder.emit(op.split(values[0], 20, 0)), 0))

    mod = kernels.single_function({"x": ((20, 3), "float32")}, body)
    x = np.arange(60, dtype="float32").reshape(20, 3)
    np.testing.assert_array_equal(kernels.schedule_and_run(mod, resolve("host"), {"x": x}).outputs[0], x)
