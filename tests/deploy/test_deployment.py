"""Bundles on a board behind a tracker, with boards and kernels that fail."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.script import ir as I
from tvm.script import relax as R
from tvm.script import tirx as T

from nnfuze_tvm import cli
from nnfuze_tvm.deploy import build, deployment
from nnfuze_tvm.deploy.bundle import Bundle, unfit
from nnfuze_tvm.deploy.deployment import deploy
from nnfuze_tvm.deploy.manifest import InputRecord, Manifest, OutputRecord, describe_target, signature_records
from nnfuze_tvm.deploy.runner import made_up, signature
from nnfuze_tvm.devices.cpu import Cpu
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import BundleError, DeviceError, InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from tests.bundles import write_bundle
from tests.servers import embedded
from tests.tiny_networks import classifier, samples


@pytest.fixture(scope="module")
def tracker() -> Iterator[str]:
    with embedded(key="board") as running:
        yield running.address


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    models = [classifier(), classifier(head_seed=1, outputs=2)]
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load(models, ["one", "two"]))
    manifest = Manifest(**signature_records(*signature(mod)), target=describe_target(resolve("host")))
    path = tmp_path_factory.mktemp("bundles") / "out"
    write_bundle(path, build.build(mod, resolve("host")), manifest)
    return path


@I.ir_module
class Crashing:
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
        for i in range(4):
            with T.sblock("y"):
                y[i + T.int64(1 << 44)] = x[i]

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tuple(R.Tensor((4,), "float32")):
        with R.dataflow():
            y = R.call_tir(Crashing.kernel, (x,), out_ty=R.Tensor((4,), "float32"))
            out = (y,)
            R.output(out)
        return out


@I.ir_module
class Endless:
    @T.prim_func(private=True, s_tir=True)
    def kernel(x: T.Buffer((4,), "float32"), y: T.Buffer((4,), "float32")) -> None:
        for _ in range(T.int64(1 << 62)):
            with T.sblock("y"):
                # A session that waits for ever; one that computes would take a core from other tests.
                y[0] = T.Cast("float32", T.call_extern("int32", "sleep", T.int32(1000))) + x[0]

    @R.function
    def main(x: R.Tensor((4,), "float32")) -> R.Tuple(R.Tensor((4,), "float32")):
        with R.dataflow():
            y = R.call_tir(Endless.kernel, (x,), out_ty=R.Tensor((4,), "float32"))
            out = (y,)
            R.output(out)
        return out


def misbehaving(mod: tvm.IRModule, path: Path) -> Path:
    target = resolve("host")
    manifest = Manifest(
        tasks=["bad"],
        inputs=[InputRecord(name="x", shape=[4], dtype="float32")],
        outputs=[OutputRecord(task="bad", name="y", shape=[4], dtype="float32")],
        target=describe_target(target),
    )
    write_bundle(path, relax.build(mod, target=target, exec_mode="compiled"), manifest)
    return path


def test_answers_are_those_of_this_machine(bundle: Path, tracker: str) -> None:
    found = deploy(bundle, tracker, "board", {"x": samples(3)}, repeat=5)
    here = Bundle.load(bundle)
    for n, x in enumerate(samples(3)):
        wanted = here.run({"x": x[None]})
        np.testing.assert_array_equal(found.answers["one"][n], wanted["one"][0])
        np.testing.assert_array_equal(found.answers["two"]["scores1"][n], wanted["two"]["scores1"][0])
    assert len(found.seconds) == 5
    assert 0 < min(found.seconds) <= found.median
    assert found.board.startswith("127.0.0.1:")


def test_inputs_that_do_not_fit(bundle: Path, tracker: str) -> None:
    with pytest.raises(InputError, match=r"^inputs: 'x' has shape \[1, 6\]"):
        deploy(bundle, tracker, "board", {"x": np.zeros((1, 6), "float32")})


def test_command(bundle: Path, tracker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["deploy", str(bundle), "--tracker", tracker, "--key", "board"]
    assert cli.run([*command, "--repeat", "2", "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    wanted = Bundle.load(bundle).run(made_up(Bundle.load(bundle).inputs))
    np.testing.assert_array_equal(np.float32(printed["outputs"]["one"]), wanted["one"])
    assert len(printed["seconds"]) == 2
    np.savez(tmp_path / "x.npz", x=samples(2))
    files = ["--inputs", str(tmp_path / "x.npz"), "--output", str(tmp_path / "y.npz")]
    assert cli.run([*command, *files]) == 0
    shown = capsys.readouterr().out
    assert "20 inferences" in shown
    assert str(tmp_path / "y.npz") in shown
    with np.load(tmp_path / "y.npz") as arrays:
        assert sorted(arrays) == ["one", "two.scores", "two.scores1"]
        assert arrays["one"].shape == (2, 3)


def test_nothing_is_done_when_the_output_can_not_be_written(
    bundle: Path, tracker: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["deploy", str(bundle), "--tracker", tracker, "--key", "board", "-o", str(tmp_path / "no" / "y.npz")]
    assert cli.run(command) == 2
    error = capsys.readouterr().err.splitlines()
    assert error[-1].startswith("error: --output")
    assert not any("board" in line for line in error[:-1])


def test_another_machines_bundle_is_not_sent(tmp_path: Path, bundle: Path, tracker: str) -> None:
    other = "x86-64-v3" if resolve("host").attrs["mtriple"].startswith("aarch64") else "aarch64"
    manifest = Bundle.load(bundle).manifest.model_copy(update={"target": describe_target(resolve(other))})
    copy = tmp_path / "copy"
    copy.mkdir()
    (copy / "lib.so").write_bytes((bundle / "lib.so").read_bytes())
    (copy / "manifest.json").write_text(manifest.to_json())
    steps: list[str] = []
    with pytest.raises(BundleError, match=r"made for \w+, the board is \w+; compile it"):
        deploy(copy, tracker, "board", announce=steps.append)
    assert not any("upload" in step for step in steps)


def test_features_that_a_board_lacks() -> None:
    record = describe_target(resolve("aarch64+dotprod"))
    lacking = unfit(record, Cpu("aarch64", frozenset({"asimd"})))
    assert lacking is not None
    assert "dotprod" in lacking
    flags = {"asimd", "asimddp", "asimdhp", "asimdrdm", "atomics"}
    assert unfit(record, Cpu("aarch64", frozenset(flags))) is None


def test_no_board(bundle: Path, tracker: str) -> None:
    with pytest.raises(DeviceError, match="no device under key 'other'"):
        deploy(bundle, tracker, "other", wait=0.5)


def test_a_crash_is_one_line_and_the_board_goes_on(bundle: Path, tracker: str, tmp_path: Path) -> None:
    with pytest.raises(DeviceError, match=r"^board 'board' .*failed while running \(.*SIGSEGV\)$"):
        deploy(misbehaving(Crashing, tmp_path / "bad"), tracker, "board")
    assert deploy(bundle, tracker, "board", repeat=1).answers["one"].shape == (1, 3)


def test_a_board_that_does_not_answer(
    bundle: Path, tracker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = misbehaving(Endless, tmp_path / "bad")
    monkeypatch.setattr(deployment, "_ANSWER_SECONDS", 10.0)
    with pytest.raises(DeviceError, match="no answer within 10 s while running"):
        deploy(path, tracker, "board", wait=1)
    # The server drops a session whose client is gone.
    assert deploy(bundle, tracker, "board", repeat=1).answers["one"].shape == (1, 3)
