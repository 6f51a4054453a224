"""Whatever a user gets wrong: one line on stderr that says what and where, exit code 2, nothing left behind."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import external_data_helper

from nnfuze_tvm import cli
from nnfuze_tvm.deploy.bundle import read_manifest
from nnfuze_tvm.deploy.manifest import TargetRecord
from nnfuze_tvm.jobs import compile as compiling
from nnfuze_tvm.jobs import write_bundle
from tests.servers import embedded
from tests.tiny_networks import classifier, samples, save_pair

Fails = Callable[..., str]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


@pytest.fixture(scope="module")
def bundle(models: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("bundle") / "out"
    assert cli.run(["compile", *models, "-o", str(out), "--no-compare", "--json"]) == 0
    return out


@pytest.fixture
def fails(capfd: pytest.CaptureFixture[str]) -> Fails:
    """Run a command that must fail as it should, and return its one line."""

    def run(*arguments: str | Path) -> str:
        capfd.readouterr()
        code = cli.run([str(argument) for argument in arguments])
        captured = capfd.readouterr()
        assert code == 2, captured.err
        return one_line(captured.err)

    return run


def one_line(stderr: str) -> str:
    lines = [line for line in stderr.splitlines() if not line.startswith("nnfuze: ")]
    assert len(lines) == 1, stderr
    assert lines[0].startswith("error: ")
    assert "Traceback" not in stderr
    return lines[0].removeprefix("error: ")


@pytest.fixture
def out(tmp_path: Path) -> Iterator[Path]:
    """Where a bundle would go; at the end nothing may be there."""
    directory = tmp_path / "outputs"
    directory.mkdir()
    yield directory / "out"
    if directory.is_dir():
        assert list(directory.iterdir()) == []


class TestModels:
    def test_missing_file(self, fails: Fails, out: Path, tmp_path: Path) -> None:
        assert "nowhere.onnx" in fails("compile", tmp_path / "nowhere.onnx", "-o", out)

    def test_not_onnx(self, fails: Fails, out: Path, tmp_path: Path) -> None:
        (tmp_path / "photo.onnx").write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(range(256)))
        assert "photo.onnx" in fails("compile", tmp_path / "photo.onnx", "-o", out)

    def test_truncated(self, fails: Fails, out: Path, models: list[str], tmp_path: Path) -> None:
        data = Path(models[0]).read_bytes()
        for part in (len(data) // 2, 1, 0):
            (tmp_path / "cut.onnx").write_bytes(data[:part])
            assert "cut.onnx" in fails("compile", tmp_path / "cut.onnx", "-o", out)

    def test_unsupported_operators_are_all_named(self, fails: Fails, out: Path, tmp_path: Path) -> None:
        model = classifier()
        for node, op in zip(model.graph.node[1:3], ("Wobble", "Gargle"), strict=True):
            node.op_type, node.domain = op, "com.acme"
        model.opset_import.append(onnx.helper.make_opsetid("com.acme", 1))
        onnx.save(model, tmp_path / "strange.onnx")
        line = fails("compile", tmp_path / "strange.onnx", "-o", out)
        assert "Wobble" in line
        assert "Gargle" in line

    def test_external_data_missing(self, fails: Fails, out: Path, tmp_path: Path) -> None:
        model = classifier()
        external_data_helper.convert_model_to_external_data(model, location="weights.bin", size_threshold=0)
        onnx.save(model, tmp_path / "big.onnx")
        (tmp_path / "weights.bin").unlink()
        assert "weights.bin" in fails("compile", tmp_path / "big.onnx", "-o", out)

    def test_shared_inputs_that_disagree(self, fails: Fails, out: Path, tmp_path: Path) -> None:
        onnx.save(classifier(), tmp_path / "small.onnx")
        onnx.save(classifier(shape=(1, 2, 8, 8)), tmp_path / "large.onnx")
        two = [tmp_path / "small.onnx", tmp_path / "large.onnx"]
        line = fails("compile", *two, "--share-input", "x", "-o", out)
        assert "'x'" in line
        assert "8" in line
        assert "microphone" in fails("compile", *two, "--share-input", "microphone", "-o", out)

    def test_two_tasks_of_one_name(self, fails: Fails, out: Path, models: list[str]) -> None:
        assert "'a'" in fails("compile", f"a={models[0]}", f"a={models[1]}", "-o", out)

    def test_shapes(self, fails: Fails, out: Path, models: list[str]) -> None:
        assert "--shape x: write it as name=1,3,224,224" in fails("compile", *models, "--shape", "x", "-o", out)
        assert "--shape x=1,-2" in fails("compile", *models, "--shape", "x=1,-2", "-o", out)
        assert "'z'" in fails("compile", *models, "--shape", "z=1,2", "-o", out)
        assert "x" in fails("compile", *models, "--shape", "x=1,9,6,6", "-o", out)


class TestData:
    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"y": samples()}, "'y'"),
            ({}, "holds no arrays"),
            ({"x": samples()[:, :1]}, "[6, 1, 6, 6]"),
            ({"x": samples().astype(np.int32)}, "int32"),
            ({"x": np.full((2, 2, 6, 6), np.nan, np.float32)}, "NaN"),
            ({"x": samples()[:0]}, "empty"),
        ],
        ids=["name", "none", "shape", "dtype", "nan", "empty"],
    )
    def test_calibration(
        self, fails: Fails, out: Path, models: list[str], tmp_path: Path, arrays: dict, message: str
    ) -> None:
        np.savez(tmp_path / "samples.npz", **arrays)
        line = fails("compile", *models, "--quantize", "int8", "--calibration", tmp_path / "samples.npz", "-o", out)
        assert "samples.npz" in line
        assert message in line or message.lower() in line.lower()

    @pytest.mark.parametrize("option", ["--calibration", "--evaluation"])
    def test_files_that_are_no_arrays(
        self, fails: Fails, out: Path, models: list[str], tmp_path: Path, option: str
    ) -> None:
        (tmp_path / "text.npz").write_text("no zip")
        np.save(tmp_path / "single.npy", samples())
        np.savez(tmp_path / "pickled.npz", x=np.array([{}, None], dtype=object))
        for name in ("text.npz", "single.npy", "pickled.npz", "absent.npz"):
            assert name in fails("compile", *models, option, tmp_path / name, "-o", out)

    @pytest.mark.parametrize(
        ("arrays", "message"),
        [
            ({"x": samples(), "three": np.zeros(6, int)}, "'three' is neither an input nor a task"),
            ({"one": np.zeros(6, int)}, "no array for input 'x'"),
            ({"x": samples(), "one": np.full(6, 7)}, "label 7"),
            ({"x": samples() * np.inf}, "NaN or infinite"),
            ({"x": samples()[:0]}, "at least one batch"),
        ],
    )
    def test_evaluation(
        self, fails: Fails, out: Path, models: list[str], tmp_path: Path, arrays: dict, message: str
    ) -> None:
        np.savez(tmp_path / "evaluation.npz", **arrays)
        assert message in fails("compile", *models, "--evaluation", tmp_path / "evaluation.npz", "-o", out)

    def test_calibration_is_asked_for(self, fails: Fails, out: Path, models: list[str], tmp_path: Path) -> None:
        for value in ("int8", "auto"):
            assert "give --calibration" in fails("compile", *models, "--quantize", value, "-o", out)
        (tmp_path / "policy.json").write_text('{"default": {"bits": 8}}')
        assert "give --calibration" in fails("compile", *models, "--policy", tmp_path / "policy.json", "-o", out)
        assert "give --calibration" in fails(
            "compile", *models, "--prune", "0.5", "--criterion", "activation", "-o", out
        )


class TestOptions:
    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (["--prune", "0"], "--prune 0"),
            (["--prune", "-0.5"], "--prune -0.5"),
            (["--prune", "1.5"], "--prune 1.5"),
            (["--prune", "75"], "it should be less than or equal to 1 (Fraction of the channels to keep, "),
            (["--quantize", "int4"], "--quantize int4"),
            (["--max-error", "0"], "--max-error 0"),
            (["--max-error", "nan"], "--max-error nan"),
            (["--criterion", "l7"], "--criterion l7"),
            (["--criterion", "l1"], "--criterion l1: changes nothing"),
            (["--insecure"], "--insecure: give the --tracker"),
            (["--calibration-method", "guess"], "--calibration-method guess"),
            (["--threads", "0"], "--threads 0"),
            (["--trials", "-1"], "--trials -1"),
            (["--target", "toaster"], "'toaster'"),
            (["--target", '{"kind": "toaster"}'], "toaster"),
            (["--key", "pi"], "--tracker"),
            (["--tracker", "localhost:1"], "--key"),
            (["--work-dir", "/nonexistent"], "/nonexistent"),
            (["--frobnicate"], "--frobnicate"),
        ],
    )
    def test_values(self, fails: Fails, out: Path, models: list[str], options: list[str], message: str) -> None:
        assert message in fails("compile", *models, *options, "-o", out)

    def test_commands(self, fails: Fails, tmp_path: Path, models: list[str]) -> None:
        assert "compil" in fails("compil")
        assert "'models'" in fails("compile", "-o", tmp_path / "out")
        assert "--output" in fails("compile", *models)
        assert "--work-dir" in fails("tune")
        assert "--work-dir" in fails("tune", *models)
        assert "no tuning job" in fails("tune", "--work-dir", tmp_path)

    @pytest.mark.parametrize(
        ("document", "message"),
        [
            ({"layers": {"one/comv": {"keep": 0.5}}}, "one/conv"),
            ({"layers": {"one/conv": {"keep": 0}}}, "keep"),
            ({"layers": {"one/conv": {"keep": -1}}}, "keep"),
            ({"default": {"bits": 7}}, "bits"),
            ([], "object"),
        ],
    )
    def test_policy(
        self, fails: Fails, out: Path, models: list[str], tmp_path: Path, document: object, message: str
    ) -> None:
        path = tmp_path / "policy.json"
        path.write_text(json.dumps(document))
        line = fails("compile", *models, "--policy", path, "-o", out)
        assert "policy.json" in line
        assert message in line

    def test_policy_file(self, fails: Fails, out: Path, models: list[str], tmp_path: Path) -> None:
        (tmp_path / "policy.json").write_text("{")
        assert "policy.json" in fails("compile", *models, "--policy", tmp_path / "policy.json", "-o", out)
        assert "absent.json" in fails("compile", *models, "--policy", tmp_path / "absent.json", "-o", out)


class TestDevices:
    def test_tracker_that_does_not_answer(self, fails: Fails, out: Path, models: list[str]) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            address = "{}:{}".format(*free.getsockname())
        started = time.monotonic()
        line = fails("compile", *models, "--tracker", address, "--key", "pi", "--wait", "0.5", "-o", out)
        assert address in line
        assert time.monotonic() - started < 20
        assert "host:port" in fails("compile", *models, "--tracker", "pi", "--key", "pi", "-o", out)

    def test_no_device_of_that_key(self, fails: Fails, out: Path, models: list[str], tmp_path: Path) -> None:
        with embedded() as tracker:
            arguments = ("--tracker", tracker.address, "--key", "rpi4", "--wait", "1")
            started = time.monotonic()
            assert "'rpi4'" in fails("compile", *models, *arguments, "--trials", "2", "-o", out)
            assert time.monotonic() - started >= 1
            assert "'rpi4'" in fails("tune", *models, *arguments, "--work-dir", tmp_path / "work")

    def test_boards_are_needed_to_tune_for_them(
        self, fails: Fails, out: Path, models: list[str], tmp_path: Path
    ) -> None:
        work = tmp_path / "work"
        line = fails("compile", *models, "--target", "aarch64", "--trials", "2", "--work-dir", work, "-o", out)
        assert "--target aarch64: this machine can't run its code" in line and "--key aarch64" in line


class TestOutput:
    def test_exists(self, fails: Fails, bundle: Path, models: list[str], tmp_path: Path) -> None:
        assert "exists already; use --force" in fails("compile", *models, "-o", bundle)
        assert "absent.npz" in fails("compile", *models, "--calibration", "absent.npz", "-o", bundle)
        (tmp_path / "thesis.txt").write_text("irreplaceable")
        assert "is not a bundle" in fails("compile", *models, "-o", tmp_path, "--force")
        assert (tmp_path / "thesis.txt").read_text() == "irreplaceable"

    def test_not_writable(self, fails: Fails, models: list[str], tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        assert "can't be written" in fails("compile", *models, "-o", tmp_path / "file" / "out")
        assert "can't be written" in fails("compile", *models, "-o", "/proc/out")

    def test_disk_runs_full(self, fails: Fails, out: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def full(*_: object) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(write_bundle, "seal", full)
        assert "No space left on device" in fails("compile", *models, "--no-compare", "-o", out)

    def test_disk_is_full(self, fails: Fails, models: list[str], tmp_path: Path) -> None:
        disk = tmp_path / "disk"
        disk.mkdir()
        mount = ["mount", "-t", "tmpfs", "-o", "size=8k", "none", str(disk)]
        if shutil.which("mount") is None or subprocess.run(mount, capture_output=True, check=False).returncode:
            pytest.skip("mounting takes more rights")
        try:
            assert "No space left on device" in fails("compile", *models, "--no-compare", "-o", disk / "out")
            assert list(disk.iterdir()) == []
        finally:
            subprocess.run(["umount", str(disk)], check=True)

    def test_memory_runs_out(self, fails: Fails, out: Path, models: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
        def exhausted(*_: object, **__: object) -> None:
            raise MemoryError

        monkeypatch.setattr(compiling, "make_graphs", exhausted)
        assert "out of memory" in fails("compile", *models, "-o", out)


class TestBundles:
    @pytest.fixture
    def copy(self, bundle: Path, tmp_path: Path) -> Path:
        return Path(shutil.copytree(bundle, tmp_path / "copy"))

    @pytest.fixture
    def sample(self, tmp_path: Path) -> str:
        np.save(tmp_path / "x.npy", samples(1))
        return f"x={tmp_path / 'x.npy'}"

    def test_no_bundle(self, fails: Fails, tmp_path: Path, sample: str) -> None:
        for command in (["run", "--input", sample], ["bench"], ["inspect"]):
            assert "not a bundle" in fails(*command, tmp_path)
            assert "no such directory" in fails(*command, tmp_path / "nowhere")

    def test_flipped_byte(self, fails: Fails, copy: Path, sample: str) -> None:
        data = bytearray((copy / "lib.so").read_bytes())
        data[len(data) // 3] ^= 4
        (copy / "lib.so").write_bytes(data)
        assert "damaged" in fails("run", copy, "--input", sample)
        assert "damaged" in fails("bench", copy)

    def test_other_cpu(self, fails: Fails, copy: Path, sample: str) -> None:
        manifest = read_manifest(copy)
        target = TargetRecord(string="{}", triple="riscv64-linux-gnu", arch="riscv64", cpu="", features=[])
        (copy / "manifest.json").write_text(manifest.model_copy(update={"target": target}).to_json())
        assert "made for riscv64" in fails("run", copy, "--input", sample)
        assert cli.run(["inspect", str(copy)]) == 0

    def test_inputs(self, fails: Fails, bundle: Path, sample: str, tmp_path: Path) -> None:
        np.save(tmp_path / "narrow.npy", samples(2)[..., :5])
        np.savez(tmp_path / "several.npz", x=samples(1))
        (tmp_path / "text.npy").write_text("text")
        for given, message in [
            ("x", "write it as name=array.npy"),
            (f"x={tmp_path / 'absent.npy'}", "absent.npy"),
            (f"x={tmp_path / 'text.npy'}", "text.npy"),
            (f"x={tmp_path / 'several.npz'}", "several.npz"),
            (f"x={tmp_path / 'narrow.npy'}", "shape [2, 2, 6, 5]"),
            (f"y={tmp_path / 'narrow.npy'}", "no such input; it takes x"),
        ]:
            assert message in fails("run", bundle, "--input", given)
        assert "can't be written" in fails("run", bundle, "--input", sample, "-o", "/proc/answers")
        assert "--repeats" in fails("bench", bundle, "--repeats", "0")
        assert "threads" in fails("bench", bundle, "--threads", "0")


@pytest.mark.parametrize(
    ("moment", "how", "options", "said"),
    [
        (
            "starting",
            signal.SIGINT,
            ["--trials=9"],
            "interrupted; the same command goes on with what has been measured",
        ),
        ("building", signal.SIGTERM, [], "interrupted"),
    ],
)
def test_interrupt(
    models: list[str], out: Path, tmp_path: Path, moment: str, how: signal.Signals, options: list[str], said: str
) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    process = subprocess.Popen(
        [sys.executable, "-m", "nnfuze_tvm", "compile", *models, "-o", str(out), *options],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "TMPDIR": str(scratch), "PYTHONPATH": os.getcwd()},
    )
    assert process.stderr is not None
    seen = ""
    for line in process.stderr:
        seen += line
        if line.startswith(f"nnfuze: {moment}"):
            break
    time.sleep(0.3)
    process.send_signal(how)
    stdout, stderr = process.communicate(timeout=120)
    assert process.returncode == 130, stderr
    assert one_line(seen + stderr) == said
    assert stdout == ""
    assert list(scratch.iterdir()) == []
    assert not list(out.parent.glob(".nnfuze-*"))


def test_interrupt_while_text_is_being_run(tmp_path: Path) -> None:
    """Python remembers such a Ctrl-C, and would end by it although it was caught."""
    lines = ["from nnfuze_tvm import cli", "cli._run = lambda _: exec('raise KeyboardInterrupt')", "cli.main()"]
    (tmp_path / "stopped.py").write_text("\n".join(lines))
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.getcwd()])}
    done = subprocess.run([sys.executable, "-m", "stopped"], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, one_line(done.stderr)) == (130, "interrupted")


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM])
def test_interrupt_while_importing(how: signal.Signals) -> None:
    program = f"""
import os, sys
class Interrupts:
    def find_spec(name, *_):
        if name == "nnfuze_tvm.cli":
            os.kill(os.getpid(), {how.value})
sys.meta_path.insert(0, Interrupts)
sys.argv[1:] = ["ops"]
from nnfuze_tvm.__main__ import main
main()
"""
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, check=False)
    assert (done.returncode, one_line(done.stderr), done.stdout) == (130, "interrupted", "")
