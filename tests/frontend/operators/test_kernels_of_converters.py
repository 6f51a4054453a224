"""Converters that write a kernel of their own: whatever it is called, networks are merged and built."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import te

from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.frontend import load, onnx_import
from nnfuze_tvm.passes import pipeline
from tests.frontend.operators.one_node import one_node


@pytest.fixture
def powers(monkeypatch):
    """Make Relu a kernel ``scaled`` whose factor tells networks apart."""

    def convert(node, inputs):
        factor = float(node.opset)

        def scaled(x):
            return te.compute(x.shape, lambda *at: x[at] * factor, name="scaled")

        return node.builder.emit_te(scaled, inputs[0])

    monkeypatch.setattr(onnx_import, "CONVERTERS", {**onnx_import.CONVERTERS, "Relu": convert})


def test_kernels_and_tasks_may_have_the_same_names(powers):
    data = np.arange(6.0, dtype="float32")
    tasks = {"a": 13, "a_scaled": 14, "b": 13}
    networks = [one_node("Relu", [data], opset=opset)[0] for opset in tasks.values()]
    mod = tvm.transform.Sequential(pipeline.merge_phases(None))(load(networks, list(tasks)))
    runner = Runner(build.build(mod, resolve("host")), *signature(mod))
    answers = runner.run({value.name: data for value in runner.inputs})
    for task, opset in tasks.items():
        np.testing.assert_array_equal(answers[task], data * opset)
