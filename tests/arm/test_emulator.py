"""Emulated boards: what CPU they show, what they survive, and that nothing of them stays behind."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import psutil
import pytest
import tvm

from nnfuze_tvm.analysis import roofline
from nnfuze_tvm.deploy.manifest import CPU_FLAGS
from nnfuze_tvm.devices import cpu, toolchain
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.remote import emulator
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import DeviceError

Board = Callable[[str], str]


@pytest.mark.parametrize("model", sorted({board.emulated for board in CATALOGUE if board.emulated}))
def test_an_emulated_cpu_has_what_the_boards_it_stands_for_have(model: str, tracker: str, board: Board) -> None:
    remote = open_session(tracker, board(model))
    found = cpu.of(remote)
    assert found is not None and found.machine == "aarch64"
    names = CPU_FLAGS["aarch64"]
    for kind in CATALOGUE:
        if kind.emulated == model:
            assert {names[feature] for feature in kind.features} <= found.flags
    if model in ("cortex-a53", "cortex-a72"):
        assert not found.flags & {"asimddp", "asimdhp", "i8mm", "sve"}


def test_an_instruction_that_the_cpu_lacks_ends_the_session_only(tracker: str, board: Board, tmp_path: Path) -> None:
    target = resolve("aarch64+dotprod")
    mod = roofline.kernels(Hardware.of(target), 1, {})
    path = toolchain.export_library(
        tvm.compile(tvm.IRModule({"int8": mod["int8"]}), target=target), tmp_path / "k.so", target
    )
    shapes = [(1, 6, 256), (1, 64, 8, 4), (1, 6, 8)]
    for model, runs in (("cortex-a76", True), ("cortex-a72", False), ("cortex-a72", False)):
        remote = open_session(tracker, board(model))
        remote.upload(str(path))
        kernel = remote.load_module("k.so")["int8"]
        arrays = [np.ones(shape, dtype) for shape, dtype in zip(shapes, ("uint8", "int8", "int32"), strict=True)]
        arguments = [tvm.runtime.tensor(array, remote.cpu()) for array in arrays]
        if runs:
            kernel(*arguments)
            assert (arguments[2].numpy() == 256 * 64).all()
        else:
            with pytest.raises(Exception, match="SIGILL"):
                kernel(*arguments)


def test_boards_end_with_the_process_that_started_them(tracker: str) -> None:
    code = (
        "import sys, time; from nnfuze_tvm.devices.remote import emulator\n"
        f"with emulator.emulate('cortex-a53', {tracker!r}, 'short-lived') as boards:\n"
        "    print(boards[0].pid, flush=True); time.sleep(600)"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=env, text=True) as process:
        assert process.stdout is not None
        server = psutil.Process(int(process.stdout.readline()))
        process.send_signal(signal.SIGKILL)
        process.wait(60)
    assert not psutil.wait_procs([server], timeout=60)[1]


def test_an_unknown_cpu_and_a_missing_tool(tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with (
        pytest.raises(DeviceError, match=r"no such model; use one of .*cortex-a72"),
        emulator.emulate("cortex-a1", tracker, "x"),
    ):
        pass
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(DeviceError, match="sudo apt-get install qemu-user mmdebstrap"):
        emulator.folder()


def test_a_download_that_fails_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    failing = tmp_path / "mmdebstrap"
    failing.write_text("#!/bin/sh\nmkdir $6\necho 'E: no network' >&2\nexit 25\n")
    failing.chmod(stat.S_IRWXU)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for _ in range(2):
        with pytest.raises(DeviceError, match="mmdebstrap failed while an emulated board was made: E: no network"):
            emulator.folder()
    assert not list((tmp_path / "cache/nnfuze/boards").glob("aarch64-*"))


def test_a_cached_folder_is_taken_at_once() -> None:
    emulator.folder()
    start = time.monotonic()
    assert (emulator.folder() / "root/usr/bin/python3.11").exists()
    assert time.monotonic() - start < 5


def open_session(address: str, key: str) -> tvm.rpc.RPCSession:
    return trackers.request(trackers.connect(address), key, 300)[0]
