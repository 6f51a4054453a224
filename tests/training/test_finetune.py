"""Compressed networks that learn the original's answers, and compilations that train."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import onnx
import pytest
import tvm
from tvm import relax

from nnfuze_tvm import load, pipeline
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.errors import InputError, NNFuzeError
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, output_fields, with_main
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.jobs import finetuning
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.passes.compress.insert_qdq import METHOD, InsertQDQ
from nnfuze_tvm.passes.compress.method import Training
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels
from nnfuze_tvm.reading import memory
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.distill import answers
from nnfuze_tvm.training.finetune import finetune, learn, with_parameters
from nnfuze_tvm.training.network import Network
from tests.tiny_networks import SHAPE, classifier

BRIEF = Schedule(batch=32, least=60, epochs=1, rate=1e-2)


def merged(*models: Path) -> tvm.IRModule:
    return tvm.transform.Sequential(pipeline.merge_phases())(load([str(model) for model in models]))


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Compilations train for some steps only."""
    monkeypatch.setattr(finetuning, "Schedule", partial(Schedule, batch=32, least=20))


@pytest.fixture(scope="module")
def pair(tmp_path_factory) -> list[Path]:
    """Two networks without a common layer."""
    folder = tmp_path_factory.mktemp("networks")
    for seed, name in enumerate(["one", "two"]):
        onnx.save(classifier(seed, name=name), folder / f"{name}.onnx")
    return [folder / "one.onnx", folder / "two.onnx"]


@pytest.fixture(scope="module")
def data(pair) -> Path:
    path = pair[0].parent / "data.npz"
    np.savez(path, x=images(256))
    return path


def images(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=(count, *SHAPE[1:])).astype("float32")


