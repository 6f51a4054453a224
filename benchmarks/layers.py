"""Convolutions that are not two-dimensional, and transposed ones, against ONNX Runtime: one layer at a time.

Both get the same ONNX network: the layer between two ReLUs. In int8 each gets it in the QDQ form that it is fastest in:
ours with int8 activations, ONNX Runtime with uint8 ones; weights are int8 per output channel in both. One thread each,
in turns in one process.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

import nnfuze_tvm
from benchmarks.arguments import at_least, names, output_console
from benchmarks.interleaved import interleaved
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.runner import Runner, signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import pipeline


@dataclass(frozen=True)
class Layer:
    """One layer: the shape of its data, its weights as ONNX has them, and its node's attributes."""

    family: str
    data: tuple[int, ...]
    weights: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def transposed(self) -> bool:
        """Whether it is a ConvTranspose."""
        return "transpose" in self.family

    @property
    def outputs(self) -> int:
        """Output channels."""
        return self.weights[1] * self.attributes.get("group", 1) if self.transposed else self.weights[0]


LAYERS = (
    Layer("conv1d", (1, 64, 400), (64, 64, 3), {"pads": [1, 1]}),
    Layer("conv1d", (1, 40, 98), (128, 40, 9), {"pads": [4, 4]}),
    Layer("conv1d", (1, 128, 397), (256, 128, 5), {"pads": [2, 2], "strides": [2]}),
    Layer("depthwise conv1d", (1, 64, 128), (64, 1, 13), {"pads": [6, 6], "group": 64}),
    Layer("depthwise conv1d", (1, 256, 200), (256, 1, 31), {"pads": [15, 15], "group": 256}),
    Layer("depthwise conv1d", (1, 512, 397), (512, 1, 3), {"pads": [2, 2], "dilations": [2], "group": 512}),
    Layer("conv1d_transpose", (1, 64, 400), (64, 32, 4), {"pads": [1, 1], "strides": [2]}),
    Layer("conv1d_transpose", (1, 256, 64), (256, 128, 16), {"pads": [4, 4], "strides": [8]}),
    Layer("conv1d_transpose", (1, 128, 500), (128, 64, 3), {"pads": [1, 1]}),
    Layer("conv2d_transpose", (1, 64, 32, 32), (64, 32, 2, 2), {"strides": [2, 2]}),
    Layer("conv2d_transpose", (1, 128, 16, 16), (128, 64, 4, 4), {"pads": [1] * 4, "strides": [2, 2]}),
    Layer(
        "conv2d_transpose",
        (1, 64, 28, 28),
        (64, 32, 3, 3),
        {"pads": [1] * 4, "strides": [2, 2], "output_padding": [1, 1]},
    ),
    Layer("conv3d", (1, 3, 8, 56, 56), (32, 3, 3, 3, 3), {"pads": [1] * 6}),
    Layer("conv3d", (1, 32, 8, 28, 28), (64, 32, 3, 3, 3), {"pads": [1] * 6, "strides": [2, 2, 2]}),
    Layer("conv3d", (1, 64, 8, 14, 14), (64, 64, 1, 3, 3), {"pads": [0, 1, 1, 0, 1, 1]}),
)
FAMILIES = tuple(dict.fromkeys(layer.family for layer in LAYERS))
# What has an integer form.
QUANTIZED = ("conv1d", "depthwise conv1d", "conv2d_transpose")


