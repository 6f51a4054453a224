"""What runs a bundle on the board itself, with nothing of TVM but its runtime, and `nnfuze deploy` from outside."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import tvm_ffi

from nnfuze_tvm import cli
from nnfuze_tvm.deploy.bundle import Bundle
from nnfuze_tvm.deploy.deployment import deploy
from nnfuze_tvm.deploy.runner import made_up
from nnfuze_tvm.devices.remote import emulator
from tests import streaming_networks
from tests.tiny_networks import samples, save_pair

ROOT = Path(__file__).parents[2]
PROGRAMS = ROOT / "examples/board"
MODEL = "cortex-a72"


@pytest.fixture(scope="module")
def bundles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of networks in int8 for this machine and for two kinds of boards."""
    folder = tmp_path_factory.mktemp("bundles")
    models = save_pair(folder)
    np.savez(folder / "calibration.npz", x=samples())
    options = ["--quantize", "int8", "--calibration", str(folder / "calibration.npz"), "--no-compare"]
    for target in ("host", "rpi4", "rpi5"):
        assert cli.run(["compile", *models, *options, "--target", target, "-o", str(folder / target)]) == 0
    return folder


@pytest.fixture(scope="module")
def answers(bundles: Path) -> dict[str, np.ndarray]:
    """What this machine says to the made-up input; its file is ``x.npy`` beside the bundles."""
    bundle = Bundle.load(bundles / "host")
    sample = made_up(bundle.inputs)
    np.save(bundles / "x.npy", sample["x"])
    return bundle.run(sample)  # type: ignore[return-value]


def check(printed: str, answers: dict[str, np.ndarray]) -> None:
    found = {task: values for task, *values in map(str.split, printed.splitlines())}
    assert found.keys() == answers.keys()
    for task, values in answers.items():
        np.testing.assert_array_equal(np.array(found[task], "float32"), values.ravel())


def run(command: list[str], **options: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, capture_output=True, text=True, check=False, **options)  # type: ignore[call-overload]


@pytest.mark.parametrize(("target", "model"), [("rpi4", "cortex-a72"), ("rpi5", "cortex-a76"), ("rpi4", "max")])
def test_deploy(
    target: str,
    model: str,
    bundles: Path,
    answers: dict[str, np.ndarray],
    tracker: str,
    board: Callable[[str], str],
) -> None:
    found = deploy(bundles / target, tracker, board(model), repeat=2)
    for task, values in answers.items():
        np.testing.assert_array_equal(found.answers[task], values)


def test_deploy_to_a_cpu_that_lacks_something(
    bundles: Path, tracker: str, board: Callable[[str], str], capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["deploy", str(bundles / "rpi5"), "--tracker", tracker, "--key", board(MODEL)]
    assert cli.run(command) == 2
    error = capsys.readouterr().err.splitlines()
    assert re.search(r"made for a CPU with .*dotprod.* \(cortex-a76\), which the board lacks", error[-1])
    assert not any("upload" in line for line in error)


def test_python_program(bundles: Path, answers: dict[str, np.ndarray]) -> None:
    command, env = emulator.python(MODEL, emulator.folder())
    done = run([*command, str(PROGRAMS / "run.py"), "rpi4", "x=x.npy"], cwd=bundles, env=env)
    assert done.returncode == 0, done.stderr
    check(done.stdout, answers)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the C program and TVM's two libraries: all that a board without Python needs."""
    site = emulator.folder() / "site"
    folder = tmp_path_factory.mktemp("board")
    for library in ("tvm/lib/libtvm_runtime.so", "tvm_ffi/lib/libtvm_ffi.so"):
        shutil.copy(site / library, folder)
    compiler = [sys.executable, "-m", "ziglang", "cc", "-target", "aarch64-linux-gnu.2.28", "-O2", "-s"]
    compiler += ["-Wall", "-Werror"]
    libraries = ["-Wl,--no-as-needed", "-L", str(folder), "-ltvm_runtime", "-ltvm_ffi"]
    include = ["-I", str(Path(tvm_ffi.__file__).parent / "include")]
    done = run([*compiler, str(PROGRAMS / "run.c"), "-o", str(folder / "run"), *include, *libraries])
    assert done.returncode == 0, done.stderr
    return folder


def c_program(program: Path) -> list[str]:
    emulated = ["qemu-aarch64", "-cpu", MODEL, "-L", str(emulator.folder() / "root")]
    return [*emulated, "-E", f"LD_LIBRARY_PATH={program}", str(program / "run")]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pipeline that keeps states, for this machine and for a board, and inputs of five calls."""
    folder = tmp_path_factory.mktemp("pipeline")
    models = streaming_networks.wake_words()
    for name, model in models.items():
        onnx.save(model, folder / f"{name}.onnx")
    links = ["--chain", "frames=mel:mel[10]", "--chain", "features=embedding:0[16]", "--no-compare"]
    for target in ("host", "rpi4"):
        files = [str(folder / f"{name}.onnx") for name in models]
        assert cli.run(["compile", *files, *links, "--target", target, "-o", str(folder / target)]) == 0
    np.save(folder / "audio.npy", np.random.default_rng(0).standard_normal((5, 1, 1, 640)).astype("float32"))
    return folder


def test_states_on_the_board(program: Path, pipeline: Path, tracker: str, board: Callable[[str], str]) -> None:
    """Five calls in a row, in Python, in C and over RPC, are what this machine makes of them."""
    audio = np.load(pipeline / "audio.npy")
    here = Bundle.load(pipeline / "host")
    wanted = [here.run({"audio": call}) for call in audio]
    want = {task: np.stack([np.ravel(call[task]) for call in wanted]) for task in here.tasks}
    python, env = emulator.python(MODEL, emulator.folder())
    for command in ([*python, str(PROGRAMS / "run.py")], c_program(program)):
        done = run([*command, "rpi4", "audio=audio.npy"], cwd=pipeline, env=env if command[0] == python[0] else None)
        assert done.returncode == 0, done.stderr
        lines = [line.split() for line in done.stdout.splitlines()]
        for task, values in want.items():
            found = [list(map(float, numbers)) for name, *numbers in lines if name == task]
            np.testing.assert_allclose(found, values, rtol=0, atol=1e-5 * np.abs(values).max())
    found = deploy(pipeline / "rpi4", tracker, board(MODEL), {"audio": audio[:, 0]}, repeat=1).answers
    for task, values in want.items():
        np.testing.assert_allclose(found[task].reshape(values.shape), values, rtol=0, atol=1e-5 * np.abs(values).max())


def test_c_program(program: Path, bundles: Path, answers: dict[str, np.ndarray]) -> None:
    emulated = c_program(program)
    done = run([*emulated, "rpi4", "x=x.npy"], cwd=bundles)
    assert done.returncode == 0, done.stderr
    check(done.stdout, answers)
    mistakes = [[], ["rpi4"], ["rpi4", "x"], ["rpi4", "x=rpi4/lib.so"], ["none"], ["host", "x=x.npy"]]
    for mistake in mistakes:
        done = run([*emulated, *mistake], cwd=bundles)
        assert done.returncode == 2, done.stderr
        assert done.stderr.startswith("error: ")
        assert len(done.stderr.splitlines()) == 1
