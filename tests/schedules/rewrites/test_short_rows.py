"""Rows whose length is no multiple of a vector's: nothing behind them is loaded."""

from __future__ import annotations

import numpy as np
import pytest
from tvm import s_tir
from tvm.relax import op

from nnfuze_tvm import schedules
from nnfuze_tvm.devices.targets import resolve
from tests.schedules.kernels import fused_kernels, schedule_and_run, single_function


def network(channels: int):
    def body(builder, params):
        data, factor, slope = params
        scaled = builder.emit(op.multiply(data, factor))
        return builder.emit(op.nn.prelu(scaled, slope, axis=2))

    shapes = {"data": (1, 20, channels), "factor": (1, 1, channels), "slope": (channels,)}
    return single_function({name: (shape, "float32") for name, shape in shapes.items()}, body)


@pytest.mark.parametrize(("channels", "alignment"), [(10, 8), (12, 16), (13, 4), (16, 64), (40, 32), (48, 64)])
def test_a_row_is_aligned_as_its_end_is(channels, alignment):
    (kernel,) = fused_kernels(network(channels)).values()
    sch = s_tir.Schedule(kernel)
    schedules.apply(sch, resolve("x86-64-v4"))
    rows = {param.name: param.data_alignment for param in schedules.apply_rewrites(sch.mod["main"]).params}
    assert rows.pop("data") == 64
    assert {rows.pop("factor"), rows.pop("slope")} == {alignment}
    assert set(rows.values()) == {64}


def test_values_stay_the_same():
    rng = np.random.default_rng(0)
    data, factor, slope = (rng.standard_normal(s).astype("float32") for s in ((1, 20, 10), (1, 1, 10), (10,)))
    got = schedule_and_run(network(10), resolve("host"), {"data": data, "factor": factor, "slope": slope})
    scaled = data * factor
    np.testing.assert_allclose(got.outputs[0], np.where(scaled > 0, scaled, scaled * slope), rtol=1e-6)