def samples(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    return {"x": images(count, seed).reshape(count, *SHAPE)}


def pruned(mod: tvm.IRModule, keep: float = 0.5) -> tvm.IRModule:
    return PruneChannels(Policy().with_default({"keep": keep}))(mod)


def lost(mod: tvm.IRModule, original: tvm.IRModule) -> float:
    held = samples(300, 7)
    got, want = (answers(Network(each["main"]), held) for each in (mod, original))
    return float(sum(np.mean((a - b) ** 2) / np.var(b) for a, b in zip(got, want, strict=True)))


def test_a_pruned_pair_learns_what_it_lost(pair):
    original = merged(*pair)
    small = pruned(original)
    trained = finetune(small, original, samples(256), BRIEF)
    assert lost(trained, original) < 0.5 * lost(small, original)
    # Names, owners and shapes are what they were.
    assert str(trained.attrs) == str(small.attrs)
    assert [layer.name for layer in metrics.layers(trained)] == [layer.name for layer in metrics.layers(small)]
    for got, want in zip(
        evaluate(trained["main"], {"x": images(1)}), answers(Network(trained["main"]), samples(1)), strict=True
    ):
        np.testing.assert_allclose(got, want[0], rtol=0, atol=1e-5)


def test_what_learns_nothing_better_stays(pair):
    original = merged(*pair)
    small = pruned(original)
    assert finetune(small, original, samples(64), Schedule(batch=16, least=3, rate=1e3)).same_as(small)


def test_steps_that_were_too_large_become_smaller(pair):
    original = merged(*pair)
    small = pruned(original)
    trained = finetune(small, original, samples(256), replace(BRIEF, rate=3.0))
    assert lost(trained, original) < lost(small, original)


def test_answers_that_do_not_fit_are_refused(pair, monkeypatch):
    original = merged(*pair)
    monkeypatch.setattr(memory, "too_large", lambda size: f"takes {size} B of memory")
    with pytest.raises(NNFuzeError, match=r"fine-tuning on 64 samples takes \d+ B of memory; give fewer"):
        finetune(pruned(original), original, samples(64), BRIEF)


def test_the_same_seed_learns_the_same_and_another_one_something_else(pair):
    original = merged(*pair)
    small = pruned(original)
    found = [
        learn(small, original, samples(64), Schedule(batch=16, least=4, seed=seed), Training()) for seed in (0, 0, 1)
    ]
    for name, values in found[0].items():
        np.testing.assert_array_equal(found[1][name], values)
    assert any((found[2][name] != values).any() for name, values in found[0].items())


def test_outputs_of_integers_teach_nothing(pair):
    original = merged(pair[0])
    emitter, values = Emitter(), dict[Value, Value]()
    emitter.copy(bindings(original["main"]), values)
    (scores,) = (values[field] for field in output_fields(original["main"]))
    best = emitter.emit(relax.op.argmax(scores, 1))
    both = with_main(original, emitter.finish(original["main"].params, [best, scores]))
    both = ir.with_task_outputs(both, [ir.TaskOutput("one", "best"), ir.TaskOutput("one", "scores")])
    small = pruned(both)
    trained = finetune(small, both, samples(128), BRIEF, labels={"one": np.zeros(128, "int64")})
    assert not trained.same_as(small)
    assert [str(field.ty.dtype) for field in output_fields(trained["main"])] == ["int64", "float32"]


def test_labels_teach_too(pair):
    """Classes that the original finds least likely become likelier where labels say so."""
    original = merged(pair[0])
    shown = samples(256)
    scores = answers(Network(original["main"]), shown)[0]
    unlikely = scores.argmin(-1)
    trained = finetune(original, original, shown, BRIEF, labels={"one": unlikely})
    after = answers(Network(trained["main"]), shown)[0]

    def believed(values: np.ndarray) -> float:
        odds = np.exp(values - values.max(-1, keepdims=True))
        return float(np.take_along_axis(odds / odds.sum(-1, keepdims=True), unlikely[..., None], -1).mean())

    assert believed(after) > 1.5 * believed(scores)
    unknown = finetune(original, original, shown, BRIEF, labels={"one": np.full_like(unlikely, -1)})
    assert lost(unknown, original) < 1e-3


def test_parameters_of_another_network_are_refused(pair):
    original = merged(*pair)
    found = learn(pruned(original), original, samples(64), Schedule(batch=16, least=1), Training())
    with pytest.raises(ValueError, match="another network"):
        with_parameters(original, found, Training())


def compress(models: list[Path], work: Path, **fields) -> tuple[list[str], tvm.IRModule, list[str]]:
    """Return the stages, the last graph, and what was said."""
    said: list[str] = []
    request = NetworkRequest.parse([str(model) for model in models], {"work_dir": str(work), "epochs": 1, **fields})
    graphs = make_graphs(request, said.append)
    return list(graphs.stages), graphs.last, said


def test_what_trains_in_8_bits_is_what_the_integers_compute(pair):
    """Torch, the graph in training, and the QDQ graph behind it give the same values, before and after."""
    original = merged(*pair)
    mod = InsertQDQ({"x": images(32)}, Policy.uniform(bits=8))(original)
    training = METHOD.training
    trained = finetune(mod, original, samples(256), replace(BRIEF, rate=3e-3), training)
    assert lost(trained, original) < lost(mod, original)
    for each in (mod, trained):
        in_training = training.form(each["main"])
        shown = samples(8, 5)
        found = answers(Network(in_training), shown)
        for n, image in enumerate(shown["x"]):
            both = [evaluate(func, {"x": image}) for func in (in_training, each["main"])]
            for got, graph, qdq in zip(found, *both, strict=True):
                np.testing.assert_allclose(got[n], graph, rtol=0, atol=1e-5)
                np.testing.assert_allclose(graph, qdq, rtol=0, atol=1e-6)
    # The same layers in the same form: codes, scales and biases are all that differs.
    assert [op_name(b.value) for b in bindings(trained["main"])] == [op_name(b.value) for b in bindings(mod["main"])]


def test_a_compilation_trains_once(pair, data, tmp_path):
    stages, first, said = compress(pair, tmp_path, finetune=str(data), prune=0.5)
    assert stages == ["merged", "pruned", "pruned, fine-tuned"]
    assert "fine-tuning pruned" in said
    (kept,) = (tmp_path / "finetuned").glob("*.npz")
    _, second, said = compress(pair, tmp_path, finetune=str(data), prune=0.5)
    assert f"fine-tuning pruned: as in {kept}" in said
    tvm.ir.assert_structural_equal(first, second)
    # Whatever differs is learnt anew.
    compress(pair, tmp_path, finetune=str(data), prune=0.6)
    compress(pair, tmp_path, finetune=str(data), prune=0.5, epochs=2)
    assert len(list((tmp_path / "finetuned").glob("*.npz"))) == 3


def test_what_was_kept_and_is_damaged_is_said(pair, data, tmp_path):
    fields = {"finetune": str(data), "prune": 0.5}
    compress(pair, tmp_path, **fields)
    (kept,) = (tmp_path / "finetuned").glob("*.npz")
    good = dict(np.load(kept))
    name = next(iter(good))
    for arrays in (None, {}, {name: good[name]}, {**good, name: good[name] * np.nan}, {**good, name: good[name][:1]}):
        kept.write_text("nonsense") if arrays is None else np.savez(kept, **arrays)
        with pytest.raises(InputError, match=r"finetuned/\w+\.npz: .*; delete it to train again"):
            compress(pair, tmp_path, **fields)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({}, "fine-tuning data .*no arrays"),
        ({"y": images(4)}, "array 'y' is no input of the network"),
        ({"x": images(4)[:, :1]}, "array 'x' has shape"),
        ({"x": images(4), "one": np.zeros(3, "int64")}, "3 labels of 'one' for 4 samples"),
        ({"x": images(4), "one": np.full(4, 3)}, "label 3 of 'one'; it has 3 classes"),
        ({"x": images(3)}, "holds 3 samples; give many"),
        ({"one": np.zeros(4, "int64")}, "labels of 'one'|no array for input"),
    ],
)
def test_data_that_do_not_fit_are_refused(pair, tmp_path, arrays, message):
    np.savez(tmp_path / "data.npz", **arrays)
    with pytest.raises(InputError, match=message):
        compress(pair, tmp_path, finetune=str(tmp_path / "data.npz"), prune=0.5)
    assert not (tmp_path / "finetuned").exists()


