from __future__ import annotations

import numpy as np
import pytest
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.devices.targets import resolve
from tests.schedules import kernels


@pytest.mark.parametrize("shape", [(1, 24, 24, 3), (1, 3, 24, 24)])
@pytest.mark.parametrize(("target", "vector"), [("rpi5", "frinti\tv"), ("x86-64-v3", "vroundps")])
def test_floats_are_quantized_in_vectors(shape, target, vector):
    def body(builder, variables):
        y = builder.emit(op.round(builder.emit(op.divide(variables[0], relax.const(np.float32(0.0173))))))
        return builder.emit(op.astype(builder.emit(op.clip(y, -127, 127)), "int8"))

    assembly = kernels.assembly(kernels.single_function({"x": (shape, "float32")}, body), resolve(target))
    assert vector in assembly
    assert not any(scalar in assembly for scalar in ("fdiv\ts", "vdivss"))
