"""Products of computed integers: the right-hand side is packed while the kernel runs."""

from __future__ import annotations

import re

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.schedules.kernels import HOST, schedule, schedule_and_run, single_function

AVX2 = resolve("x86-64-v3")


def product(left, right):
    def body(builder, params):
        sums = builder.emit(relax.op.matmul(*params, out_dtype="int32"))
        return builder.emit(relax.op.add(sums, relax.const(np.int32(1))))

    return single_function({"left": left, "right": right}, body)


@pytest.mark.parametrize(
    ("dtypes", "batch", "sizes"),
    [
        (("int16", "int16"), (2, 3), (17, 20, 48)),
        (("int8", "int8"), (3,), (9, 6, 32)),
        (("uint8", "int8"), (1, 2), (13, 12, 16)),
        # What no dot product fits.
        (("int16", "int16"), (2,), (9, 7, 50)),
        (("int8", "int8"), (2,), (4, 8, 16)),
    ],
)
@pytest.mark.parametrize("target", [HOST, AVX2], ids=["host", "avx2"])
def test_sums_are_exact(dtypes, batch, sizes, target):
    rows, depth, columns = sizes
    shapes = ((*batch, rows, depth), (*batch, depth, columns))
    rng = np.random.default_rng(0)
    bounds = {"int8": (-128, 128), "uint8": (0, 128), "int16": (-255, 256)}
    inputs = {
        name: rng.integers(*bounds[dtype], shape).astype(dtype)
        for name, dtype, shape in zip(("left", "right"), dtypes, shapes, strict=True)
    }
    mod = product(*zip(shapes, dtypes, strict=True))
    done = schedule_and_run(mod, target, inputs)
    assert set(done.rules.values()) == {"dense"}
    want = inputs["left"].astype("int64") @ inputs["right"].astype("int64") + 1
    np.testing.assert_array_equal(done.outputs[0], want)


@pytest.mark.parametrize("lowest", [-127, -128])
@pytest.mark.parametrize("target", [HOST, AVX2], ids=["host", "avx2"])
def test_dense_layers_of_all_int8_weights_have_dot_products(lowest, target):
    codes = np.full((16, 16), lowest, "int8")
    layer = [relax.const(codes), relax.const(np.float32(0.5)), relax.const(np.int8(0))]

    def body(builder, params):
        scale, zero = relax.const(np.float32(1.0)), relax.const(np.int8(3))
        data = builder.emit(relax.op.quantize(params[0], scale, zero, axis=0, out_dtype="int8"))
        data = builder.emit(relax.op.dequantize(data, scale, zero, axis=0))
        weights = builder.emit(relax.op.dequantize(*layer, axis=0))
        return builder.emit(relax.op.matmul(data, weights))

    mod = RealizeInteger()(single_function({"x": ((9, 16), "float32")}, body))
    kernels = schedule(mod, target)[0].functions.items()
    (dense,) = (func for name, func in kernels if name.name_hint.endswith("_prepacked"))
    built = tvm.compile(tvm.IRModule({"main": dense.with_attr("global_symbol", "main")}), target=target)
    assert re.search("vpdpbusd|vpmaddwd", built.mod.inspect_source("asm"))
    data = np.random.default_rng(0).integers(-131, 124, (9, 16)).astype("float32")
    done = schedule_and_run(mod, target, {"x": data})
    np.testing.assert_array_equal(done.outputs[0], data @ (codes * np.float32(0.5)))
