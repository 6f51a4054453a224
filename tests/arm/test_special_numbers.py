"""What NaN, infinities and huge numbers become in 8 bits, on boards; see `tests/passes/lower/integer`."""

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
from tests import special_numbers


@pytest.mark.parametrize(("dtype", "zero_point"), [("int8", 5), ("uint8", 128)])
@pytest.mark.parametrize(("target", "model"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76")])
def test_in_kernels(
    target: str,
    model: str,
    dtype: str,
    zero_point: int,
    tmp_path: Path,
    session: Callable[[str], tvm.rpc.RPCSession],
    board: Callable[[str], str],
) -> None:
    built = build.build(special_numbers.layer(dtype, zero_point), resolve(target))
    path = toolchain.export_library(built, tmp_path / "layer.so", resolve(target))
    remote = session(board(model))
    remote.upload(str(path))
    machine = relax.VirtualMachine(remote.load_module("layer.so"), remote.cpu())
    machine.set_input("main", tvm.runtime.tensor(special_numbers.data(), remote.cpu()))
    machine.invoke_stateful("main")
    got = machine.get_outputs("main")
    for n, right in enumerate(special_numbers.expected(dtype, zero_point)):
        np.testing.assert_array_equal(got[n].numpy(), right)
