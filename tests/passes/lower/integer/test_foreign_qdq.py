"""Networks that another tool quantized: our integer graph against ONNX Runtime's, within a quantum or two."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from nnfuze_tvm.frontend import load
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.graph.ir import FLOAT_LAYERS_ATTR
from nnfuze_tvm.passes.lower.integer.realize_integer import RealizeInteger
from nnfuze_tvm.passes.lower.layout import ToNHWC
from tests.helpers import evaluate_module

SHAPE = (1, 3, 10, 10)


def network() -> onnx.ModelProto:
    """Convolutions of all kinds, a residual, a concatenation, poolings and a dense layer."""
    rng = np.random.default_rng(0)
    weights, nodes = [], []

    def weight(name, *shape):
        scale = np.sqrt(2 / np.prod(shape[1:])) if len(shape) > 1 else 0.2
        weights.append(numpy_helper.from_array((rng.standard_normal(shape) * scale).astype("float32"), name))
        return name

    def node(kind, inputs, output, **attributes):
        nodes.append(helper.make_node(kind, inputs, [output], name=output, **attributes))
        return output

    def conv(source, out, channels, size, name, groups=1, **attributes):
        names = [source, weight(f"{name}.w", out, channels // groups, size, size), weight(f"{name}.b", out)]
        return node("Conv", names, name, pads=[size // 2] * 4, group=groups, **attributes)

    stem = node("Relu", [conv("x", 8, 3, 3, "stem")], "stem.relu")
    deep = node("Relu", [conv(stem, 8, 8, 3, "depthwise", groups=8)], "depthwise.relu")
    joined = node("Relu", [node("Add", [conv(deep, 8, 8, 1, "point"), stem], "add")], "add.relu")
    small = node("MaxPool", [joined], "max", kernel_shape=[2, 2], strides=[2, 2])
    both = node("Concat", [conv(small, 4, 8, 1, "left"), conv(small, 4, 8, 3, "right")], "concat", axis=1)
    mean = node("AveragePool", [both], "average", kernel_shape=[3, 3], strides=[1, 1], pads=[1] * 4)
    flat = node("Flatten", [node("GlobalAveragePool", [mean], "global")], "flat")
    node("Gemm", [flat, weight("fc.w", 5, 8), weight("fc.b", 5)], "y", transB=1)
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, SHAPE)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, (1, 5))],
        weights,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)


class Reader(CalibrationDataReader):
    def __init__(self, samples):
        self.samples = iter(samples)

    def get_next(self):
        sample = next(self.samples, None)
        return None if sample is None else {"x": sample}


@pytest.mark.parametrize(
    ("activation", "per_channel", "symmetric", "nhwc"),
    [
        (QuantType.QUInt8, True, False, True),
        (QuantType.QInt8, True, True, True),
        (QuantType.QInt8, False, False, True),
        (QuantType.QUInt8, False, True, False),
    ],
)
def test_static_quantization_of_onnxruntime(activation, per_channel, symmetric, nhwc, tmp_path):
    samples = np.random.default_rng(1).standard_normal((8, *SHAPE)).astype("float32")
    onnx.save(network(), tmp_path / "float.onnx")
    quantize_static(
        tmp_path / "float.onnx",
        tmp_path / "quantized.onnx",
        Reader(samples),
        quant_format=QuantFormat.QDQ,
        activation_type=activation,
        weight_type=QuantType.QInt8,
        per_channel=per_channel,
        extra_options={"ActivationSymmetric": symmetric},
    )
    # Without its own fusions, whose kernels saturate 16-bit sums on x86 without VNNI.
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = onnxruntime.InferenceSession(tmp_path / "quantized.onnx", options)
    mod = load([str(tmp_path / "quantized.onnx")], ["net"])
    real = RealizeInteger()(ToNHWC()(mod) if nhwc else mod)
    assert list(real.attrs[FLOAT_LAYERS_ATTR]) == []
    assert not {"quantize", "dequantize"} & {op_name(b.value) for b in bindings(real["net"])}
    last = [b.value for b in bindings(mod["net"]) if op_name(b.value) == "dequantize"][-1]
    quantum = float(last.args[1].value.numpy())
    wanted = session.run(None, {"x": samples[0]})[0]
    result = evaluate_module(real, {"x": samples[0]}, "net")[0]
    assert np.abs(result - wanted).max() <= 1.01 * quantum
