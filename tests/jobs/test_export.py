"""Networks merged and compressed into one ONNX file: what ONNX Runtime makes of it, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import tvm

from nnfuze_tvm import cli
from nnfuze_tvm.errors import CheckError, InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.frontend.export import export as to_onnx
from nnfuze_tvm.graph.dataflow import Value, op_name
from nnfuze_tvm.graph.evaluate import evaluate, executor, hooked_executor
from nnfuze_tvm.jobs import export as job
from nnfuze_tvm.jobs.check.differences import typical
from nnfuze_tvm.jobs.check.originals import calls_of
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress import method, method_settings
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from tests.frontend.operators.one_node import one_node
from tests.streaming_networks import voice_activity, wake_words
from tests.tiny_networks import classifier, samples, save_pair

SPEECH = Path(__file__).parents[2] / "examples" / "speech"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    return save_pair(tmp_path_factory.mktemp("models"))


def graph_of(pair: str) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Return a shipped pair, pruned and in int8, and the inputs of an inference."""
    with np.load(SPEECH / "calibration.npz") as data:
        audio = data["audio"][:3]
    mod = load([str(SPEECH / pair / f"{task}.onnx") for task in ("keyword", "speaker")])
    mod = tvm.transform.Sequential(pipeline.merge_phases())(mod)
    options = {"prune": 0.75, "quantize": "int8"}
    policy = Policy().with_default(method_settings.settings(pipeline.METHODS, options))
    for one in method.asked(pipeline.METHODS, [policy.for_layer("any")]):
        mod = pipeline.compression_phase(one, method.Inputs(policy, {"audio": audio[:2]}, options))(mod)
    return mod, {"audio": audio[2:]}


@pytest.mark.parametrize("pair", ["shared", "independent"])
def test_shipped_pairs_pruned_in_int8(pair):
    pytest.importorskip("onnxruntime")
    mod, sample = graph_of(pair)
    model = to_onnx(mod)
    codes = [node.output[0] for node in model.graph.node if node.op_type == "QuantizeLinear"]
    assert [value.name for value in model.graph.output] == ["keyword", "speaker"]
    assert len(codes) > 8
    integer, float_graph = executor(RealizeInteger()(mod)), hooked_executor(mod)
    inner = onnx.ModelProto.FromString(model.SerializeToString())
    inner.graph.output.extend(onnx.ValueInfoProto(name=name) for name in codes)
    runs = [calls_of(inner, "plain"), calls_of(model, "usual")]
    ours: list[np.ndarray] = []

    def keep(value: Value, result: Any) -> Any:
        if op_name(value) == "quantize":
            ours.append(result)
        return result

    want, plain = float_graph(sample, keep), runs[0](sample)
    for got, known in zip(plain[2:], ours, strict=True):
        assert got.dtype == known.dtype == "int8"
        apart = np.abs(got.astype(int) - known)
        assert apart.max() <= 1 and np.mean(apart) < 1e-2
    for answers in (plain[:2], runs[1](sample)):
        assert max(typical([answers], [want])) < 1e-3
        # Ratios of scales have a few bits in integer graphs, and a step behind one of them goes through all layers.
        assert max(typical([answers], [integer(sample)])) < 1e-2


def test_what_was_exported_loads_again(models, tmp_path):
    job.export(models, tmp_path / "merged.onnx")
    again = load([str(tmp_path / "merged.onnx")])["merged"]
    given = {"x": samples(1)}
    for got, path, task in zip(evaluate(again, given), models, ("one", "two"), strict=True):
        np.testing.assert_allclose(got, evaluate(load([path])[task], given)[0], rtol=0, atol=1e-5)


def test_states_are_inputs_and_outputs(tmp_path):
    onnx.save(voice_activity(), tmp_path / "vad.onnx")
    written = job.export([str(tmp_path / "vad.onnx")], tmp_path / "out.onnx", states=["state=next"])
    assert written.inputs == ["audio", "rate", "state"]
    assert written.outputs == ["vad", "state/next"]
    assert written.check.startswith("ONNX Runtime's answers differ by at most")


def test_chains(tmp_path):
    for name, model in wake_words().items():
        onnx.save(model, tmp_path / f"{name}.onnx")
    files = [str(tmp_path / f"{name}.onnx") for name in wake_words()]
    links = ["frames=mel:mel[10]", "features=embedding:0[16]"]
    written = job.export(files, tmp_path / "out.onnx", chains=links)
    states = ["mel.mel.last", "embedding.embedding.last"]
    assert written.inputs == ["audio", *states]
    assert written.outputs == ["first", "second", *(f"{state}/next" for state in states)]
    assert written.check.startswith("ONNX Runtime's answers differ by at most")


