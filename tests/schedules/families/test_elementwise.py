from __future__ import annotations

import numpy as np
import pytest
import tvm
from hypothesis import given
from hypothesis import strategies as st
from tvm import relax, s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.schedules.families import elementwise
from tests.helpers import evaluate_module, few
from tests.schedules import kernels

OP = relax.op


def _channels(x, dtype="float32"):
    return relax.const(np.linspace(-1, 1, int(x.ty.shape[-1]), dtype=dtype))


def _quantize(builder, x):
    return OP.quantize(x, relax.const(0.02), relax.const(3, "int8"), axis=-1, out_dtype="int8")


def _quantize_transposed(builder, x):
    return _quantize(builder, builder.emit(OP.permute_dims(x, [0, 2, 3, 1])))


def _bias_relu(builder, x):
    return OP.nn.relu(builder.emit(OP.add(x, _channels(x))))


def _shuffle(builder, x):
    n, h, w, c = (int(extent) for extent in x.ty.shape)
    split = builder.emit(OP.reshape(x, (n, h, w, c // 3, 3)))
    return OP.reshape(builder.emit(OP.permute_dims(split, [0, 1, 2, 4, 3])), (n, h, w, c))


BUILD = {
    "to_nhwc": lambda builder, x: OP.permute_dims(x, [0, 2, 3, 1]),
    "to_nchw": lambda builder, x: OP.permute_dims(x, [0, 3, 1, 2]),
    "quantize": _quantize,
    "quantize_transposed": _quantize_transposed,
    "bias_relu": _bias_relu,
    "concat_channels": lambda builder, x: OP.concat([x, builder.emit(OP.nn.relu(x)), x], -1),
    "concat_rows": lambda builder, x: OP.concat([x, builder.emit(OP.nn.relu(x))], 1),
    "pad": lambda builder, x: OP.nn.pad(x, (0, 0, 1, 2, 2, 1, 0, 0)),
    "pad_channels": lambda builder, x: OP.nn.pad(x, (0, 0, 0, 0, 0, 0, 1, 5)),
    "slice": lambda builder, x: OP.strided_slice(x, [1, 3], [1, 1], [3, 3], [2, 1]),
    "sigmoid": lambda builder, x: OP.multiply(x, builder.emit(OP.sigmoid(x))),
    "shuffle": _shuffle,
}


def check(name, shape, tunable=False, seed=1):
    mod = kernels.single_function(
        {"x": (shape, "float32")}, lambda builder, variables: builder.emit(BUILD[name](builder, variables[0]))
    )
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    target = resolve("host")
    got = kernels.schedule_and_run(mod, target, {"x": x}, tunable=tunable, seed=seed)
    assert set(got.rules.values()) == {"elementwise"}
    (reference,) = evaluate_module(mod, {"x": x})
    if reference.dtype.kind == "f":
        np.testing.assert_allclose(got.outputs[0], reference, rtol=1e-5, atol=1e-6)
    else:
        np.testing.assert_array_equal(got.outputs[0], reference)


@few(12)
@given(
    name=st.sampled_from(sorted(BUILD)),
    height=st.sampled_from([3, 5, 16]),
    width=st.sampled_from([3, 7, 20]),
    channels=st.sampled_from([3, 24, 48, 51]),
)
def test_any_shape(name, height, width, channels):
    check(name, (1, height, width, channels))


@pytest.mark.parametrize("name", ["bias_relu", "to_nhwc", "to_nchw"])
def test_large_ones_run_in_parallel(name):
    check(name, (1, 112, 112, 48))


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("name", ["bias_relu", "to_nhwc", "concat_channels"])
def test_every_sampled_schedule_is_correct(name, seed):
    check(name, (1, 8, 12, 48), tunable=True, seed=seed)


def test_a_split_writes_each_part_by_its_own_kernel():
    def body(builder, variables):
        parts = builder.emit(OP.split(variables[0], 3, -1))
        return builder.emit(relax.Tuple([builder.emit(relax.TupleGetItem(parts, i)) for i in range(3)]))

    x = np.arange(2 * 24, dtype="float32").reshape(2, 24)
    got = kernels.schedule_and_run(
        kernels.single_function({"x": (x.shape, "float32")}, body), resolve("host"), {"x": x}
    )
    for part, expected in zip(got.outputs, np.split(x, 3, axis=-1), strict=True):
        np.testing.assert_array_equal(part, expected)


@pytest.mark.parametrize("shape", [(1, 8, 64, 3), (2, 7, 48, 24), (3, 5, 7), (4, 10, 10, 6), (1, 1, 5)])
def test_rows_of_few_channels_are_loaded_by_vectors(shape):
    """However a row and a vector divide each other, no number is loaded by itself if a whole vector could be."""
    mod = kernels.single_function({"x": (shape, "float32")}, lambda builder, params: builder.emit(OP.exp(params[0])))
    target = resolve("x86-64-v3")
    (kernel,) = kernels.fused_kernels(mod, target).values()
    sch = s_tir.Schedule(kernel)
    assert elementwise.apply(sch, Hardware.of(target), tunable=False)
    source = tvm.compile(sch.mod, target=target).mod.inspect_source("ll")
    assert "insertelement <8 x float>" not in source or np.prod(shape) % 8
    x = np.random.default_rng(0).standard_normal(shape).astype("float32")
    np.testing.assert_allclose(
        kernels.schedule_and_run(mod, resolve("host"), {"x": x}).outputs[0], np.exp(x), rtol=1e-5
    )
