"""Sums of the lowest int8 numbers there are, which two products at a time would leave int16."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices import toolchain
from nnfuze_tvm.devices.targets import resolve

ZERO = 3


def layer(kind: str, weight: int) -> tuple[tvm.IRModule, tuple[int, ...]]:
    """A layer whose weights all have the code ``weight``, on data with a zero point, and the shape of its data."""
    shape, weight_shape = ((1, 32, 4, 4), (16, 32, 1, 1)) if kind == "conv2d" else ((1, 32), (32, 16))
    one, zero = relax.const(np.float32(1.0)), relax.const(np.int8(ZERO))
    builder = relax.BlockBuilder()
    data = relax.Var("x", relax.TensorType(shape, "float32"))
    with builder.function("main", [data]):
        with builder.dataflow():
            codes = builder.emit(relax.op.quantize(data, one, zero, axis=0, out_dtype="int8"))
            value = builder.emit(relax.op.dequantize(codes, one, zero, axis=0, out_dtype="float32"))
            stored = relax.const(np.full(weight_shape, weight, "int8"))
            none = relax.const(np.int8(0))
            weights = builder.emit(relax.op.dequantize(stored, one, none, axis=0, out_dtype="float32"))
            emitted = relax.op.nn.conv2d(value, weights) if kind == "conv2d" else relax.op.matmul(value, weights)
            result = builder.emit_output(relax.Tuple([builder.emit(emitted)]))
        builder.emit_func_output(result)
    return builder.get(), shape


@pytest.mark.parametrize("kind", ["conv2d", "matmul"])
@pytest.mark.parametrize("weight", [-127, -128])
@pytest.mark.parametrize("target", ["rpi4", "rpi5", "aarch64+i8mm"])
def test_lowest_numbers(
    target: str,
    weight: int,
    kind: str,
    tmp_path: Path,
    session: Callable[[str], tvm.rpc.RPCSession],
    board: Callable[[str], str],
) -> None:
    model = {"rpi4": "cortex-a72", "rpi5": "cortex-a76", "aarch64+i8mm": "max"}[target]
    mod, shape = layer(kind, weight)
    path = toolchain.export_library(build.build(mod, resolve(target)), tmp_path / "layer.so", resolve(target))
    remote = session(board(model))
    remote.upload(str(path))
    machine = relax.VirtualMachine(remote.load_module("layer.so"), remote.cpu())
    x = np.full(shape, -128 - ZERO, "float32")  # the code -128
    machine.set_input("main", tvm.runtime.tensor(x, remote.cpu()))
    machine.invoke_stateful("main")
    got = machine.get_outputs("main")[0].numpy()
    np.testing.assert_array_equal(got, np.full(got.shape, 32 * (-128 - ZERO) * weight, "float32"))
