"""`nnfuze devices` with real trackers and servers on this machine."""

from __future__ import annotations

import json
import os
import pwd
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil
import pytest
import tvm

from nnfuze_tvm import cli
from nnfuze_tvm.analysis import roofline
from nnfuze_tvm.analysis.device_check import check_device
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.devices.remote import secret
from nnfuze_tvm.devices.remote import tracker as trackers
from nnfuze_tvm.devices.remote.tracker import EmbeddedTracker
from tests.servers import embedded

NOBODY = 65534


@pytest.fixture(scope="module")
def running() -> Iterator[EmbeddedTracker]:
    with embedded(servers=2, key="here") as found:
        yield found


@contextmanager
def command(*arguments: str) -> Iterator[subprocess.Popen]:
    """Run a command that serves until it is told to end, and see that it does."""
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(
        [sys.executable, "-m", "nnfuze_tvm", "devices", *arguments], stderr=subprocess.PIPE, env=env, text=True
    ) as process:
        try:
            yield process
            process.send_signal(signal.SIGTERM)
            assert process.wait(20) == 0
        finally:
            process.kill()


def error_of(capfd: pytest.CaptureFixture[str], *arguments: str) -> str:
    capfd.readouterr()
    assert cli.run(["devices", *arguments]) == 2
    lines = [line for line in capfd.readouterr().err.splitlines() if not line.startswith("nnfuze: ")]
    assert len(lines) == 1
    return lines[0]


def test_the_catalogue_is_a_table_or_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["devices"]) == 0
    table = capsys.readouterr().out
    assert all(board.name in table for board in CATALOGUE)
    assert cli.run(["devices", "--json"]) == 0
    boards = {board["name"]: board for board in json.loads(capsys.readouterr().out)}
    assert boards["rpi4"]["triple"] == "aarch64-linux-gnu"
    assert boards["rpi5"]["features"] == ["neon", "dotprod", "fullfp16"]


def test_a_listing_says_what_is_free(running: EmbeddedTracker, capsys: pytest.CaptureFixture[str]) -> None:
    # Another test's session may be about to end.
    deadline = time.monotonic() + 30
    while listed(running, capsys) != (2, 2, 0):
        assert time.monotonic() < deadline
    remote, _ = trackers.request(trackers.connect(running.address), "here")
    assert listed(running, capsys) == (2, 1, 1)
    del remote
    assert cli.run(["devices", "list", "--tracker", running.address]) == 0
    assert "here" in capsys.readouterr().out


