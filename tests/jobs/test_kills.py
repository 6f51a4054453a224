"""Compilations that are ended at any moment: the bundle that was there is whole, and the next one finds nothing."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import onnx
import pytest

from nnfuze_tvm.deploy import bundle
from nnfuze_tvm.deploy.manifest import read_manifest
from nnfuze_tvm.devices import scratch
from tests.bundles import write_tiny_bundle
from tests.tiny_networks import classifier

ENDS = [signal.SIGINT, signal.SIGTERM, signal.SIGKILL]


def kill(folder: Path, number: signal.Signals, after: float) -> None:
    """Compile over a bundle, end that after some seconds, and check what it said and that the bundle is whole."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TMPDIR": str(folder / "tmp")}
    command = [sys.executable, "-m", "nnfuze_tvm", "compile", str(folder / "net.onnx"), "-o", str(folder / "out")]
    job = subprocess.Popen(
        [*command, "--force", "--no-compare"],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        # A shell's background jobs ignore interrupts.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    time.sleep(after)
    job.send_signal(number)
    _, said = job.communicate(timeout=120)
    bundle.check_files(folder / "out", read_manifest(folder / "out"))
    # Python itself takes a moment until anything of ours runs.
    if number != signal.SIGKILL and job.returncode not in (0, -number) and after > 1:
        assert (job.returncode, said.splitlines()[-1]) == (130, "error: interrupted")


def check(folder: Path, count: int, seconds: float) -> None:
    (folder / "tmp").mkdir()
    onnx.save(classifier(), folder / "net.onnx")
    write_tiny_bundle(folder / "out")
    moments = random.Random(0)
    for n in range(count):
        kill(folder, ENDS[n % len(ENDS)], moments.uniform(0.1, seconds))
    # What the next start does; linkers that it left end with what they were doing.
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        bundle.check_destination(folder / "out", force=True)
        scratch.sweep(folder / "tmp")
        if not list((folder / "tmp").iterdir()):
            break
        time.sleep(0.2)
    assert sorted(path.name for path in folder.iterdir()) == ["net.onnx", "out", "tmp"]
    assert not list((folder / "tmp").iterdir())


def test_kills(tmp_path: Path) -> None:
    check(tmp_path, 3, 2.0)


@pytest.mark.slow
def test_many_kills(tmp_path: Path) -> None:
    check(tmp_path, 60, 5.0)
