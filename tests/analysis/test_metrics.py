"""Costs of networks whose figures were counted by hand."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
import tvm
from onnx import TensorProto, helper, numpy_helper
from tvm import relax

from benchmarks.networks import build as build_network
from nnfuze_tvm.analysis import measure, metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.deploy.runner import Input, Output, Runner, sample_batches, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.errors import InputError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy
from tests.tiny_networks import classifier, samples


def merged(*models: onnx.ModelProto, tasks: list[str] | None = None) -> tvm.IRModule:
    return tvm.transform.Sequential(pipeline.merge_phases())(load(list(models), tasks))


def by_name(mod: tvm.IRModule) -> dict[str, metrics.LayerCost]:
    return {layer.name: layer for layer in metrics.layers(mod)}


def test_hand_counted_network() -> None:
    mod = merged(classifier(), tasks=["one"])
    layers = by_name(mod)
    # 6×6 positions × 8 channels × (2 × 3 × 3) each, 8·2·3·3 weights and 8 biases
    assert layers["one/conv"].macs == 36 * 8 * 18
    assert layers["one/conv"].parameters == 144 + 8
    assert layers["one/dense_scores"].macs == 8 * 3
    assert layers["one/dense_scores"].parameters == 24
    assert [layer.depth for layer in layers.values()] == [0, 1]
    assert not any(layer.integer for layer in layers.values())
    assert metrics.size(mod) == metrics.Size(144 + 8 + 24, 4 * (144 + 8 + 24), 0.0)


@pytest.mark.parametrize(
    ("node", "weight", "expected"),
    [
        # depthwise: every output channel sees one input channel
        (helper.make_node("Conv", ["x", "w"], ["y"], group=4, pads=[1] * 4), (4, 1, 3, 3), 8 * 8 * 4 * 9),
        # two groups, each from 2 to 3 channels; stride 2
        (helper.make_node("Conv", ["x", "w"], ["y"], group=2, strides=[2, 2]), (6, 2, 1, 1), 4 * 4 * 6 * 2),
        # transposed: every input position adds to 2×2 positions of 5 channels
        (helper.make_node("ConvTranspose", ["x", "w"], ["y"], strides=[2, 2]), (4, 5, 2, 2), 8 * 8 * 4 * 5 * 4),
    ],
    ids=["depthwise", "grouped", "transposed"],
)
def test_macs_of_convolutions(node: onnx.NodeProto, weight: tuple[int, ...], expected: int) -> None:
    node.name = "layer"
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [1, 4, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.ones(weight, np.float32), "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    model = onnx.shape_inference.infer_shapes(model)
    layer = by_name(merged(model, tasks=["t"]))["t/layer"]
    assert layer.macs == expected
    assert layer.parameters == int(np.prod(weight))


def test_sharing_and_sparsity() -> None:
    first, second = classifier(), classifier(head_seed=1)
    for tensor in second.graph.initializer:
        if tensor.name == "dense_w":
            values = numpy_helper.to_array(tensor).copy()
            values[0] = 0
            tensor.CopyFrom(numpy_helper.from_array(values, "dense_w"))
    mod = merged(first, second, tasks=["one", "two"])
    layers = by_name(mod)
    assert layers["one/conv"].tasks == ("one", "two")
    assert layers["one/dense_scores"].tasks == ("one",)
    assert layers["two/dense_scores"].tasks == ("two",)
    # the trunk is stored once
    assert metrics.size(mod).parameters == 152 + 24 + 24
    assert metrics.weight_sparsity(mod) == pytest.approx(8 / (144 + 24 + 24))


def test_unmerged_modules_count_every_task() -> None:
    mod = load([classifier(), classifier(head_seed=1)], ["one", "two"])
    assert sum(layer.macs for layer in metrics.layers(mod)) == 2 * (36 * 8 * 18 + 24)
    assert metrics.size(mod).parameters == 2 * 176


def test_integer_layers_and_their_bytes() -> None:
    quantized = InsertQDQ({"x": samples()}, Policy.uniform(bits=8))(merged(classifier(), tasks=["one"]))
    layers = by_name(quantized)
    assert all(layer.integer for layer in layers.values())
    assert layers["one/conv"].macs == 36 * 8 * 18
    lowered = build.lower(quantized, resolve("x86-64-v3"))
    # 192 + 64 weights of one byte (a kernel row of 3 · 2 is stored as 8, for the dot products, and three columns as a
    # vector of 8), and biases and scales of four bytes for 8 + 3 channels at most
    assert 256 <= metrics.size(lowered).bytes <= 256 + 4 * 2 * 11


def test_what_gives_as_much_as_it_takes_is_no_classifier() -> None:
    mod = load([build_network("mlp_autoencoder")], ["t"])
    outputs = signature(tvm.transform.Sequential(pipeline.merge_phases())(mod)).outputs
    assert outputs[0].classes is None
    assert signature(merged(classifier(), tasks=["t"])).outputs[0].classes == 3


def test_memory_plan_and_kernels() -> None:
    target = resolve("host")
    mod = merged(classifier(), tasks=["one"])
    lowered = build.finished(build.lower(mod, target), target)
    kernels = metrics.kernels(lowered)
    assert kernels[0].arguments[0] == ((1, 2, 6, 6), "float32") or kernels[0].arguments[0] == (
        (1, 6, 6, 2),
        "float32",
    )
    assert {kernel.tasks for kernel in kernels} == {("one",)}
    # at least the convolution's 36 × 8 floats and the output, at most as if nothing were reused
    assert 4 * (288 + 3) <= usage(lowered, target).total() <= 4 * (72 + 288 + 8 + 8 + 3) + 64
    runner = Runner(build.generate(lowered, target), *signature(mod))
    times = measure.kernel_times(runner.library, [(k.name, k.arguments) for k in kernels], seconds_each=0.001)
    assert set(times) == {kernel.name for kernel in kernels}
    assert all(0 < seconds < 0.1 for seconds in times.values())


def test_a_kernel_may_take_nothing() -> None:
    assert metrics._tensors(relax.Tuple([])) == []


def test_interleaved_measurement_takes_turns() -> None:
    order: list[str] = []
    calls = {name: (lambda name=name: order.append(name)) for name in "ab"}
    result = measure.measure_interleaved(calls, repeats=4)
    assert order[-16:] == list("aabb") * 4
    assert result["a"].repeats == 4
    assert 0 < result["a"].median <= result["a"].p95
    with pytest.raises(InputError, match="repeats: 0"):
        measure.measure(lambda: None, repeats=0)


OUTPUT = Output("one", "scores", (1, 3), "float32", 3)


def test_accuracy_ignores_samples_without_a_label() -> None:
    answers = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    quality = measure.quality(OUTPUT, answers, None, np.array([0, 1, 0, -1]))
    assert quality.accuracy == pytest.approx(2 / 3)
    assert quality.labelled == 3
    assert quality.agreement is None
    assert measure.quality(OUTPUT, answers, None, np.full(4, -1)).accuracy is None


def test_agreement_and_error() -> None:
    reference = np.eye(3, dtype=np.float32)[[0, 1, 2, 0]]
    answers = np.eye(3, dtype=np.float32)[[0, 1, 1, 0]]
    quality = measure.quality(OUTPUT, answers, reference, None)
    assert quality.agreement == 0.75
    assert quality.error == pytest.approx(np.sqrt(2) / 2)
    image = Output("one", "image", (1, 3, 4, 4), "float32")
    picture = np.ones((2, 3, 4, 4), np.float32)
    quality = measure.quality(image, picture * 1.5, picture, None)
    assert quality.agreement is None
    assert quality.error == pytest.approx(0.5)


def test_evaluation_data_that_does_not_fit() -> None:
    inputs = [Input("x", (2, 3), "float32")]
    good = np.zeros((5, 3), np.float32)
    assert [batch["x"].shape for batch in sample_batches({"x": good}, inputs)] == [(2, 3), (2, 3)]
    for arrays, message in [
        ({}, "no array for input 'x'"),
        ({"x": good.astype(np.float64)}, "float64"),
        ({"x": good[:, :2]}, r"shape \[5, 2\]"),
        ({"x": good[:1]}, "at least one batch"),
    ]:
        with pytest.raises(InputError, match=message):
            sample_batches(arrays, inputs)
    with pytest.raises(InputError, match="label 3 of 'one'; it has 3 classes"):
        measure.labels_of({"one": np.array([0, 3])}, [OUTPUT], 2)
    with pytest.raises(InputError, match="use integers"):
        measure.labels_of({"one": np.array([0.5])}, [OUTPUT], 1)
