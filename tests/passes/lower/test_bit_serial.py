"""BitSerial: the same sums, by counting bits."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.deploy.build import machine
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.contraction import Contraction
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes.lower.bit_serial.bit_serial import BitSerial
from nnfuze_tvm.passes.lower.bit_serial.planes import Planes
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.weight_only import WeightOnly
from tests.helpers import evaluate_module, few
from tests.schedules import kernels

SIGNS = None
# Codes of uint8 are stored as int8 from here on.
LEAST = -128
DATA = [SIGNS, (0, 1), (0, 3), (-1, 1), (-2, 1), (0, 7), (-8, 7), (LEAST, -127), (LEAST, -125)]
# Of kernels that are built: what data and weights are, and output channels.
CASES = [(SIGNS, (-1, 1), 64), ((0, 3), (-2, -1, 0, 1), 24), ((0, 3), (-3, -1, 1, 3), 16)]
WEIGHTS = [(-1, 1), (-127, 127), (-1, 0, 1), (-3, -1, 1, 3), (-2, -1, 0, 1), (0, 1), (-8, 7)]


def always(*_):
    return True


def codes(builder, data, bounds):
    """Few numbers out of int8: signs without zero, or what is between bounds."""
    if bounds is SIGNS:
        positive = builder.emit(op.greater(data, relax.const(np.int8(0))))
        return builder.emit(op.where(positive, relax.const(np.int8(1)), relax.const(np.int8(-1))))
    wide = builder.emit(op.astype(data, "int32"))
    if bounds[0] == LEAST:
        wide = builder.emit(op.add(wide, relax.const(np.int32(LEAST))))
    bounded = builder.emit(op.clip(wide, *bounds))
    return builder.emit(op.astype(bounded, "uint8" if bounds[0] >= 0 else "int8"))


def convolution(bounds, numbers, size, channels, outputs, kernel, seed, **attributes):
    rng = np.random.default_rng(seed)
    weights = rng.choice(numbers, (outputs, *kernel, channels)).astype("int8")
    weights[0, 0, 0, 0] = 1 if 1 in numbers else numbers[-1]
    shape = (1, *size, channels)

    def body(builder, variables):
        data = codes(builder, variables[0], bounds)
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI", "out_dtype": "int32"}
        sums = builder.emit(op.nn.conv2d(data, relax.const(weights), **layouts, **attributes))
        return builder.emit(op.add(sums, relax.const(rng.integers(-9, 9, (1, 1, 1, outputs)).astype("int32"))))

    mod = kernels.single_function({"x": (shape, "int8")}, body)
    return mod, {"x": rng.integers(-9, 10, shape).astype("int8")}


def counts(mod):
    return any(op_name(b.value) == "call_tir" for b in bindings(mod["main"]))


@given(numbers=st.lists(st.integers(-127, 127), min_size=1, max_size=9))
def test_planes_hold_the_numbers(numbers):
    values = np.array(numbers)
    planes = Planes.of(values)
    bits = planes.bits(values).astype("int64")
    signed = 2 * bits - 1 if planes.bipolar else bits
    np.testing.assert_array_equal(planes.factor * np.tensordot(planes.weights, signed, 1), values)


@few(10)
@given(
    bounds=st.sampled_from(DATA),
    numbers=st.sampled_from(WEIGHTS),
    size=st.tuples(st.integers(3, 7), st.integers(3, 7)),
    channels=st.integers(1, 40),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    strides=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    dilation=st.sampled_from([1, 2]),
    padding=st.tuples(*[st.integers(0, 2)] * 4),
    seed=st.integers(0, 99),
)
def test_any_convolution_of_few_bits(bounds, numbers, size, channels, kernel, strides, dilation, padding, seed):
    padding = [max(2, pad) for pad in padding] if dilation == 2 else list(padding)
    attributes = {"strides": list(strides), "dilation": [dilation, dilation], "padding": padding}
    mod, inputs = convolution(bounds, numbers, size, channels, 16, kernel, seed, **attributes)
    new = BitSerial(always)(mod)
    assert counts(new)
    np.testing.assert_array_equal(evaluate_module(new, inputs)[0], evaluate_module(mod, inputs)[0])


@pytest.mark.parametrize("target", ["host", "x86-64-v3"])
@pytest.mark.parametrize(("bounds", "numbers", "outputs"), CASES)
def test_kernels_count_the_same(bounds, numbers, outputs, target):
    mod, inputs = convolution(bounds, numbers, (5, 7), 72, outputs, (3, 3), 1, padding=[1, 1, 1, 1])
    got = kernels.schedule_and_run(BitSerial(always)(mod), resolve(target), inputs)
    assert "bit_serial" in got.rules.values() and "fallback" not in got.rules.values()
    np.testing.assert_array_equal(got.outputs[0], evaluate_module(mod, inputs)[0])


def test_products_of_signs():
    rng = np.random.default_rng(2)
    weights = rng.choice([-1, 1], (100, 32)).astype("int8")

    def body(builder, variables):
        data = codes(builder, variables[0], SIGNS)
        return builder.emit(op.matmul(data, relax.const(weights), out_dtype="int32"))

    mod = kernels.single_function({"x": ((3, 100), "int8")}, body)
    inputs = {"x": rng.integers(-9, 10, (3, 100)).astype("int8")}
    got = kernels.schedule_and_run(BitSerial(always)(mod), resolve("host"), inputs)
    assert "bit_serial" in got.rules.values()
    np.testing.assert_array_equal(got.outputs[0], evaluate_module(mod, inputs)[0])


def test_data_of_many_numbers_are_multiplied():
    mod, _ = convolution((0, 127), (-1, 1), (5, 5), 32, 32, (3, 3), 0)
    assert not counts(BitSerial(always)(mod))


@pytest.mark.parametrize("where", ["sign", "compared", "stored"])
def test_a_layer_of_float_signs_and_two_weights_per_channel_is_one_of_integers(where):
    rng = np.random.default_rng(3)
    weights, sizes = rng.choice([-1, 1], (100, 32)).astype("int8"), rng.uniform(0.1, 2, 32).astype("float32")
    bias = rng.standard_normal(32).astype("float32")
    one = relax.const(np.float32(1))

    def body(builder, variables):
        data = variables[0]
        if where == "sign":
            signs = builder.emit(op.sign(data))
        else:
            signs = builder.emit(op.where(builder.emit(op.greater_equal(data, relax.const(np.float32(0)))), one, -one))
        matrix = relax.const(weights * sizes)
        if where == "stored":
            zero = relax.const(np.zeros(32, "int8"))
            matrix = builder.emit(op.dequantize(relax.const(weights), relax.const(sizes), zero, axis=1))
        product = builder.emit(op.matmul(signs, matrix))
        return relax.Tuple([builder.emit(op.add(product, relax.const(bias)))])

    mod = kernels.single_function({"x": ((4, 100), "float32")}, body)
    data = rng.standard_normal((4, 100)).astype("float32")
    data[0, :9] = 0
    integer = BitSerial(always)(RealizeInteger()(WeightOnly()(mod)))
    kernels_of = [b.value.args[0].name_hint for b in bindings(integer["main"]) if op_name(b.value) == "call_tir"]
    assert "bit_serial" in kernels_of and not ir.float_layers(integer)
    (want,), (got,) = evaluate_module(mod, {"x": data}), evaluate_module(integer, {"x": data})
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize(
    ("target", "planes", "faster"),
    [("rpi4", (1, 1), True), ("rpi4", (4, 4), False), ("x86-64-v4", (4, 4), False), ("armv7", (1, 1), False)],
)
def test_the_model_chooses(target, planes, faster):
    pays = machine(resolve(target)).bit_serial
    assert pays is not None
    assert pays(Contraction(14, 14, 256, 2304, 256, "uint8", "int8", "int32"), *planes) == faster
