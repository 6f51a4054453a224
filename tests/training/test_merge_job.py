"""``nnfuze merge``: files in, files out, and what happens when it is ended on the way."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
import tvm

from nnfuze_tvm import cli, load
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.jobs import merge as job
from nnfuze_tvm.passes.pipeline import merge_phases
from nnfuze_tvm.report.merging import MergeReport
from tests.tiny_networks import classifier
from tests.training.test_merging import images, module, network


@pytest.fixture(scope="module")
def given(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with two networks, samples, and labelled samples."""
    folder = tmp_path_factory.mktemp("given")
    rng = np.random.default_rng(0)
    for n, name in enumerate(("one", "two")):
        (folder / f"{name}.onnx").write_bytes(job._file(module(**{name: network(name, (4, 6), n)}), name))
    # Of several classes.
    samples = images(160)["image"][:, 0] + rng.normal(0, 2, (160, 2, 1, 1)).astype("float32")
    right = [int(evaluate(network("two", (4, 6), 1), {"image": each[None]})[0].argmax()) for each in samples[:40]]
    np.savez(folder / "data.npz", image=samples)
    np.savez(folder / "few.npz", image=samples[:4])
    np.savez(folder / "labelled.npz", image=samples[:40], two=np.array(right))
    np.savez(folder / "wrong.npz", image=samples[:40], two=np.full(40, 4))
    np.savez(folder / "other.npz", sound=samples)
    return folder


def models(given: Path) -> list[str]:
    return [str(given / "one.onnx"), str(given / "two.onnx")]


