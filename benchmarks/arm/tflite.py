"""TensorFlow Lite files from ONNX files: convolutional networks and plain dense ones, without TensorFlow.

TensorFlow Lite has channels last, and pads convolutions by itself only where its rule of how much comes before and
after gives what the network wants; elsewhere an operator of its own pads, as every converter from ONNX has it.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper, shape_inference

from benchmarks.engines.base import Unavailable, quiet, require
from benchmarks.workloads import Workload, kept

_VERSION = 3
_INSTALL = "pip install ai-edge-quantizer"
_ACTIVATIONS = {"Relu": 1, "Clip": 3}  # ActivationFunctionType: RELU, RELU6


def model(work: Workload, precision: str) -> Path:
    """Return a network as a TensorFlow Lite file; in int8, quantized by Google's quantizer.

    Raises
    ------
    Unavailable
        If it holds an operator that is not converted here, or the quantizer is not installed.
    """
    for package in ("ai_edge_litert", "ai_edge_quantizer")[: 1 + (precision == "int8")]:
        require(package, _INSTALL)
    if len(work.calibration[0]) != 1:
        raise Unavailable("its converter here knows networks with one input only")
    path = kept(work.directory / "tflite-fp32", lambda folder: _save(work.models[0], folder)) / "model.tflite"
    if precision == "fp32":
        return path
    return kept(work.directory / "tflite-int8", lambda folder: _quantize(path, work, folder)) / "model.tflite"


def _save(source: Path, folder: Path) -> None:
    (folder / "model.tflite").write_bytes(network(source))


def network(source: Path) -> bytes:
    """Return the file of an ONNX file's network."""
    return _Writer(onnx.load(source)).file()


def _quantize(path: Path, work: Workload, folder: Path) -> None:
    from ai_edge_quantizer import quantizer, recipe

    with quiet():
        job = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        ((name, samples),) = work.calibration[0].items()
        ranges = job.calibrate({"serving_default": [{name: channels_last(row[None])} for row in samples]})
        job.quantize(ranges).export_model(str(folder / "model.tflite"))


def channels_last(array: np.ndarray) -> np.ndarray:
    """Return an image ``[N, C, H, W]`` as ``[N, H, W, C]``, anything else as it is."""
    return np.ascontiguousarray(array.transpose(0, 2, 3, 1)) if array.ndim == 4 else array