def listed(running: EmbeddedTracker, capsys: pytest.CaptureFixture[str]) -> tuple[int, int, int]:
    capsys.readouterr()
    assert cli.run(["devices", "list", "--tracker", running.address, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)["here"]
    return len(found["addresses"]), found["free"], found["in_use"]


def test_a_check_of_this_machine(running: EmbeddedTracker, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["devices", "check", "here", "--tracker", running.address, "--target", "host"]
    assert cli.run(arguments) == 0
    assert "exact" in capsys.readouterr().out
    assert cli.run([*arguments, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["problem"] is None
    assert found["kernels"]["int8"]["error"] == 0
    assert 0 < found["kernels"]["fp32"]["error"] < 1e-5
    assert found["kernels"]["fp32"]["rate"] > 1e8


def test_a_check_finds_another_cpu(running: EmbeddedTracker, capfd: pytest.CaptureFixture[str]) -> None:
    other = "x86-64-v3" if os.uname().machine == "aarch64" else "rpi4"
    error = error_of(capfd, "check", "here", "--tracker", running.address, "--target", other)
    assert "made for" in error and "the board is" in error


def test_a_check_finds_wrong_results(running: EmbeddedTracker, monkeypatch: pytest.MonkeyPatch) -> None:
    right = roofline.kernels

    def wrong(*arguments: Any) -> tvm.IRModule:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(roofline, "DOT_REPEATS", roofline.DOT_REPEATS + 1)
            return right(*arguments)

    monkeypatch.setattr(roofline, "kernels", wrong)
    found = check_device(running.place, "here", "host", 10, lambda _: None)
    assert found.problem == "the int8 kernel computed something else than NumPy does"


def test_a_board_and_a_tracker_from_the_command_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    address = f"127.0.0.1:{port}"
    # The board is there before its tracker; root becomes somebody else.
    user = pwd.getpwuid(NOBODY if os.geteuid() == 0 else os.geteuid())
    with command("serve", "--tracker", address, "--key", "mine", "--user", user.pw_name) as board:
        assert board.stderr is not None
        assert "trying again" in board.stderr.readline()
        with command("tracker", "--port", str(port)) as tracker:
            session = trackers.connect(address, 60)
            assert len(trackers.wait_for_device(session, "mine", 60)) == 1
            remote, _ = trackers.request(session, "mine")
            remote.upload(bytearray(b"x"), "file")
            assert remote.download("file") == b"x"
            serving = psutil.Process(board.pid)
            assert {user.pw_uid} == {uid for p in (serving, *serving.children()) for uid in p.uids()}
            assert {"127.0.0.1"} == {host for pid in (board.pid, tracker.pid) for host in listening(pid)}
            del remote
            session.close()


def listening(pid: int) -> set[str]:
    connections = psutil.Process(pid).net_connections()
    return {connection.laddr.ip for connection in connections if connection.status == psutil.CONN_LISTEN}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["check", "kitchen", "--tracker", "TRACKER"], "no board of the catalogue; say what it should be"),
        (["check", "rpi4", "--tracker", "TRACKER", "--wait", "0.1"], "no device under key 'rpi4' after 0.1 s"),
        (["check", "here", "--tracker", "TRACKER", "--target", "rpi9"], "unknown; use one of host, rpi3, rpi4"),
        (["list", "--tracker", "nowhere"], "write it as host:port"),
        (["serve", "--tracker", "nowhere", "--key", "x"], "write it as host:port"),
        (["emulate", "--cpu", "cortex-a72", "--key", "x"], "Missing option '--tracker'"),
        (["emulate", "--tracker", "127.0.0.1:1", "--key", "x"], "device 'x': no board that can be emulated"),
        (["tracker", "--port", "TRACKER"], "give another --port"),
        (["tracker", "--host", "192.0.2.1"], "can't listen on 192.0.2.1, port 9190"),
        (["serve", "--tracker", "192.0.2.1:9190", "--key", "x"], "whose clients don't reach 127.0.0.1; give --host"),
        (["serve", "--tracker", "TRACKER", "--key", "x", "--user", "no-such-user"], "there is no such user"),
        (["serve", "--tracker", "TRACKER", "--key", "x", "--session-limit", "nan"], "'--session-limit'"),
        (["list", "--tracker", "TRACKER", "--insecure", "--wait", "0.1"], "perhaps it asks for a secret"),
        (["list", "--tracker", "TRACKER", "--secret-file", "OTHER"], "it has another secret"),
        (["list", "--tracker", "TRACKER", "--secret-file", "/nowhere"], "secret file /nowhere: there is none"),
    ],
)
def test_mistakes(
    running: EmbeddedTracker, capfd: pytest.CaptureFixture[str], arguments: list[str], message: str, tmp_path: Path
) -> None:
    secret.read_or_make(tmp_path / "secret")
    port = running.address.rpartition(":")[2]
    given = {"TRACKER": port if arguments[0] == "tracker" else running.address}
    given["OTHER"] = str(tmp_path / "secret")
    assert message in error_of(capfd, *(given.get(argument, argument) for argument in arguments))


def test_an_emulator_that_is_not_installed(
    running: EmbeddedTracker, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    error = error_of(capfd, "emulate", "--cpu", "cortex-a72", "--tracker", running.address, "--key", "x")
    assert "needs the Debian packages qemu-user and mmdebstrap" in error
