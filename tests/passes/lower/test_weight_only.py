"""WeightOnly: the same products, by kernels that read the codes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.packed_weights import IN_WORD, packed
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from tests.helpers import evaluate_module, few
from tests.schedules import kernels

# Of kernels that are built: bits, inputs of a block, whether there are zero points, rows, outputs.
CASES = [(4, 32, False, 1, 250), (4, 16, True, 9, 33), (8, 24, False, 5, 48), (8, 48, True, 2, 16)]


def network(bits, block, with_points, rows, outputs, seed=0):
    """A product with weights that have a scale per block of inputs, as a block-wise one is imported, and its data."""
    rng = np.random.default_rng(seed)
    high, depth = 2 ** (bits - 1), 2 * block
    codes = rng.integers(-high, high, (outputs * 2, block)).astype("int8")
    points = rng.integers(-high // 2, high // 2, outputs * 2) if with_points else np.zeros(outputs * 2)
    scales = rng.uniform(0.01, 0.1, outputs * 2).astype("float32")
    constants = [relax.const(each) for each in (codes, scales, points.astype("int8"))]

    def body(builder, variables):
        real = builder.emit(op.dequantize(*constants, axis=0, out_dtype="float32"))
        matrix = builder.emit(op.permute_dims(builder.emit(op.reshape(real, (outputs, depth)))))
        product = builder.emit(op.matmul(variables[0], matrix))
        return relax.Tuple([builder.emit(op.nn.relu(product))])

    mod = kernels.single_function({"x": ((rows, depth), "float32")}, body)
    return mod, {"x": rng.standard_normal((rows, depth)).astype("float32")}


@pytest.mark.parametrize("target", ["host", "x86-64-v3"])
@pytest.mark.parametrize("case", CASES)
def test_kernels_give_the_products(case, target):
    mod, inputs = network(*case)
    new = WeightOnly()(mod)
    got = kernels.schedule_and_run(new, resolve(target), inputs)
    assert set(got.rules.values()) == {"weight_only"}
    (want,) = evaluate_module(mod, inputs)
    np.testing.assert_allclose(got.outputs[0], want, rtol=0, atol=1e-6 * np.abs(want).max())


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_sampled_tiles_give_the_products(seed):
    mod, inputs = network(4, 32, True, 11, 96)
    got = kernels.schedule_and_run(WeightOnly()(mod), resolve("host"), inputs, tunable=True, seed=seed)
    (want,) = evaluate_module(mod, inputs)
    np.testing.assert_allclose(got.outputs[0], want, rtol=0, atol=1e-6 * np.abs(want).max())


@few(25)
@given(
    bits=st.sampled_from([3, 4, 5, 8]),
    unsigned=st.booleans(),
    block=st.sampled_from([4, 8, 12, 16]),
    blocks=st.integers(1, 3),
    with_points=st.booleans(),
    seed=st.integers(0, 99),
)
def test_codes_stand_for_the_same_numbers(bits, unsigned, block, blocks, with_points, seed):
    rng = np.random.default_rng(seed)
    low, dtype = (0, "uint8") if unsigned else (-(2 ** (bits - 1)), "int8")
    codes = rng.integers(low, low + 2**bits, (block * blocks, 5)).astype(dtype)
    points = (
        rng.integers(low, low + 2**bits, (blocks, 5)) if with_points else np.full((blocks, 5), low + 2 ** (bits - 1))
    )
    scales = rng.uniform(0.1, 1, (blocks, 5)).astype("float32")
    wide = [np.repeat(each, block, 0) for each in (scales, points.astype(dtype))]
    found = packed(codes, *wide)
    if block == 4:
        assert found is None
        return
    assert found is not None and found.bits == (4 if bits <= 4 and found.block % IN_WORD == 0 else 8)
    words = found.words.astype("int64")
    if found.bits == 4:
        apart = words[:, None] >> 4 * np.arange(8)[:, None] & 15
        words = (apart ^ 8).reshape(codes.shape) - 8
    zeros = 0 if found.zeros is None else np.repeat(found.zeros.astype("int64"), found.block, 0)
    np.testing.assert_array_equal(words - zeros, codes.astype("int64") - wide[1])
    np.testing.assert_array_equal(np.repeat(found.scales, found.block, 0), wide[0])


def test_layers_of_integers_are_left_alone():
    rng = np.random.default_rng(0)
    weights, scale = rng.integers(-127, 128, (32, 16)).astype("int8"), rng.uniform(0.1, 1, 16).astype("float32")
    step, zero = relax.const(np.float32(0.1)), relax.const(np.int8(0))

    def body(builder, variables):
        codes = builder.emit(op.quantize(variables[0], step, zero, axis=0, out_dtype="int8"))
        data = builder.emit(op.dequantize(codes, step, zero, axis=0, out_dtype="float32"))
        constants = (relax.const(weights), relax.const(scale), relax.const(np.zeros(16, "int8")))
        matrix = builder.emit(op.dequantize(*constants, axis=1, out_dtype="float32"))
        return relax.Tuple([builder.emit(op.matmul(data, matrix))])

    mod = kernels.single_function({"x": ((3, 32), "float32")}, body)
    assert "call_tir" not in {op_name(b.value) for b in bindings(WeightOnly()(mod)["main"])}
