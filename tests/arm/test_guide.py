"""docs/raspberry-pi.md, command by command, with an emulated board in place of the Raspberry Pi."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from nnfuze_tvm.devices.remote import emulator
from nnfuze_tvm.devices.remote.secret import VARIABLE

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "docs/raspberry-pi.md"

# `pi:` is a folder; what the guide takes from the board's packages comes from the emulated board's.
SHELL = """
set -e
scp() {
  local last="${@: -1}" part; [ "$last" = pi: ] && last="$BOARD"
  for part in "${@:1:$#-1}"; do
    case "$part" in
      -r) ;;
      pi:*) cp "$SITE/${part#*site-packages/}" "$last" ;;
      *) cp -r "$part" "$last" ;;
    esac
  done
}
"""


def steps() -> list[tuple[str, str, list[str]]]:
    """Where each command of the guide is typed, the command, and the lines that the guide says come out."""
    found: list[tuple[str, str, list[str]]] = []
    block = False
    for line in GUIDE.read_text(encoding="utf-8").splitlines():
        if typed := re.match(r"    (pc|pi)\$ (.*)", line):
            found.append((typed[1], typed[2], []))
            block = True
        elif block and line.startswith("    "):
            found[-1][2].append(line.strip())
        else:
            block = False
    return found


def words(line: str) -> list[str]:
    """What of a line is the same every time: no numbers, units, addresses and frames."""
    return re.findall(r"[^\W\d_]{4,}", line)


@pytest.mark.timeout(1500)
def test_the_guide(tmp_path: Path) -> None:
    at = emulator.folder()
    board, computer = tmp_path / "pi", tmp_path / "pc"
    board.mkdir()
    computer.mkdir()
    for name in ("examples", "pyproject.toml", "nnfuze_tvm", "README.md", "LICENSE"):
        (computer / name).symlink_to(ROOT / name)
    # Enough samples, and inferences, for what an emulated CPU takes half a second for.
    with np.load(ROOT / "examples/speech/calibration.npz") as samples:
        np.savez(computer / "few.npz", audio=samples["audio"][:8])
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    scripts = Path(sys.executable).parent
    env = {
        **os.environ,
        "PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "SITE": str(at / "site"),
        "BOARD": str(board),
        "COLUMNS": "120",
    }
    running: list[subprocess.Popen] = []
    done: list[str] = []
    try:
        for where, command, expected in steps():
            if command.startswith(("python3 -m venv", "pip install", "pip wheel", "scp nnfuze_tvm-")):
                continue  # the emulated board has its packages
            text = command.replace("192.168.1.10:9190", f"127.0.0.1:{port}")
            text = text.replace("nnfuze devices tracker", f"nnfuze devices tracker --port {port}")
            text = text.replace("devices serve", "devices emulate").replace(
                "~/.config/nnfuze/secret", os.environ[VARIABLE]
            )
            text = text.replace("examples/speech/calibration.npz", "few.npz").replace("--repeat 50", "--repeat 2")
            text = text.replace(" --host 192.168.1.10", "").replace(" --host 0.0.0.0", "")
            if where == "pi" and not text.endswith("&"):
                emulated = f"{sys.executable} -m nnfuze_tvm.devices.remote.emulator cortex-a72 "
                text = emulated + text.removeprefix("python ")
            text = re.sub(r"\bnnfuze (?=[a-z])", f"{sys.executable} -m nnfuze_tvm ", text)
            folder = board if where == "pi" else computer
            if text.endswith("&"):
                log = open(tmp_path / f"background-{len(running)}", "wb")
                process = subprocess.Popen(
                    text[:-1].split(), cwd=folder, env=env, stdout=log, stderr=log, start_new_session=True
                )
                running.append(process)
                wait_for(Path(log.name), process)
                continue
            process_done = subprocess.run(
                ["bash", "-c", SHELL + text], cwd=folder, env=env, capture_output=True, text=True, check=False
            )
            assert process_done.returncode == 0, f"{command}\n{process_done.stderr}"
            done.append(f"{where}$ {command}\n{process_done.stdout}")
            came = [words(line) for line in process_done.stdout.splitlines()]
            for line in expected:
                assert words(line) in came, f"{command}\n{line}\n{process_done.stdout}"
    finally:
        for process in running:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        if keep := os.environ.get("NNFUZE_KEEP_GUIDE"):
            Path(keep).write_text("\n".join(done), encoding="utf-8")
    assert (board / "run").exists()
    # What the report calls the bytes of the weights is what went to the board, but for the space between arrays.
    weights = json.loads((board / "out/manifest.json").read_text())["metrics"]["parameter_bytes"]
    assert 0.95 * weights < (board / "out/weights.bin").stat().st_size < 1.1 * weights


def wait_for(log: Path, process: subprocess.Popen) -> None:
    """Wait until a tracker or a board says that it's there."""
    deadline = time.monotonic() + 300
    while "Ctrl-C ends it" not in log.read_text():
        assert process.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.2)