def test_float16_needs_no_machine_that_has_it(models, tmp_path):
    job.export(models, tmp_path / "half.onnx", quantize="fp16")
    kinds = {weights.data_type for weights in onnx.load(tmp_path / "half.onnx").graph.initializer}
    assert onnx.TensorProto.FLOAT16 in kinds


def test_wrong_answers_are_not_written(models, tmp_path, monkeypatch):
    pytest.importorskip("onnxruntime")
    monkeypatch.setattr(job, "calls_of", lambda *_, **__: lambda sample: [np.zeros((1, 3), "float32")] * 2)
    with pytest.raises(CheckError, match="task 'one': output 'scores' differs in ONNX Runtime by"):
        job.export(models, tmp_path / "out.onnx")
    assert not list(tmp_path.iterdir())
    assert job.export(models, tmp_path / "out.onnx", check=False).check == "not checked"


def test_biases_with_a_scale_per_channel_have_as_many_zero_points(tmp_path):
    rng, scales = np.random.default_rng(0), np.linspace(0.002, 0.01, 8, dtype="float32")
    layer = [rng.integers(-127, 128, (8, 4, 3, 3)).astype("int8"), scales, np.zeros(8, "int8"), np.float32(0.05)]
    data = [np.zeros((1, 4, 6, 6), "int8"), np.float32(0.02), np.int8(3)]
    operands = [*data, *layer, np.int8(1), rng.integers(-99, 99, 8).astype("int32")]
    model, _ = one_node("QLinearConv", operands, set(range(1, len(operands))))
    onnx.save(model, tmp_path / "conv.onnx")
    written = job.export([str(tmp_path / "conv.onnx")], tmp_path / "out.onnx")
    assert written.check.startswith("ONNX Runtime's answers differ by at most")


def test_products_of_bytes_that_others_saturate_are_written(tmp_path):
    weights = np.full((16, 8), 127, "int8")
    point = np.uint8(0)
    operands = [np.full((2, 16), 255, "uint8"), np.float32(0.02), point, weights, np.float32(0.01), np.int8(0)]
    model, feeds = one_node("QLinearMatMul", [*operands, np.float32(5.0), point], set(range(1, 8)) - {3})
    onnx.save(model, tmp_path / "product.onnx")
    written = job.export([str(tmp_path / "product.onnx")], tmp_path / "out.onnx")
    assert written.check.startswith("ONNX Runtime's answers differ by at most")
    (found,) = calls_of(onnx.load(tmp_path / "out.onnx"))(feeds)
    np.testing.assert_array_equal(found, np.full((2, 8), np.rint(255 * 127 * 16 * 0.02 * 0.01 / 5.0), "uint8"))


def test_destinations(models, tmp_path):
    with pytest.raises(InputError, match="a directory, not a file"):
        job.export(models, tmp_path)
    with pytest.raises(InputError, match="is one of the networks"):
        job.export(models, models[0], force=True)
    with pytest.raises(InputError, match=r"give a name that ends in \.onnx"):
        job.export(models, tmp_path / "out.txt")
    with pytest.raises(InputError, match="is no directory that can be written"):
        job.export(models, tmp_path / "missing" / "out.onnx")


def test_layers_that_can_lose_no_channel_are_named(tmp_path):
    path, said = tmp_path / "one.onnx", []
    onnx.save(classifier(), path)
    (tmp_path / "policy.json").write_text('{"layers": {"one/conv": {"keep": 0.5}, "one/dense_*": {"keep": 0.5}}}')
    fields = {"policy": str(tmp_path / "policy.json"), "check": False, "announce": said.append}
    job.export([str(path)], tmp_path / "out.onnx", **fields)
    (note,) = (line for line in said if line.startswith("note: "))
    assert note.startswith("note: keep changes nothing of one/dense_scores: ")


def test_verb(models, tmp_path, capsys):
    path = tmp_path / "merged.onnx"
    assert cli.run(["export", *models, "-o", str(path), "--no-check", "--json"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["outputs"] == ["one", "two"] and record["bytes"] == path.stat().st_size
    before = path.read_bytes()
    assert cli.run(["export", *models, "-o", str(path)]) == 2
    assert capsys.readouterr().err.strip().endswith("exists already; use --force to replace it")
    assert path.read_bytes() == before
    assert cli.run(["export", models[0], "-o", str(path), "--no-check", "--force"]) == 0
    assert "outputs: one" in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["merged.onnx"]
