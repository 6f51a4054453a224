"""Whole networks through the whole pipeline, against ONNX Runtime."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tvm
from tvm import relax

from benchmarks.networks import build as network
from benchmarks.networks import inputs as network_inputs
from benchmarks.networks import shared_trunk_pair
from nnfuze_tvm import load
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.method import FLOAT32
from nnfuze_tvm.passes.compress.policy import Policy

HOST = resolve("host")
SPEECH = Path(__file__).parent.parent / "examples" / "speech"


def merged(models, **options):
    return tvm.transform.Sequential(pipeline.merge_phases())(load(models, **options))


def run(mod: tvm.IRModule, data: np.ndarray) -> list[np.ndarray]:
    """Return the outputs; those of two threads are the same bits."""
    executable, (one,) = build.build(mod, HOST), mod["main"].params
    first, second = (Runner(executable, *signature(mod), threads=n).stream().step({one.name: data}) for n in (1, 2))
    for got, want in zip(second, first, strict=True):
        np.testing.assert_array_equal(got, want)
    return first


def onnx_runtime(model: bytes | str, data: np.ndarray) -> np.ndarray:
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: data})[0]


def assert_close(got: np.ndarray, want: np.ndarray) -> None:
    assert np.abs(got - want).max() <= 1e-4 * np.ptp(want)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name",
    [
        "ds_cnn",
        # Two of it are below.
        slow("resnet8"),
        "mlp_autoencoder",
        slow("resnet18"),
        slow("mobilenet_v1"),
        # Its blocks are in tests/schedules/test_bands.py.
        slow("mobilenet_v2"),
        slow("resnet50"),
        "transformer",
    ],
)
def test_fp32_equals_onnx_runtime(name):
    model = network(name, batch_norm=name in ("resnet8", "mobilenet_v2"))
    data = network_inputs(model, 1, seed=1)
    data = data if isinstance(data, np.ndarray) else next(iter(data.values()))
    (got,) = run(merged([model], tasks=[name]), data)
    assert_close(got, onnx_runtime(model.SerializeToString(), data))


@pytest.mark.parametrize("name", ["ds_cnn", slow("mobilenet_v1_025"), slow("resnet8"), slow("transformer")])
def test_threads_change_no_bit_of_int8(name):
    model = network(name)
    data = network_inputs(model, 2)
    mod = InsertQDQ(data, Policy.uniform(bits=8))(merged([model], tasks=[name]))
    run(mod, next(iter(data.values()))[:1])


def calls(mod: tvm.IRModule) -> Counter[str]:
    """Return how often ``main`` of a lowered module calls each kernel."""
    return Counter(
        binding.value.args[0].name_hint for binding in bindings(mod["main"]) if op_name(binding.value) == "call_tir"
    )


@pytest.mark.parametrize("pair", ["shared", slow("independent")])
def test_speech_pair_equals_onnx_runtime_and_a_separate_network(pair):
    paths = [SPEECH / pair / f"{task}.onnx" for task in ("keyword", "speaker")]
    clips = np.load(SPEECH / "evaluation.npz")["audio"][:4]
    both = build.lower(merged(paths), HOST)
    # Of the second one, whose trunk the merge drops where they share it.
    second = build.lower(merged(paths[1:]), HOST)
    if pair == "shared":
        # One more head, and nothing else.
        assert calls(both).total() == calls(second).total() + 1
    machine, alone = (relax.VirtualMachine(build.generate(mod, HOST), tvm.cpu()) for mod in (both, second))
    for clip in clips:
        outputs = machine["main"](tvm.runtime.tensor(clip[None]))
        for path, output in zip(paths, outputs, strict=True):
            assert_close(output.numpy(), onnx_runtime(str(path), clip[None]))
        (separate,) = alone["main"](tvm.runtime.tensor(clip[None]))
        np.testing.assert_array_equal(outputs[1].numpy(), separate.numpy())


def test_shipped_policy_names_layers_of_the_shipped_networks():
    mod = merged([SPEECH / "shared" / f"{task}.onnx" for task in ("keyword", "speaker")])
    policy = Policy.load(SPEECH / "policy.json")
    policy.validate_layers([layer.name for layer in metrics.layers(mod)], ir.lineage(mod))
    assert policy.for_layer("keyword/trunk/stem/Conv").keep == 1.0
    assert policy.for_layer("speaker/head/Gemm").precision == FLOAT32
    assert policy.for_layer("keyword/trunk/block1/conv1/Conv").keep == 0.75


def test_two_heads_on_one_trunk_of_a_larger_network():
    models = shared_trunk_pair("resnet8", seed=3)
    data = network_inputs(models[0], 1, seed=2)
    data = data if isinstance(data, np.ndarray) else next(iter(data.values()))
    outputs = run(merged(list(models), tasks=["first", "second"]), data)
    for model, output in zip(models, outputs, strict=True):
        assert_close(output, onnx_runtime(model.SerializeToString(), data))


@pytest.mark.parametrize(
    ("name", "rule", "target"),
    [
        # It runs on emulated boards.
        slow("resnet8", "conv2d", "aarch64"),
        ("resnet8", "conv2d", "x86-64-v4"),
        ("transformer", "dense", "aarch64+dotprod"),
        ("transformer", "dense", "x86-64-v3"),
        slow("resnet8", "conv2d", "aarch64+dotprod"),
        slow("resnet8", "conv2d", "x86-64-v3"),
        slow("transformer", "dense", "aarch64"),
        slow("transformer", "dense", "x86-64-v4"),
    ],
)
def test_every_kernel_of_a_network_compiles_for_every_target(name, rule, target):
    cpu = resolve(target)
    lowered = build.lower(merged([network(name)], tasks=[name]), cpu)
    rules = {f.attrs["nnfuze.rule"] for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}
    assert rule in rules and "fallback" not in rules
    executable = build.generate(lowered, cpu)
    assembly = [m.inspect_source("asm") for m in (executable.mod, *executable.mod.imports) if m.kind == "llvm"]
    assert assembly
    called = {called for text in assembly for called in re.findall(r"^\s+(?:callq?|bl)\s+(\w+)", text, re.MULTILINE)}
    assert not called & {"expf", "erff", "tanhf", "roundf", "rintf", "nearbyintf", "sqrtf", "fmaf"}
