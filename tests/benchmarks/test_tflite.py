import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from benchmarks.arm import tflite
from benchmarks.engines.base import Unavailable
from benchmarks.engines.onnxruntime import reference
from benchmarks.workloads import workload

interpreter = pytest.importorskip("ai_edge_litert.interpreter", reason="pip install ai-edge-litert")


def save(path, nodes, weights, inputs=(("x", (1, 3, 12, 10)),)):
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in inputs],
        [helper.make_tensor_value_info("out", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.asarray(array, np.float32), name) for name, array in weights.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    onnx.save(onnx.shape_inference.infer_shapes(model), path)


def test_a_converted_network_answers_as_onnx_runtime_does(tmp_path):
    rng = np.random.default_rng(0)
    weights = {
        "w1": rng.standard_normal((8, 3, 3, 3)),
        "b1": rng.standard_normal(8),
        "w2": rng.standard_normal((16, 1, 5, 3)),
        "w3": rng.standard_normal((16, 16, 1, 1)),
        "b3": rng.standard_normal(16),
        "w4": rng.standard_normal((5, 16)),
        "b4": rng.standard_normal(5),
        "zero": 0.0,
        "six": 6.0,
    }
    node = helper.make_node
    nodes = [
        # A convolution with as much padding before as after; TensorFlow Lite would have it all behind.
        node("Conv", ["x", "w1", "b1"], ["c1"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Relu", ["c1"], ["r1"]),
        node("Conv", ["r1", "w2"], ["c2"], kernel_shape=[5, 3], group=8, pads=[2, 1, 2, 1]),
        node("Clip", ["c2", "zero", "six"], ["r2"]),
        node("MaxPool", ["r2"], ["p2"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["p2", "w3", "b3"], ["c3"], kernel_shape=[1, 1]),
        node("Add", ["c3", "p2"], ["a3"]),
        node("Relu", ["a3"], ["r3"]),
        node("Add", ["r3", "a3"], ["a4"]),
        node("GlobalAveragePool", ["a4"], ["g"]),
        node("Flatten", ["g"], ["f"]),
        node("Gemm", ["f", "w4", "b4"], ["out"], transB=1),
    ]
    save(tmp_path / "net.onnx", nodes, weights)
    work = workload(str(tmp_path / "net.onnx"), tmp_path)
    (exact,) = reference(work)
    file = tflite.model(work, "fp32")
    engine = interpreter.Interpreter(str(file))
    engine.allocate_tensors()
    for feed, wanted in zip(work.evaluation, exact, strict=True):
        engine.set_tensor(engine.get_input_details()[0]["index"], tflite.channels_last(feed[0]["x"]))
        engine.invoke()
        found = engine.get_tensor(engine.get_output_details()[0]["index"])
        assert np.abs(found - wanted).max() < 1e-5 * np.ptp(exact)


def test_what_is_not_converted_is_said(tmp_path):
    save(tmp_path / "tanh.onnx", [helper.make_node("Tanh", ["x"], ["out"])], {})
    save(tmp_path / "two.onnx", [helper.make_node("Add", ["x", "y"], ["out"])], {}, [("x", (1, 4)), ("y", (1, 4))])
    for name, message in (("tanh", "knows no Tanh"), ("two", "one input only")):
        work = workload(str(tmp_path / f"{name}.onnx"), tmp_path)
        with pytest.raises(Unavailable, match=message):
            tflite.model(work, "fp32")
        assert not list(work.directory.glob("tflite*"))
