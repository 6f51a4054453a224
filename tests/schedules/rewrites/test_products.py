"""Products that are added are rounded by themselves where codes are made, on every instruction set."""

from __future__ import annotations

import re
from collections.abc import Callable

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.evaluate import evaluate
from tests.schedules import kernels

Join = Callable[[relax.Expr, relax.Expr], relax.Expr]

FUSED = re.compile(r"\tvfn?m(add|sub)|\tfml[as]|\tvfma")


def activation(scale: float, shift: float, codes: bool = True, join: Join = op.add) -> tvm.IRModule:
    """Return what multiplies and adds numbers that come from integers, and perhaps makes codes of them."""

    def body(builder: relax.BlockBuilder, params: list[relax.Expr]) -> relax.Expr:
        numbers = builder.emit(op.astype(params[0], "float32"))
        product = builder.emit(op.multiply(numbers, relax.const(np.float32(scale))))
        value = builder.emit(join(product, relax.const(np.float32(shift))))
        if not codes:
            return value
        whole = builder.emit(op.astype(builder.emit(op.round(value)), "int32"))
        return builder.emit(op.astype(builder.emit(op.clip(whole, -127, 127)), "int8"))

    return kernels.single_function({"x": ((8, 256), "int32")}, body)


@pytest.mark.parametrize("join", [op.add, op.subtract], ids=["add", "subtract"])
@pytest.mark.parametrize("target", ["x86-64-v3", "x86-64-v4", "rpi3"])
def test_codes_are_made_without_fused_additions(target: str, join: Join) -> None:
    assert not FUSED.search(kernels.assembly(activation(0.3, 0.7, join=join), resolve(target)))
    # Floats may be rounded once.
    assert FUSED.search(kernels.assembly(activation(0.3, 0.7, codes=False, join=join), resolve(target)))


@pytest.mark.parametrize(("join", "shift"), [(op.add, 0.3), (op.subtract, 0.7)], ids=["add", "subtract"])
def test_numbers_between_two_codes_are_rounded_as_numpy_does(join: Join, shift: float) -> None:
    x = np.arange(-1024, 1024, dtype="int32").reshape(8, 256)
    signed = np.float64(np.float32(shift)) * (1 if join is op.add else -1)
    once = np.rint((x * np.float64(np.float32(0.1)) + signed).astype("float32"))
    mod = activation(0.1, shift, join=join)
    (want,) = evaluate(mod["main"], {"x": x})
    assert (np.clip(once, -127, 127) != want).any()
    np.testing.assert_array_equal(kernels.schedule_and_run(mod, resolve("host"), {"x": x}).outputs[0], want)
