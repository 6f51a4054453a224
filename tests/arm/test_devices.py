"""`nnfuze devices emulate` and `check`, as a user runs them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable

import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.devices.remote import tracker as trackers

Board = Callable[[str], str]


@pytest.mark.parametrize(
    ("cpu", "target"),
    [("cortex-a53", "rpi3"), ("cortex-a72", "rpi4"), ("cortex-a76", "rpi5"), ("neoverse-n1", "neoverse-n1"),
     ("max", "aarch64+i8mm"), ("max", "neoverse-v2")],
)  # fmt: skip
def test_a_check_of_the_right_board(
    cpu: str, target: str, tracker: str, board: Board, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.run(["devices", "check", board(cpu), "--tracker", tracker, "--target", target, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["machine"] == "aarch64" and found["problem"] is None
    assert found["kernels"]["int8"]["error"] == 0
    assert found["kernels"]["fp32"]["error"] < 1e-5


def test_a_check_of_another_board(tracker: str, board: Board, capsys: pytest.CaptureFixture[str]) -> None:
    key = board("cortex-a72")
    assert cli.run(["devices", "check", key, "--tracker", tracker, "--target", "rpi5"]) == 2
    assert "dotprod" in capsys.readouterr().err
    key = board("cortex-a76")
    assert cli.run(["devices", "check", key, "--tracker", tracker, "--target", "rpi4", "--json"]) == 0
    assert {"dotprod", "fullfp16"} <= set(json.loads(capsys.readouterr().out)["unused"])


def test_boards_from_the_command_line_end_without_an_error(tracker: str) -> None:
    command = [sys.executable, "-m", "nnfuze_tvm", "devices", "emulate"]
    options = ["--cpu", "cortex-a53", "--tracker", tracker, "--key", "two", "--count", "2"]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    session = trackers.connect(tracker)
    with subprocess.Popen([*command, *options], stderr=subprocess.PIPE, env=env, text=True) as process:
        try:
            assert process.stderr is not None
            assert any("2 × cortex-a53 registered as two" in line for line in process.stderr)
            assert len(trackers.boards(session)["two"].addresses) == 2
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()
    session.close()