def network(layer: Layer, activations: np.dtype | None = None) -> onnx.ModelProto:
    """Return the network of a layer between two ReLUs, in float32 or in QDQ form with such activations."""
    rng = np.random.default_rng(0)
    weights = (rng.standard_normal(layer.weights) / np.sqrt(np.prod(layer.weights[1:]))).astype("float32")
    bias = rng.standard_normal(layer.outputs).astype("float32")
    constants: dict[str, np.ndarray] = {}
    nodes = [helper.make_node("Relu", ["x"], ["r"])]

    def quantize(name: str, result: str, scale: float) -> None:
        assert activations is not None
        step = np.float32(scale / np.iinfo(activations).max)
        constants.update({f"{result}.scale": np.array(step), f"{result}.zero": np.zeros((), activations)})
        parameters = [f"{result}.scale", f"{result}.zero"]
        nodes.append(helper.make_node("QuantizeLinear", [name, *parameters], [f"{result}.codes"]))
        nodes.append(helper.make_node("DequantizeLinear", [f"{result}.codes", *parameters], [result]))

    if activations is None:
        constants.update(w=weights, b=bias)
    else:
        quantize("r", "q", 4.0)
        axis = 1 if layer.transposed else 0
        own = np.abs(weights).max(axis=tuple(i for i in range(weights.ndim) if i != axis)) / 127
        wide = own.reshape([-1 if i == axis else 1 for i in range(weights.ndim)])
        constants.update({"w.codes": np.rint(weights / wide).astype("int8"), "w.scale": own.astype("float32")})
        constants["w.zero"] = np.zeros(len(own), "int8")
        nodes.append(helper.make_node("DequantizeLinear", ["w.codes", "w.scale", "w.zero"], ["w"], axis=axis))
        # The bias is in units of the sums.
        groups = layer.outputs // len(own)
        units = (np.tile(own, groups) * constants["q.scale"]).astype("float32")
        constants.update({"b.codes": np.rint(bias / units).astype("int32"), "b.scale": units})
        constants["b.zero"] = np.zeros(len(units), "int32")
        nodes.append(helper.make_node("DequantizeLinear", ["b.codes", "b.scale", "b.zero"], ["b"], axis=0))
    source = "r" if activations is None else "q"
    kind = "ConvTranspose" if layer.transposed else "Conv"
    nodes.append(helper.make_node(kind, [source, "w", "b"], ["c"], **layer.attributes))
    nodes.append(helper.make_node("Relu", ["c"], ["y" if activations is None else "a"]))
    if activations is not None:
        quantize("a", "y", 8.0)
    graph = helper.make_graph(
        nodes,
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, layer.data)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)])
    model.ir_version = 8
    return onnx.shape_inference.infer_shapes(model)


def ours(model: onnx.ModelProto, *compress: tvm.transform.Pass) -> Runner:
    """Return the network as this package builds it for this machine, untuned, compressed by some passes."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "layer.onnx"
        onnx.save(model, path)
        mod = tvm.transform.Sequential([*pipeline.merge_phases(), *compress])(nnfuze_tvm.load([path]))
    return Runner(build.build(mod, resolve("host")), *signature(mod))


def onnx_runtime(model: onnx.ModelProto) -> Callable[[dict[str, np.ndarray]], list[np.ndarray]]:
    """Return the network as a session of one thread."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = settings.inter_op_num_threads = 1
    settings.log_severity_level = 3
    session = ort.InferenceSession(model.SerializeToString(), settings, providers=["CPUExecutionProvider"])
    return lambda feeds: session.run(None, feeds)


def measure(layer: Layer, precision: str, rounds: int) -> tuple[float, float, float]:
    """Return our median and ONNX Runtime's in seconds, and the largest difference as a part of the range."""
    models = [network(layer, np.dtype(kind)) if precision == "int8" else network(layer) for kind in ("int8", "uint8")]
    runner, session = ours(models[0]), onnx_runtime(models[1])
    feeds = {"x": np.random.default_rng(1).standard_normal(layer.data).astype("float32")}
    (mine,), (theirs,) = runner.run(feeds).values(), session(feeds)
    error = float(np.abs(np.asarray(mine) - theirs).max() / np.ptp(theirs))
    calls: dict[str, Callable[[], object]] = {"ours": lambda: runner.run(feeds), "theirs": lambda: session(feeds)}
    times = interleaved(calls, rounds=rounds, min_seconds=1.0)
    return times["ours"].median, times["theirs"].median, error


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.layers", description=__doc__)
    parser.add_argument("--families", type=names(FAMILIES), default=list(FAMILIES), help="which layers")
    parser.add_argument("--precisions", type=names(("fp32", "int8")), default=["fp32", "int8"], help="which precisions")
    parser.add_argument("--rounds", type=at_least(1), default=100, help="samples of each, at least")
    arguments = parser.parse_args()
    table = Table(title="one layer, one thread, median")
    for heading in ("layer", "data", "weights", "", "nnfuze", "ONNX Runtime", "ratio", "difference"):
        table.add_column(heading, justify="left" if heading in ("layer", "data", "weights", "") else "right")
    for layer in LAYERS:
        for precision in arguments.precisions:
            if layer.family not in arguments.families or (precision == "int8" and layer.family not in QUANTIZED):
                continue
            mine, theirs, error = measure(layer, precision, arguments.rounds)
            sizes = ("×".join(map(str, layer.data[1:])), "×".join(map(str, layer.weights)))
            figures = (f"{mine * 1e6:.0f} µs", f"{theirs * 1e6:.0f} µs", f"{theirs / mine:.2f}×", f"{error:.1e}")
            table.add_row(layer.family, *sizes, precision, *figures)
    output_console().print(table)


if __name__ == "__main__":
    main()