class _Writer:
    """Builds a TensorFlow Lite file, node by node."""

    def __init__(self, source: onnx.ModelProto) -> None:
        from ai_edge_litert import schema_py_generated as schema

        self.schema = schema
        graph = shape_inference.infer_shapes(source).graph
        self.weights = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
        values = [*graph.input, *graph.value_info, *graph.output]
        self.shapes = {v.name: [dim.dim_value for dim in v.type.tensor_type.shape.dim] for v in values}
        self.buffers: list[Any] = [schema.BufferT()]
        self.tensors: list[Any] = []
        self.operators: list[Any] = []
        self.codes: dict[int, Any] = {}
        self.numbers: dict[str, int] = {}
        self.inputs = [value.name for value in graph.input if value.name not in self.weights]
        self.outputs = [value.name for value in graph.output]
        for name in self.inputs:
            self.numbers[name] = self._tensor(name, self._shape(name))
        uses = [name for node in graph.node for name in node.input] + self.outputs
        self.fused = {
            node.input[0]: node
            for node in graph.node
            if node.op_type in _ACTIVATIONS and uses.count(node.input[0]) == 1
        }
        done: set[str] = set()
        for node in graph.node:
            if node.output[0] not in done:
                done.add(self._node(node))

    def file(self) -> bytes:
        """Return the file's contents."""
        import flatbuffers

        schema = self.schema
        graph = schema.SubGraphT()
        graph.tensors, graph.operators = self.tensors, self.operators
        graph.inputs, graph.outputs = ([self.numbers[n] for n in names] for names in (self.inputs, self.outputs))
        signature = schema.SignatureDefT()
        signature.signatureKey = "serving_default"
        signature.inputs, signature.outputs = (self._map(names) for names in (self.inputs, self.outputs))
        whole = schema.ModelT()
        whole.version = _VERSION
        whole.operatorCodes = list(self.codes.values())
        whole.subgraphs, whole.buffers, whole.signatureDefs = [graph], self.buffers, [signature]
        builder = flatbuffers.Builder(1 << 20)
        builder.Finish(whole.Pack(builder), b"TFL3")
        return bytes(builder.Output())

    def _node(self, node: onnx.NodeProto) -> str:
        """Append a node with the activation behind it; return the name of the result."""
        attributes = {a.name: onnx.helper.get_attribute_value(a) for a in node.attribute}
        follower = self.fused.get(node.output[0]) if node.op_type in ("Conv", "Add", "Gemm") else None
        result = follower.output[0] if follower else node.output[0]
        activation = _ACTIVATIONS[self._checked(follower).op_type] if follower else 0
        x = node.input[0]
        schema = self.schema
        builtin = schema.BuiltinOperator
        if node.op_type == "Conv":
            self._convolution(node, attributes, result, activation)
        elif node.op_type == "Add":
            options = schema.AddOptionsT()
            options.fusedActivationFunction = activation
            self._operator(builtin.ADD, [self.numbers[name] for name in node.input], result, options)
        elif node.op_type in _ACTIVATIONS:
            code = builtin.RELU if self._checked(node).op_type == "Relu" else builtin.RELU6
            self._operator(code, [self.numbers[x]], result)
        elif node.op_type == "MaxPool":
            options = schema.Pool2DOptionsT()
            padded, options.padding = self._pad(node, attributes, attributes["kernel_shape"])
            options.filterHeight, options.filterWidth = attributes["kernel_shape"]
            options.strideH, options.strideW = attributes["strides"]
            self._operator(builtin.MAX_POOL_2D, [padded], result, options)
        elif node.op_type == "GlobalAveragePool":
            options = schema.ReducerOptionsT()
            options.keepDims = True
            axes = self._constant(f"{result}.axes", np.array([1, 2], np.int32))
            self._operator(builtin.MEAN, [self.numbers[x], axes], result, options)
        elif node.op_type == "Flatten" and math.prod(self.shapes[x][2:]) == 1:
            options = schema.ReshapeOptionsT()
            options.newShape = self._shape(result)
            shape = self._constant(f"{result}.shape", np.array(options.newShape, np.int32))
            self._operator(builtin.RESHAPE, [self.numbers[x], shape], result, options)
        elif node.op_type == "Gemm" and attributes.get("transB") == 1:
            options = schema.FullyConnectedOptionsT()
            options.fusedActivationFunction = activation
            inputs = [self.numbers[x], *(self._constant(name, self.weights[name]) for name in node.input[1:])]
            self._operator(builtin.FULLY_CONNECTED, inputs, result, options)
        else:
            raise Unavailable(f"its converter here knows no {node.op_type} of this kind")
        return result

    def _convolution(self, node: onnx.NodeProto, attributes: dict[str, Any], result: str, activation: int) -> None:
        schema = self.schema
        weight = self.weights[node.input[1]]
        channels = self.shapes[node.input[0]][1]
        groups = attributes.get("group", 1)
        if groups not in (1, channels) or any(n != 1 for n in attributes.get("dilations", [])):
            raise Unavailable("its converter here knows no grouped or dilated convolutions")
        options: Any
        if groups == 1:
            code, options = schema.BuiltinOperator.CONV_2D, schema.Conv2DOptionsT()
            weight = weight.transpose(0, 2, 3, 1)
        else:
            code, options = schema.BuiltinOperator.DEPTHWISE_CONV_2D, schema.DepthwiseConv2DOptionsT()
            options.depthMultiplier = weight.shape[0] // channels
            weight = weight.transpose(1, 2, 3, 0)
        padded, options.padding = self._pad(node, attributes, weight.shape[1:3])
        options.strideH, options.strideW = attributes.get("strides", [1, 1])
        options.fusedActivationFunction = activation
        bias = self.weights[node.input[2]] if len(node.input) > 2 else np.zeros(self.shapes[result][1], np.float32)
        constants = [self._constant(f"{result}.weight", weight), self._constant(f"{result}.bias", bias)]
        self._operator(code, [padded, *constants], result, options)

    def _pad(self, node: onnx.NodeProto, attributes: dict[str, Any], kernel: Any) -> tuple[int, int]:
        """Return the padded input, and what TensorFlow Lite calls the padding that is left to do."""
        x = node.input[0]
        pads = attributes.get("pads", [0, 0, 0, 0])
        strides = attributes.get("strides", [1, 1])
        same = []
        for size, taps, step in zip(self.shapes[x][2:], kernel, strides, strict=True):
            total = max(0, (-(-size // step) - 1) * step + taps - size)
            same.append((total // 2, total - total // 2))
        wanted = [(pads[0], pads[2]), (pads[1], pads[3])]
        padding = self.schema.Padding
        if not any(pads):
            return self.numbers[x], padding.VALID
        if wanted == same:
            return self.numbers[x], padding.SAME
        if node.op_type == "MaxPool" and not any(o.outputs == [self.numbers[x]] for o in self._rectified()):
            raise Unavailable("its converter here pads what is pooled with zeros, which only suits a ReLU's result")
        name = f"{node.output[0]}.padded"
        _, height, width, channels = self._shape(x)
        self.shapes[name] = [1, channels, height + sum(wanted[0]), width + sum(wanted[1])]
        amounts = self._constant(f"{name}.by", np.array([(0, 0), *wanted, (0, 0)], np.int32))
        self._operator(self.schema.BuiltinOperator.PAD, [self.numbers[x], amounts], name, self.schema.PadOptionsT())
        return self.numbers[name], padding.VALID

    def _rectified(self) -> list[Any]:
        return [o for o in self.operators if getattr(o.builtinOptions, "fusedActivationFunction", 0)]

    def _checked(self, node: onnx.NodeProto) -> onnx.NodeProto:
        if node.op_type == "Clip" and [float(self.weights[name]) for name in node.input[1:]] != [0.0, 6.0]:
            raise Unavailable("its converter here knows no Clip but that to [0, 6]")
        return node

    def _operator(self, code: int, inputs: list[int], result: str, options: Any = None) -> None:
        schema = self.schema
        if code not in self.codes:
            self.codes[code] = schema.OperatorCodeT()
            self.codes[code].builtinCode = code
            self.codes[code].deprecatedBuiltinCode = code
            self.codes[code].version = 1
        operator = schema.OperatorT()
        operator.opcodeIndex = list(self.codes).index(code)
        operator.inputs = inputs
        self.numbers[result] = self._tensor(result, self._shape(result))
        operator.outputs = [self.numbers[result]]
        if options is not None:
            operator.builtinOptions = options
            operator.builtinOptionsType = getattr(schema.BuiltinOptions, type(options).__name__.removesuffix("T"))
        self.operators.append(operator)

    def _shape(self, name: str) -> list[int]:
        shape = self.shapes[name]
        return [shape[0], *shape[2:], shape[1]] if len(shape) == 4 else shape

    def _constant(self, name: str, array: np.ndarray) -> int:
        buffer = self.schema.BufferT()
        buffer.data = np.frombuffer(np.ascontiguousarray(array).tobytes(), np.uint8)
        self.buffers.append(buffer)
        return self._tensor(name, list(array.shape), len(self.buffers) - 1, array.dtype == np.int32)

    def _tensor(self, name: str, shape: list[int], buffer: int = 0, integer: bool = False) -> int:
        tensor = self.schema.TensorT()
        tensor.name, tensor.shape, tensor.buffer = name, shape, buffer
        tensor.type = self.schema.TensorType.INT32 if integer else self.schema.TensorType.FLOAT32
        self.tensors.append(tensor)
        return len(self.tensors) - 1

    def _map(self, names: list[str]) -> list[Any]:
        entries = []
        for name in names:
            entry = self.schema.TensorMapT()
            entry.name, entry.tensorIndex = name, self.numbers[name]
            entries.append(entry)
        return entries
