"""The layers that are measured: their results are ONNX Runtime's, and integers are exact."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tvm

import nnfuze_tvm
from benchmarks import layers
from nnfuze_tvm.deploy import build
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph.evaluate import executor
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger

SMALL = (
    layers.Layer("conv1d", (1, 20, 33), (24, 20, 5), {"pads": [2, 1], "strides": [2]}),
    layers.Layer("conv1d", (1, 1, 400), (65, 1, 32), {"strides": [8]}),
    layers.Layer("conv1d", (1, 16, 30), (32, 8, 3), {"pads": [2, 2], "dilations": [2], "group": 2}),
    layers.Layer("depthwise conv1d", (1, 40, 29), (40, 1, 7), {"pads": [3, 3], "group": 40}),
    layers.Layer("conv1d_transpose", (1, 16, 20), (16, 12, 4), {"pads": [1, 1], "strides": [2]}),
    layers.Layer("conv2d_transpose", (1, 16, 9, 7), (16, 12, 3, 3), {"strides": [2, 2], "output_padding": [1, 1]}),
    layers.Layer("conv2d_transpose", (1, 16, 5, 7), (16, 1, 4, 4), {"strides": [2, 2], "pads": [1] * 4, "group": 16}),
    layers.Layer("conv3d", (1, 8, 4, 9, 10), (24, 8, 3, 3, 3), {"pads": [1] * 6}),
)


def loaded(model, tmp_path):
    onnx.save(model, tmp_path / "layer.onnx")
    return tvm.transform.Sequential(pipeline.merge_phases())(nnfuze_tvm.load([tmp_path / "layer.onnx"]))


def rules(mod):
    lowered = build.lower(mod, resolve("host"))
    return {str(f.attrs["nnfuze.rule"]) for _, f in lowered.functions_items() if isinstance(f, tvm.tirx.PrimFunc)}


@pytest.mark.parametrize("layer", SMALL, ids=lambda layer: f"{layer.family}-{layer.attributes.get('group', 1)}")
def test_float32_equals_onnx_runtime(layer, tmp_path):
    model = layers.network(layer)
    x = np.random.default_rng(1).standard_normal(layer.data).astype("float32")
    (want,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    mod = loaded(model, tmp_path)
    (got,) = layers.ours(model).run({"x": x}).values()
    assert np.abs(got - want).max() <= 1e-5 * np.ptp(want)
    assert "fallback" not in rules(mod)


@pytest.mark.parametrize(
    "layer",
    [layer for layer in SMALL if layer.family in layers.QUANTIZED],
    ids=lambda layer: f"{layer.family}-{layer.attributes.get('group', 1)}",
)
def test_integers_are_those_of_numpy(layer, tmp_path):
    """The built network gives the bits that NumPy gives for its integer graph, and no layer is left in float32."""
    model = layers.network(layer, np.dtype("int8"))
    x = np.random.default_rng(1).standard_normal(layer.data).astype("float32")
    mod = loaded(model, tmp_path)
    integer = tvm.transform.Sequential([pipeline.layout_phase(), RealizeInteger()])(mod)
    assert not integer.attrs["nnfuze.float_layers"]
    (got,) = layers.ours(model).run({"x": x}).values()
    (want,) = executor(integer)({mod["main"].params[0].name: x})
    np.testing.assert_array_equal(got, want)
    assert "fallback" not in rules(mod)
    # And those are what the QDQ graph means, but for a rounding where float32 sums are halfway.
    (meant,) = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})
    step = 8.0 / 127
    assert np.abs(got - meant).max() <= 1.001 * step and (np.abs(got - meant) > step / 2).mean() < 0.01


def test_the_table_has_a_row_per_layer_and_precision(monkeypatch, capsys):
    monkeypatch.setattr(layers, "LAYERS", (SMALL[0], SMALL[4]))
    monkeypatch.setattr("sys.argv", ["layers", "--rounds", "1"])
    layers.main()
    printed = capsys.readouterr().out
    assert printed.count("conv1d") == 3 and printed.count("int8") == 1 and printed.count("×") > 3
