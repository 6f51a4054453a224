"""LateReshapes: what is done to each element of a layer's result comes before reshapes; values stay."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.lower.late_reshapes import LateReshapes
from tests.schedules.kernels import HOST, fuse, schedule_and_run, single_function

_RNG = np.random.default_rng(0)


def _constant(*shape):
    return relax.const(_RNG.standard_normal(shape).astype("float32"))


def _convolution(builder, data):
    weights = _constant(6, 1, 3, 4)
    return builder.emit(op.nn.conv2d(data, weights, data_layout="NHWC", kernel_layout="OHWI"))


def _squeezed(builder, values):
    """A convolution of one axis, its bias and activation behind the squeeze; one bias has an axis of length one."""
    data = builder.emit(op.squeeze(_convolution(builder, values[0]), [1]))
    data = builder.emit(op.add(builder.emit(op.add(data, _constant(6))), _constant(1, 1, 6)))
    return builder.emit(op.nn.relu(builder.emit(op.reshape(data, (6, 6)))))


def _widened(builder, values):
    data = builder.emit(op.reshape(values[0], (10, 4)))
    data = builder.emit(op.matmul(data, _constant(4, 6)))
    return builder.emit(op.add(builder.emit(op.reshape(data, (2, 5, 1, 6))), _constant(1, 6)))


def _twice(builder, values):
    """A value that is read twice, by itself and by what is done to it."""
    data = builder.emit(op.squeeze(_convolution(builder, values[0]), [1]))
    return builder.emit(op.multiply(data, builder.emit(op.sigmoid(data))))


def _per_row(builder, values):
    """A constant that is another one for each row."""
    data = builder.emit(op.squeeze(_convolution(builder, values[0]), [1]))
    return builder.emit(op.add(data, _constant(3, 1)))


def _other_channels(builder, values):
    data = builder.emit(op.reshape(_convolution(builder, values[0]), (2, 9, 2)))
    return builder.emit(op.nn.relu(data))


def _two_shapes(builder, values):
    """Two layers' results of other shapes meet in a third one."""
    one = builder.emit(op.squeeze(_convolution(builder, values[0]), [1]))
    flat = builder.emit(op.reshape(values[0], (10, 4)))
    product = builder.emit(op.matmul(builder.emit(op.strided_slice(flat, [0], [0], [6])), _constant(4, 6)))
    return builder.emit(op.add(one, builder.emit(op.reshape(product, (2, 3, 6)))))


@pytest.mark.parametrize(
    ("body", "late"),
    [
        (_squeezed, True),
        (_widened, True),
        (_twice, True),
        (_per_row, False),
        (_other_channels, False),
        (_two_shapes, False),
    ],
)
def test_reshapes_come_last(body, late):
    mod = single_function({"x": ((2, 1, 5, 4), "float32")}, body)
    inputs = {"x": _RNG.standard_normal((2, 1, 5, 4)).astype("float32")}
    new = LateReshapes()(mod)
    (want,), (got,) = (evaluate(m["main"], inputs) for m in (mod, new))
    np.testing.assert_array_equal(got, want)
    assert (op_name(bindings(new["main"])[-1].value) == "reshape") == late


def test_a_layer_is_one_kernel_with_what_was_behind_its_squeeze():
    mod = LateReshapes()(single_function({"x": ((2, 1, 5, 4), "float32")}, _squeezed))
    layer, *rest = (b.value for b in bindings(fuse(mod, HOST)["main"]))
    assert layer.args[0].name_hint == "fused_conv2d_add_add_relu1" and len(rest) == 1
    inputs = {"x": _RNG.standard_normal((2, 1, 5, 4)).astype("float32")}
    (want,) = evaluate(mod["main"], inputs)
    np.testing.assert_allclose(schedule_and_run(mod, HOST, inputs).outputs[0], want, atol=1e-5)
