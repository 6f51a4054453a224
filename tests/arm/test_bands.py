"""Groups of kernels on emulated boards: the same bits as the kernels one after the other."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices import toolchain
from nnfuze_tvm.devices.boards import BOARDS
from nnfuze_tvm.devices.targets import resolve
from tests.schedules import chains


@pytest.mark.parametrize(("name", "quantized"), [("rpi4", False), ("rpi4", True), ("rpi5", True)])
def test_groups_compute_the_same_bits(
    name: str,
    quantized: bool,
    session: Callable[[str], tvm.rpc.RPCSession],
    board: Callable[[str], str],
    tmp_path: Path,
) -> None:
    target = resolve(name)
    data = np.random.default_rng(1).standard_normal((1, 3, 97, 64)).astype("float32")
    # In float32, 1×1 convolutions with many channels take squares of pixels, of whole rows.
    first, _, depthwise, *_ = chains.INVERTED
    wide = {"kernel": 1, "channels": 64}
    floats = [first, wide, depthwise, wide]
    network = chains.chain(chains.INVERTED if quantized else floats, data.shape)
    _, alone, _ = chains.lowered(network, tmp_path, target, data if quantized else None)
    together = chains.grouped(alone, target, 2, 2)
    assert any(kernel.rule == "bands" for kernel in metrics.kernels(together))
    remote = session(board(str(BOARDS[name].emulated)))
    results = []
    for number, mod in enumerate((alone, together)):
        path = toolchain.export_library(build.generate(mod, target), tmp_path / f"{number}.so", target)
        remote.upload(str(path))
        machine = relax.VirtualMachine(remote.load_module(path.name), remote.cpu())
        machine.set_input("main", tvm.runtime.tensor(data, remote.cpu()))
        machine.invoke_stateful("main")
        results.append(machine.get_outputs("main")[0].numpy())
    np.testing.assert_array_equal(*results)