def test_without_compression_there_is_nothing_to_train(pair, data, tmp_path):
    with pytest.raises(InputError, match="nothing is compressed"):
        compress(pair, tmp_path, finetune=str(data))
    with pytest.raises(InputError, match="--epochs 1: give the data"):
        compress(pair, tmp_path, prune=0.5)


def test_a_training_that_is_interrupted_leaves_nothing_and_starts_again(pair, data, tmp_path, monkeypatch):
    fields = {"finetune": str(data), "prune": 0.5}
    whole = compress(pair, tmp_path / "whole", **fields)[1]
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(finetuning.os, "replace", Mock(side_effect=KeyboardInterrupt))
        compress(pair, tmp_path / "interrupted", **fields)
    assert not list((tmp_path / "interrupted" / "finetuned").glob("*.npz"))
    again = compress(pair, tmp_path / "interrupted", **fields)[1]
    tvm.ir.assert_structural_equal(again, whole)


@pytest.mark.slow
def test_a_training_that_is_killed_starts_again(pair, data, tmp_path):
    whole = compress(pair, tmp_path / "whole", finetune=str(data), prune=0.5)[1]
    fields = {"work_dir": str(tmp_path / "killed"), "epochs": 1, "finetune": str(data), "prune": 0.5}
    code = f"""
import os
from nnfuze_tvm.jobs import finetuning
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.training import distill, finetune

def killed(*args):
    distill.distill(*args[:4], lambda step, *_: step == 5 and os.kill(os.getpid(), 9), *args[5:])

finetune.distill = killed
make_graphs(NetworkRequest.parse({[str(each) for each in pair]}, {fields}))
"""
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False)
    assert ended.returncode == -9, ended.stderr.decode()[-500:]
    assert not list((tmp_path / "killed" / "finetuned").glob("*.npz"))
    tvm.ir.assert_structural_equal(compress(pair, tmp_path / "killed", finetune=str(data), prune=0.5)[1], whole)
