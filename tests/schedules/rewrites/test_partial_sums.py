"""Float16 sums of many products: ones add up beyond 2048, where float16 knows even numbers only."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, s_tir

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.targets import resolve
from tests.schedules.kernels import fused_kernels, schedule_and_run, single_function


def convolution(size, channels, out, kernel):
    weights = np.ones((out, kernel, kernel, channels), "float16")

    def body(builder, params):
        layouts = {"data_layout": "NHWC", "kernel_layout": "OHWI"}
        conv = builder.emit(relax.op.nn.conv2d(params[0], relax.const(weights), **layouts))
        return builder.emit(relax.op.nn.relu(conv))

    return single_function({"x": ((1, *size, channels), "float16")}, body)


def product(rows, depth, columns):
    weights = np.ones((depth, columns), "float16")
    return single_function(
        {"x": ((rows, depth), "float16")},
        lambda builder, params: builder.emit(relax.op.matmul(params[0], relax.const(weights))),
    )


@pytest.mark.parametrize("seed", [None, 1, 2])
@pytest.mark.parametrize(
    ("mod", "count"),
    [
        (convolution((3, 5), 4096, 16, 1), 4096),
        (convolution((7, 9), 512, 24, 3), 9 * 512),
        (convolution((9, 8), 120, 5, 5), 25 * 120),
        (product(1, 3000, 40), 3000),
        (product(7, 3002, 12), 3002),
    ],
)
def test_ones_are_counted(mod, count, seed):
    shape = [int(extent) for extent in mod["main"].params[0].ty.shape]
    ones = {"x": np.ones(shape, "float16")}
    (got,) = schedule_and_run(mod, resolve("host"), ones, tunable=seed is not None, seed=seed or 1).outputs
    assert got.dtype == np.float16 and (got == count).all()


@pytest.mark.parametrize(("channels", "parts"), [(16, False), (64, True)])
def test_short_reductions_stay_one_sum(channels, parts):
    (kernel,) = fused_kernels(convolution((8, 8), channels, 16, 3)).values()
    sch = s_tir.Schedule(kernel)
    assert schedules.apply(sch, resolve("rpi5")) == "conv2d"
    assert ("float32" in schedules.apply_rewrites(sch.mod["main"]).script()) == parts
