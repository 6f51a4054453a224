"""A network that was trained for weights of one bit (`benchmarks.binary_digits`): what it learnt, it keeps exactly."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import tvm

from nnfuze_tvm import load
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import pipeline

DIGITS = Path(__file__).parents[3] / "examples" / "digits"


@pytest.mark.parametrize("counted", [True, False])
def test_every_digit_is_what_onnx_runtime_says(counted):
    target = resolve("host")
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([DIGITS / "binary.onnx"]))
    machine = replace(build.machine(target), bit_serial=lambda *_: counted)
    lowered = build.schedule(pipeline.fused_module(mod, target, machine), target)
    called = [b.value.args[0].name_hint for b in bindings(lowered["main"]) if op_name(b.value) == "call_tir"]
    assert sum("bit_serial" in name for name in called) == (2 if counted else 0)
    runner = Runner(build.generate(lowered, target), *signature(mod))
    # With optimizations ONNX Runtime is one step off where a value lies between two codes.
    settings = onnxruntime.SessionOptions()
    settings.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(DIGITS / "binary.onnx", settings)
    with np.load(DIGITS / "evaluation.npz") as held:
        images, labels = held["image"], held["binary"]
    got = np.concatenate([runner.run({"image": image})["binary"] for image in images])
    want = np.concatenate([session.run(None, {"image": image})[0] for image in images])
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())
    np.testing.assert_array_equal(got.argmax(1), want.argmax(1))
    assert (got.argmax(1) == labels).mean() > 0.98
