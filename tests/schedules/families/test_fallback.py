from __future__ import annotations

import numpy as np
import pytest
from tvm import relax, s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.schedules.families import fallback
from tests.helpers import evaluate_module
from tests.schedules import kernels

OP = relax.op


def _weights(*shape):
    return relax.const(np.random.default_rng(0).standard_normal(shape).astype("float32"))


# Name → (input shape, expression).
KERNELS = {
    "conv1d": ((1, 4, 24), lambda x: OP.nn.conv1d(x, _weights(8, 4, 3), 1, 1)),
    "adaptive_pool": ((1, 7, 7, 24), lambda x: OP.nn.adaptive_avg_pool2d(x, (3, 3), layout="NHWC")),
    "softmax_over_middle": ((2, 6, 20), lambda x: OP.nn.softmax(x, 1)),
    "sum_of_all": ((6, 70), lambda x: OP.sum(x)),
    "group_norm": ((1, 24, 7, 7), lambda x: OP.nn.group_norm(x, _weights(24), _weights(24), 4, 1, [2, 3])),
    "scatter": (
        (4, 6),
        lambda x: OP.scatter_elements(x, relax.const(np.zeros((1, 6), "int64")), _weights(1, 6)),
    ),
    "cumsum": ((3, 24), lambda x: OP.cumsum(x, 1)),
    "topk": ((3, 24), lambda x: OP.topk(x, 3)),
    "resize": ((1, 8, 5, 24), lambda x: OP.image.resize2d(x, (16, 10), layout="NHWC", method="linear")),
    "take": ((8, 24), lambda x: OP.take(x, relax.const(np.array([1, 3, 5], "int64")), axis=0)),
    "conv2d_transpose": (
        (1, 4, 6, 6),
        lambda x: OP.nn.conv2d_transpose(x, _weights(4, 8, 3, 3), strides=(2, 2), padding=(1, 1)),
    ),
}


def module(name):
    shape, build = KERNELS[name]
    mod = kernels.single_function(
        {"x": (shape, "float32")}, lambda builder, variables: builder.emit(build(variables[0]))
    )
    return mod, np.random.default_rng(1).standard_normal(shape).astype("float32")


def compare(got, expected):
    for ours, reference in zip(got, expected, strict=True):
        np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_whatever_the_rules_do_with_it_the_result_stays(name):
    mod, x = module(name)
    target = resolve("host")
    compare(kernels.schedule_and_run(mod, target, {"x": x}).outputs, evaluate_module(mod, {"x": x}))


@pytest.mark.parametrize("name", sorted(KERNELS))
def test_the_fallback_itself_takes_everything(name, monkeypatch):
    monkeypatch.setattr("nnfuze_tvm.schedules.RULES", (fallback.RULE,))
    mod, x = module(name)
    target = resolve("host")
    got = kernels.schedule_and_run(mod, target, {"x": x})
    assert set(got.rules.values()) <= {"fallback"}
    compare(got.outputs, evaluate_module(mod, {"x": x}))


def test_an_illegal_step_leaves_the_schedule_as_it_was():
    mod, _ = module("conv1d")
    kernel = next(kernel for name, kernel in kernels.fused_kernels(mod).items() if "conv1d" in name)
    sch = s_tir.Schedule(kernel)
    before = sch.mod.script()
    last = fallback.blocks(sch)[-1]
    assert not fallback.attempt(lambda: sch.compute_inline(last))
    assert sch.mod.script() == before


def test_a_kernel_without_blocks_gets_one():
    mod, _ = module("scatter")
    for kernel in kernels.fused_kernels(mod).values():
        sch = s_tir.Schedule(kernel)
        assert fallback.apply(sch, Hardware.of(resolve("host")), False)
        wrapped = fallback.with_block(sch)
        assert isinstance(wrapped.body, s_tir.SBlockRealize) and wrapped.body.block.name_hint == "root"
