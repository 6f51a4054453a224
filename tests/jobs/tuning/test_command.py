"""``nnfuze tune`` with TVM's own tracker, started by somebody else, killed and started again."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import onnx
import pytest

from benchmarks.networks import build
from nnfuze_tvm.devices.remote import tracker as devices
from nnfuze_tvm.jobs import tuning
from tests.servers import KEY, free_port, running_board

TRIALS = 6


@pytest.fixture
def boards() -> Iterator[str]:
    """Start TVM's own tracker and two boards under it, all without a secret; the tracker's address."""
    port = free_port()
    address = f"127.0.0.1:{port}"
    ports = ["--host", "127.0.0.1", "--port", str(port), "--port-end", str(port + 1)]
    command = [sys.executable, "-m", "tvm.exec.rpc_tracker", *ports]
    with (
        running_board(port, None),
        running_board(port, None),
        subprocess.Popen(
            command, start_new_session=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        ) as process,
    ):
        try:
            devices.wait_for_device(devices.connect(devices.Place(address, None), 60.0), KEY, 60.0, count=2)
            yield address
        finally:
            os.killpg(process.pid, signal.SIGKILL)


def test_two_boards_and_a_job_that_is_killed(boards: str, tmp_path: Path) -> None:
    onnx.save(build("mlp_autoencoder"), tmp_path / "net.onnx")
    work = tmp_path / "job"
    command = [sys.executable, "-m", "nnfuze_tvm", "tune", "--work-dir", str(work)]
    start = [
        *command,
        str(tmp_path / "net.onnx"),
        "--tracker",
        boards,
        "--insecure",
        "--key",
        KEY,
        "--trials",
        str(TRIALS),
    ]
    journal = work / "journal.jsonl"
    with subprocess.Popen(start, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            assert process.poll() is None
            time.sleep(0.02)
        process.kill()
    before = tuning.read_journal(work)
    assert len(before) >= 8

    again = subprocess.run(command, capture_output=True, text=True, timeout=240)
    assert again.returncode == 0, again.stderr
    trials = tuning.read_journal(work)
    assert trials[: len(before)] == before
    assert len(trials) > len(before)
    assert max(Counter((t.kernel, t.decisions) for t in trials).values()) == 1
    assert max(Counter(t.kernel for t in trials).values()) <= TRIALS
    assert len({t.device for t in trials if t.device}) == 2
    assert all(t.seconds for t in trials)
