"""Networks that go on with the trunk that ``nnfuze merge`` left in a directory."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import onnx
import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.learnt_trunk import digest, file_names
from nnfuze_tvm.jobs.request import NetworkRequest
from tests.tiny_networks import classifier, samples


@pytest.fixture
def files(tmp_path: Path) -> tuple[list[str], Path]:
    """Return two networks that were trained apart, and a directory of others, which have one trunk."""
    merged = tmp_path / "merged"
    merged.mkdir()
    for seed, name in enumerate("ab"):
        onnx.save(classifier(seed), tmp_path / f"{name}.onnx")
        onnx.save(classifier(0, seed), merged / f"{name}.onnx")
    return [str(tmp_path / f"{name}.onnx") for name in "ab"], merged


def test_the_trunk_is_a_stage_and_compressed(files):
    models, merged = files
    graphs = make_graphs(NetworkRequest.parse(models, {"merge": str(merged), "prune": 0.5}))
    assert [*graphs.stages] == ["merged", "trunk learnt", "pruned"]
    macs = [sum(layer.macs for layer in metrics.layers(stage)) for stage in graphs.stages.values()]
    assert macs[0] > 1.5 * macs[1] > 1.5 * macs[2]
    sample = samples(1)
    own = make_graphs(NetworkRequest.parse([str(merged / f"{name}.onnx") for name in "ab"], {}))
    got, want = (
        evaluate.executor(each)({"x": sample}) for each in (graphs.stages["trunk learnt"], own.stages["merged"])
    )
    for one, other in zip(got, want, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_bundle_of_it_is_compared_with_what_was_given(files, tmp_path, capsys):
    models, merged = files
    out = tmp_path / "out"
    assert cli.run(["compile", *models, "--merge", str(merged), "-o", str(out), "--json"]) == 0
    stages = {stage["name"]: stage for stage in json.loads(capsys.readouterr().out)["stages"]}
    assert [*stages] == ["ONNX Runtime, separate", "separate", "merged", "trunk learnt"]
    assert stages["merged"]["macs"] > stages["trunk learnt"]["macs"]


def test_what_is_no_merge_of_these_networks(files, tmp_path):
    models, merged = files

    def fails(words: str) -> None:
        with pytest.raises(InputError, match=words):
            make_graphs(NetworkRequest.parse(models, {"merge": str(merged)}))

    job = merged / "job.json"
    job.write_text(json.dumps({"networks": [digest(model) for model in reversed(models)]}))
    fails("was made of other networks")
    job.write_text("[")
    fails("job.json is damaged")
    job.write_text(json.dumps({"networks": [digest(model) for model in models]}))
    make_graphs(NetworkRequest.parse(models, {"merge": str(merged)}))
    job.write_text(json.dumps({"networks": [digest(model) for model in models], "shared_inputs": ["x=a.x,b.x*2"]}))
    fails(r"was made with --share-input x=a.x,b.x\*2; give the same")
    job.unlink()
    onnx.save(classifier(0, outputs=2), merged / "b.onnx")
    fails("other inputs or outputs")
    (merged / "b.onnx").unlink()
    fails("b.onnx not there; give a directory")
    job.write_text("{}")
    fails("b.onnx not there; it was interrupted")
    (merged / "report.json").write_text("{}")
    fails("b.onnx not there; give a directory")
    shutil.rmtree(merged)
    fails("no such directory")


def test_files_are_seen_and_are_not_each_others():
    names = file_names(["a/b", "a_b", "../x", "...", "a_b_"])
    assert names == {"a/b": "a_b.onnx", "a_b": "a_b_.onnx", "../x": "_x.onnx", "...": "_.onnx", "a_b_": "a_b__.onnx"}


def test_the_shipped_four_keep_their_answers(tmp_path, capsys):
    camera = Path(__file__).parents[2] / "examples" / "camera"
    models = [str(camera / f"{task}.onnx") for task in ("digit", "place", "focus", "ink")]
    options = ["--merge", str(camera / "merged"), "--evaluation", str(camera / "evaluation.npz"), "--no-compare"]
    assert cli.run(["compile", *models, *options, "-o", str(tmp_path / "out"), "--json"]) == 0
    (stage,) = json.loads(capsys.readouterr().out)["stages"]
    given = sum(layer.macs for layer in metrics.layers(make_graphs(NetworkRequest.parse(models, {})).loaded))
    assert stage["macs"] < 0.5 * given
    for task, right in {"digit": 0.943, "place": 0.996, "focus": 1.0, "ink": 1.0}.items():
        assert stage["tasks"][task]["accuracy"] >= right - 0.01
