"""UnsignedBytes on matrix products: equal sums, of unsigned data."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.integers.context import dtype_of
from nnfuze_tvm.passes.lower.unsigned_bytes import UnsignedBytes
from nnfuze_tvm.schedules.intrinsics import wants_unsigned
from tests.schedules.kernels import single_function


def network(rng, shape, columns, biases=0, read_twice=False):
    """Return products of the same data; the first of them with a bias, or read by something else, too."""
    weights = [relax.const(rng.integers(-128, 128, (shape[-1], columns)).astype("int8")) for _ in range(2)]

    def body(builder, params):
        sums = [builder.emit(op.matmul(params[0], weight, out_dtype="int32")) for weight in weights]
        first = sums[0]
        for n in range(biases):
            bias = relax.const(rng.integers(-1000, 1000, (columns,)).astype("int32"))
            first = builder.emit(op.add(*((first, bias) if n % 2 else (bias, first))))
        total = builder.emit(op.subtract(first, sums[1]))
        return builder.emit(op.multiply(total, sums[0])) if read_twice else total

    data = rng.integers(-128, 128, shape).astype("int8")
    return single_function({"x": (shape, "int8")}, body), {"x": data}


def types_of_data(mod):
    return [dtype_of(b.value.args[0]) for b in bindings(mod["main"]) if op_name(b.value) == "matmul"]


@settings(max_examples=30, deadline=None)
@given(
    rows=st.lists(st.integers(1, 3), max_size=2),
    depth=st.sampled_from([3, 4, 8]),
    columns=st.sampled_from([8, 12, 24]),
    biases=st.integers(0, 2),
    read_twice=st.booleans(),
)
def test_sums_are_the_same_bits(rows, depth, columns, biases, read_twice):
    mod, inputs = network(np.random.default_rng(0), (*rows, 2, depth), columns, biases, read_twice)
    want = evaluate(mod["main"], inputs)
    new = UnsignedBytes(unsigned=True)(mod)
    fits = depth % 4 == 0 and columns % 8 == 0
    assert types_of_data(new) == ["uint8" if fits else "int8"] * 2
    for one, other in zip(evaluate(new["main"], inputs), want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_bias_takes_it_back():
    mod, _ = network(np.random.default_rng(0), (2, 4), 8, biases=1)
    new = UnsignedBytes(unsigned=True)(mod)
    # One for the data, one for each product's sums.
    assert sum(op_name(b.value) == "add" for b in bindings(new["main"])) == 3


@pytest.mark.parametrize(
    ("target", "wanted"), [("x86-64-v3", False), ("rpi4", False), ("rpi5", False), ("x86-64-v4", False)]
)
def test_which_machines_want_it(target, wanted):
    assert wants_unsigned(Hardware.of(resolve(target)).features) is wanted
    assert wants_unsigned(frozenset({"avx512f", "avx512bw", "avx512vnni"}))


def test_others_keep_signed_data():
    mod, _ = network(np.random.default_rng(0), (2, 4), 8)
    assert UnsignedBytes(unsigned=False)(mod).same_as(mod)
