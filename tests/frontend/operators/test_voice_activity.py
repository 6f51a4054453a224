"""A voice activity detector as it is shipped: spectrum, encoder and state in branches, one for each sample rate."""

from __future__ import annotations

import numpy as np
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph import dataflow
from tests.helpers import compiled


def node(op, inputs, outputs, **attributes):
    name = f"{op}_{outputs.split()[0]}"
    return helper.make_node(op, inputs.split(), outputs.split(), name=name, **attributes)


def transform(length):
    """Cosines above sines, windowed: ``[length + 2, 1, length]``."""
    angles = 2 * np.pi * np.outer(np.arange(length // 2 + 1), np.arange(length)) / length
    return (np.concatenate([np.cos(angles), -np.sin(angles)]) * np.hanning(length))[:, None]


def squeezed(rank):
    """What an exporter makes of ``squeeze(1)``: a branch on a shape, of which one side can't be computed."""
    squeeze = helper.make_graph(
        [node("Squeeze", "mean one_axis", f"squeezed{rank}")],
        "squeeze",
        [],
        [helper.make_empty_tensor_value_info(f"squeezed{rank}")],
    )
    same = helper.make_graph(
        [node("Identity", "mean", f"same{rank}")], "same", [], [helper.make_empty_tensor_value_info(f"same{rank}")]
    )
    return [
        node("Shape", "mean", "shape"),
        node("Gather", "shape one_axis", "size"),
        node("Squeeze", "size", "size0"),
        node("Equal", "size0 single", "is_one"),
        node("If", "is_one", "logit", then_branch=squeeze, else_branch=same),
    ]


def detector(length, channels, seed):
    """One branch: magnitudes of a spectrum with reflected edges, convolutions, a state, and a probability."""
    rng = np.random.default_rng(seed)
    bins = length // 2 + 1
    weights = {
        "pads": np.array([0, 0, length // 4, 0, 0, length // 4]),
        "basis": transform(length).astype("float32"),
        "bins": np.array([bins, bins]),
        "axis1": np.array([1]),
        "one_axis": np.array([1]),
        "single": np.array(1),
        "two": np.float32(2),
    }
    shapes = {"w1": (channels, bins, 3), "w2": (channels, channels, 3), "w3": (1, channels, 1)}
    weights |= {
        name: (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype("float32")
        for name, shape in shapes.items()
    }
    weights["spread"] = rng.standard_normal((1, 8)).astype("float32")
    nodes = [
        node("Unsqueeze", "input axis1", "signal"),
        node("Pad", "signal pads", "padded", mode="reflect"),
        node("Conv", "padded basis", "spectrum", strides=[length // 2]),
        node("Split", "spectrum bins", "real imaginary", axis=1),
        node("Pow", "real two", "real2"),
        node("Pow", "imaginary two", "imaginary2"),
        node("Add", "real2 imaginary2", "power"),
        node("Sqrt", "power", "magnitude"),
        node("Conv", "magnitude w1", "c1", pads=[1, 1], strides=[2]),
        node("Relu", "c1", "r1"),
        node("Conv", "r1 w2", "c2", pads=[1, 1]),
        node("Relu", "c2", "r2"),
        node("Conv", "r2 w3", "c3"),
        node("ReduceMean", "c3", "mean", axes=[2], keepdims=1),
        *squeezed(length),
        node("MatMul", "logit spread", "change"),
        node("Add", "state change", "sum"),
        node("Tanh", "sum", f"state{length}"),
        node("ReduceMean", f"state{length}", "level", axes=[1], keepdims=1),
        node("Sigmoid", "level", f"probability{length}"),
    ]  # fmt: skip
    outputs = [helper.make_empty_tensor_value_info(f"{name}{length}") for name in ("probability", "state")]
    given = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    return helper.make_graph(nodes, f"rate{length}", [], outputs, given)


def network():
    nodes = [
        node("Equal", "sr high", "is_high"),
        node("If", "is_high", "output stateN", then_branch=detector(256, 16, 1), else_branch=detector(128, 12, 2)),
    ]
    inputs = [
        helper.make_tensor_value_info("input", TensorProto.FLOAT, [1, 512]),
        helper.make_tensor_value_info("state", TensorProto.FLOAT, [1, 8]),
        helper.make_tensor_value_info("sr", TensorProto.INT64, []),
    ]
    outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ("output", "stateN")]
    high = numpy_helper.from_array(np.array(16000), "high")
    graph = helper.make_graph(nodes, "vad", inputs, outputs, [high])
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 16)], ir_version=8)


def test_a_detector_with_a_branch_for_each_rate():
    model, rng = network(), np.random.default_rng(0)
    session = onnxruntime.InferenceSession(model.SerializeToString())
    run, steps = compiled(load([model], ["vad"]), "vad"), 20
    for rate in (8000, 16000):
        state, answers = np.zeros((1, 8), "float32"), []
        for _ in range(steps):
            feeds = {"input": rng.standard_normal((1, 512)).astype("float32"), "state": state, "sr": np.array(rate)}
            expected = session.run(None, feeds)
            actual = run(feeds)
            for one, other in zip(actual, expected, strict=True):
                assert one.shape == other.shape and one.dtype == other.dtype
                np.testing.assert_allclose(one, other, atol=1e-5)
            state = expected[1]
            answers.append(expected[0].item())
    assert len({*answers}) == steps


def test_a_rate_that_is_fixed_leaves_one_branch():
    model = network()
    both = len(dataflow.bindings(load([model], ["vad"])["vad"]))
    model.graph.initializer.append(numpy_helper.from_array(np.array(8000), "sr"))
    main = load([model], ["vad"])["vad"]
    assert [param.name for param in main.params] == ["input", "state"]
    assert len(dataflow.bindings(main)) <= both // 2