def test_networks_come_out_that_share_a_trunk(given, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(job, "_LEAST", 20)
    output = tmp_path / "merged"
    options = ["--data", given / "data.npz", "--evaluation", given / "labelled.npz", "--budget", 60, "--epochs", 2]
    assert cli.run(["merge", *models(given), *map(str, options), "-o", str(output)]) == 0
    printed = capsys.readouterr()
    assert "kept" in printed.out and "serve several tasks" in printed.out
    files = sorted(output.glob("*.onnx"))
    assert [file.stem for file in files] == ["one", "two"]
    for file in files:
        before, after = onnx.load(given / file.name).graph, onnx.load(file).graph
        assert [value.name for value in after.output] == [value.name for value in before.output] == ["scores"]
        assert [value.name for value in after.input] == ["image"]
    mod = load([str(file) for file in files])
    layers = metrics.layers(tvm.transform.Sequential(merge_phases())(mod))
    assert next(layer.tasks for layer in layers if layer.op == "nn.conv2d") == ("one", "two")
    report = MergeReport.model_validate_json((output / "report.json").read_text())
    assert (
        report.attempts[-1].curve
        and report.attempts[-1].kept
        and report.macs < report.macs_before
        and 0.1 < report.shared < 1
    )
    assert report.scores["two"].accuracy is not None and report.scores["one"].accuracy is None
    # What the files compute is what was judged.
    samples = np.load(given / "labelled.npz")
    found = [int(evaluate(mod["two"], {"image": each[None]})[0].argmax()) for each in samples["image"]]
    assert report.scores["two"].accuracy == pytest.approx(100 * np.mean(found == samples["two"]))
    page = (output / "report.html").read_text()
    assert "budget 60 points" in page and "<svg" in page and page.count("polyline") == len(report.attempts)
    assert "kept" in (output / "logs" / "merge.log").read_text()
    # A merge that is done is shown again, as it is.
    content = [file.read_bytes() for file in files]
    assert cli.run(["merge", "-o", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["macs"] == report.macs
    assert content == [file.read_bytes() for file in files]


def test_one_input_under_two_names_and_scales(given, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(job, "_LEAST", 20)
    other = onnx.load(given / "two.onnx")
    graph = other.graph
    graph.input[0].name = "x"
    # Twice the common input, which it halves.
    graph.initializer.append(onnx.numpy_helper.from_array(np.array(0.5, "float32"), "half"))
    graph.node.insert(0, onnx.helper.make_node("Mul", ["x", "half"], ["image"], "Mul.of.x"))
    onnx.save(other, tmp_path / "two.onnx")
    two = [str(given / "one.onnx"), str(tmp_path / "two.onnx")]
    options = ["--data", str(given / "data.npz"), "--budget", "100", "--epochs", "1", "-o", str(tmp_path / "merged")]
    assert cli.run(["merge", *two, *options]) == 2
    assert "--share-input says which are one" in capsys.readouterr().err
    assert cli.run(["merge", *two, *options, "--share-input", "image=one.image,two.x*2"]) == 0
    mod = load([str(tmp_path / "merged" / f"{name}.onnx") for name in ("one", "two")])
    assert [param.name for name in ("one", "two") for param in mod[name].params] == ["image", "image"]
    layers = metrics.layers(tvm.transform.Sequential(merge_phases())(mod))
    assert next(layer.tasks for layer in layers if layer.op == "nn.conv2d") == ("one", "two")


def test_a_merge_that_was_ended_goes_on_to_the_same_files(given, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_KEPT", 0.0)
    options = {"data": str(given / "data.npz"), "budget": 0.0, "epochs": 2}
    monkeypatch.setattr(job, "_LEAST", 20)
    whole, ended = tmp_path / "whole", tmp_path / "ended"
    job.merge(models(given), whole, **options)
    kept, count = job._Diary.keep, 0

    def keep(diary, search, *, now):
        nonlocal count
        kept(diary, search, now=now)
        count += 1
        if count in (3, 14, 15):
            raise KeyboardInterrupt

    monkeypatch.setattr(job._Diary, "keep", keep)
    with pytest.raises(KeyboardInterrupt):
        job.merge(models(given), ended, **options)
    for _ in range(4):
        try:
            report = job.merge(None, ended)
            break
        except KeyboardInterrupt:
            continue
    assert count >= 20 and report.attempts
    for name in ("one.onnx", "two.onnx"):
        assert (whole / name).read_bytes() == (ended / name).read_bytes()
    reports = [json.loads((folder / "report.json").read_text()) for folder in (whole, ended)]
    assert {**reports[0], "seconds": 0} == {**reports[1], "seconds": 0}


@pytest.mark.slow
def test_a_merge_that_was_killed_goes_on_to_the_same_files(given, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    options = ["--data", str(given / "data.npz"), "--budget", "5", "--epochs", "2"]
    command = [
        sys.executable,
        "-c",
        f"from nnfuze_tvm.jobs import merge; merge._KEPT, merge._LEAST = 0, 60; {_RUN}",
        "merge",
    ]
    subprocess.run([*command, *models(given), *options, "-o", str(whole)], check=True)
    rng, arguments = np.random.default_rng(), [*models(given), *options]
    for number in (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        running = subprocess.Popen([*command, *arguments, "-o", str(killed)])
        while running.poll() is None and not (killed / "state").exists():
            time.sleep(0.1)
        time.sleep(rng.uniform(0, 2))
        running.send_signal(number)
        running.wait()
    subprocess.run([*command, "-o", str(killed)], check=True)
    for name in ("one.onnx", "two.onnx"):
        assert (whole / name).read_bytes() == (killed / name).read_bytes()
    assert {file.name for file in whole.iterdir()} == {file.name for file in killed.iterdir()}


_RUN = "from nnfuze_tvm import cli; import sys; sys.exit(cli.run(sys.argv[1:]))"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"data": None}, "--data: give an .npz file"),
        ({"data": "nothing.npz"}, "nothing.npz: can't be read"),
        ({"data": "few.npz"}, "4 samples are too few"),
        ({"data": "other.npz"}, "data .*other.npz: array 'sound' is no input"),
        ({"evaluation": "other.npz"}, "evaluation data .*other.npz: array 'sound' is no input"),
        ({"evaluation": "wrong.npz"}, "label 4 of 'two'; it has 4 classes"),
        ({"budget": -1.0}, "--budget -1: give points"),
        ({"budget": float("nan")}, "--budget nan: give points"),
        ({"epochs": 0}, "--epochs 0: give a number from 1"),
        ({"seed": -3}, "--seed -3"),
        ({"threads": 0}, "--threads 0"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(given, tmp_path, options, said):
    files = {name: str(given / value) for name, value in options.items() if isinstance(value, str)}
    with pytest.raises(InputError, match=said):
        job.merge(models(given), tmp_path / "out", **{"data": str(given / "data.npz"), **options, **files})
    assert not (tmp_path / "out").exists()


def test_networks_that_have_nothing_in_common(given, tmp_path):
    onnx.save(classifier(3, shape=(1, 2, 9, 9)), tmp_path / "large.onnx")
    pair = [models(given)[0], str(tmp_path / "large.onnx")]
    with pytest.raises(InputError, match="must have the same inputs"):
        job.merge(pair, tmp_path / "out", data=str(given / "data.npz"))
    with pytest.raises(InputError, match="1 network given"):
        job.merge(pair[:1], tmp_path / "out", data=str(given / "data.npz"))
    assert not (tmp_path / "out").exists()


def test_a_directory_is_one_merges(given, tmp_path, monkeypatch):
    monkeypatch.setattr(job, "_LEAST", 3)
    with pytest.raises(InputError, match="no merge to go on with"):
        job.merge(None, tmp_path / "new")
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match="exists and is no merge"):
        job.merge(models(given), tmp_path, data=str(given / "data.npz"))
    assert [file.name for file in tmp_path.iterdir()] == ["notes.txt"]
    (tmp_path / "notes.txt").unlink()
    job.merge(models(given), tmp_path, data=str(given / "data.npz"), budget=100.0, epochs=1)
    with pytest.raises(InputError, match="belongs to a job with budget 100"):
        job.merge(models(given), tmp_path, data=str(given / "data.npz"), budget=1.0, epochs=1)
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "job.json").write_text('{"kind": "tuning job"}')
    with pytest.raises(InputError, match="belongs to a 'tuning job', not to a merge"):
        job.merge(models(given), tmp_path / "tuned", data=str(given / "data.npz"))
    good = (tmp_path / "state").read_bytes()
    for bad in (b"", b"no state", good[:-1], good[:5000] + bytes([good[5000] ^ 1]) + good[5001:]):
        (tmp_path / "state").write_bytes(bad)
        with pytest.raises(InputError, match="damaged, or of another merge; delete it"):
            job.merge(None, tmp_path)


def test_states_that_somebody_made(given, tmp_path, monkeypatch):
    """With the right digest."""
    monkeypatch.setattr(job, "_LEAST", 3)
    job.merge(models(given), tmp_path, data=str(given / "data.npz"), budget=100.0, epochs=1)
    diary = job._Diary(tmp_path / "state", lambda _: None, _about(tmp_path))
    good = diary.found()
    assert good is not None
    for change in (
        {"functions": "[" * 100_000}, {"functions": "{}"}, {"warm": 1}, {"tried": [1]}, {"round": None},
        {"round": {**good["round"], "alone": ["three"]}}, {"round": {**good["round"], "alone": None}},
        {"round": {**good["round"], "curve": [1]}},
    ):  # fmt: skip
        written = io.BytesIO()
        torch.save({**good, "seconds": 1.0, **change}, written)
        (tmp_path / "state").write_bytes(diary._digest(written.getvalue()) + written.getvalue())
        with pytest.raises(InputError, match="no state of it; delete it"):
            job.merge(None, tmp_path)


def _about(directory: Path) -> list[Any]:
    facts = json.loads((directory / "job.json").read_text())
    return [facts[name] for name in job._FIXED]
