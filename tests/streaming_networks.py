"""Networks that keep their state between calls, as exporters write them: a VAD and a denoiser in two parts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper


class _Graph:
    """Nodes and weights of a graph on its way."""

    def __init__(self, prefix: str, seed: int) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.weights: list[onnx.TensorProto] = []
        self._prefix = prefix
        self._rng = np.random.default_rng(seed)

    def add(self, operator: str, inputs: Sequence[str], outputs: int = 1, **attributes: object) -> str:
        """Add a node and return its first output; the others have ``.1``, ``.2`` behind that name."""
        first = f"{self._prefix}{operator.lower()}{len(self.nodes)}"
        names = [first, *(f"{first}.{n}" for n in range(1, outputs))]
        self.nodes.append(helper.make_node(operator, inputs, names, name=first, **attributes))
        return first

    def constant(self, value: object, dtype: str = "int64") -> str:
        name = f"{self._prefix}constant{len(self.weights)}"
        self.weights.append(numpy_helper.from_array(np.array(value, dtype), name))
        return name

    def weight(self, *shape: int, gain: float = 1.0) -> str:
        fan = max(int(np.prod(shape[1:])), 1)
        return self.constant(self._rng.standard_normal(shape) * gain / np.sqrt(fan), "float32")

    def convolution(
        self, data: str, channels: tuple[int, int], taps: int, gain: float = 1.5, **attributes: object
    ) -> str:
        fan_in, fan_out = channels
        given = [data, self.weight(fan_out, fan_in, taps, gain=gain), self.weight(fan_out, gain=0.1)]
        return self.add("Conv", given, kernel_shape=[taps], **attributes)

    def lstm(self, data: str, hidden: str, cell: str, inputs: int, units: int) -> str:
        """Add an LSTM of one direction on ``[steps, 1, inputs]``."""
        weights = [self.weight(1, 4 * units, inputs), self.weight(1, 4 * units, units), self.weight(1, 8 * units)]
        return self.add("LSTM", [data, *weights, "", hidden, cell], 3, hidden_size=units)

    def piece(self, data: str, start: int, axis: int) -> str:
        """Add what is at one index of an axis, without that axis."""
        bounds = [self.constant([value]) for value in (start, start + 1, axis)]
        return self.add("Squeeze", [self.add("Slice", [data, *bounds]), bounds[2]])


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)


def _value(name: str, *shape: int, kind: int = TensorProto.FLOAT) -> onnx.ValueInfoProto:
    return helper.make_tensor_value_info(name, kind, shape)


def _vad_branch(name: str, window: int, seed: int) -> onnx.GraphProto:
    """STFT as a convolution, an encoder, an LSTM of one step, a decoder."""
    graph = _Graph(f"{name}.", seed)
    padded = graph.add("Pad", ["audio", graph.constant([0, 0, 0, window // 4])], mode="reflect")
    channel = graph.add("Unsqueeze", [padded, graph.constant([1])])
    bins = window // 2 + 1
    stft = graph.add("Conv", [channel, graph.weight(2 * bins, 1, window)], strides=[window // 2])
    parts = [[graph.constant([n]) for n in bounds] for bounds in ((0, bins, 1), (bins, 2 * bins, 1))]
    squares = [graph.add("Pow", [graph.add("Slice", [stft, *part]), graph.constant(2.0, "float32")]) for part in parts]
    value = graph.add("Sqrt", [graph.add("Add", squares)])
    for channels, stride in (((bins, 128), 1), ((128, 64), 2), ((64, 64), 2), ((64, 128), 1)):
        value = graph.add("Relu", [graph.convolution(value, channels, 3, pads=[1, 1], strides=[stride])])
    last = graph.add("Gather", [value, graph.constant(-1)], axis=2)
    step = graph.add("Unsqueeze", [last, graph.constant([0])])
    first = graph.constant([0])
    hidden, cell = (graph.add("Unsqueeze", [graph.piece("state", n, 0), first]) for n in range(2))
    lstm = graph.lstm(step, hidden, cell, 128, 128)
    state = graph.add("Concat", [f"{lstm}.1", f"{lstm}.2"], axis=0)
    features = graph.add("Transpose", [f"{lstm}.1"], perm=[1, 2, 0])
    score = graph.convolution(graph.add("Relu", [features]), (128, 1), 1, gain=20.0)
    speech = graph.add("ReduceMean", [graph.add("Sigmoid", [score])], axes=[1], keepdims=0)
    outputs = [_value(speech, 1, 1), _value(state, 2, 1, 128)]
    return helper.make_graph(graph.nodes, name, [], outputs, graph.weights)


def voice_activity() -> onnx.ModelProto:
    """Return a VAD for two sample rates: audio ``[1, 512]``, state ``[2, 1, 128]`` in and out, the rate a number."""
    graph = _Graph("", 0)
    wide = graph.add("Equal", ["rate", graph.constant(16000)])
    branches = {"then_branch": _vad_branch("wide", 256, 1), "else_branch": _vad_branch("narrow", 128, 2)}
    graph.nodes.append(helper.make_node("If", [wide], ["speech", "next"], name="rates", **branches))
    inputs = [_value("audio", 1, 512), _value("state", 2, 1, 128), _value("rate", kind=TensorProto.INT64)]
    outputs = [_value("speech", 1, 1), _value("next", 2, 1, 128)]
    return _model(helper.make_graph(graph.nodes, "vad", inputs, outputs, graph.weights))


def _two_lstms(graph: _Graph, data: str, inputs: int, units: int = 128) -> tuple[str, str]:
    """Add two LSTMs of one step on ``[1, 1, inputs]``, their states in ``state`` ``[1, 2, units, 2]``."""
    states = []
    for layer in range(2):
        both = graph.piece("state", layer, 1)
        hidden, cell = (graph.add("Unsqueeze", [graph.piece(both, n, 2), graph.constant([0])]) for n in range(2))
        step = graph.lstm(data, hidden, cell, inputs if layer == 0 else units, units)
        data = graph.add("Squeeze", [step, graph.constant([1])])
        ends = [graph.add("Unsqueeze", [f"{step}.{n}", graph.constant([3])]) for n in (1, 2)]
        states.append(graph.add("Concat", ends, axis=3))
    return data, graph.add("Concat", states, axis=1)


def _denoiser(graph: _Graph, name: str, size: int, result: str, state: str) -> onnx.ModelProto:
    inputs = [_value("frame", 1, 1, size), _value("state", 1, 2, 128, 2)]
    outputs = [_value(result, 1, 1, size), _value(state, 1, 2, 128, 2)]
    return _model(helper.make_graph(graph.nodes, name, inputs, outputs, graph.weights))


def _dense(graph: _Graph, data: str, inputs: int, units: int, gain: float = 4.0) -> str:
    return graph.add("Add", [graph.add("MatMul", [data, graph.weight(inputs, units, gain=gain)]), graph.weight(units)])


def spectral_mask() -> onnx.ModelProto:
    """Return a denoiser's first part: magnitudes ``[1, 1, 257]`` to a mask, the LSTMs' state in and out."""
    graph = _Graph("", 3)
    value, state = _two_lstms(graph, "frame", 257)
    mask = graph.add("Sigmoid", [_dense(graph, value, 128, 257)])
    return _denoiser(graph, "mask", 257, mask, state)


def learned_mask() -> onnx.ModelProto:
    """Return a denoiser's second part: a frame ``[1, 1, 512]`` masked between a learned transform and its inverse."""
    graph = _Graph("", 4)
    columns = graph.add("Transpose", ["frame"], perm=[0, 2, 1])
    encoded = graph.add("Conv", [columns, graph.weight(256, 512, 1)], kernel_shape=[1])
    rows = graph.add("Transpose", [encoded], perm=[0, 2, 1])
    mean = graph.add("ReduceMean", [rows], axes=[-1], keepdims=1)
    centred = graph.add("Sub", [rows, mean])
    variance = graph.add("ReduceMean", [graph.add("Mul", [centred, centred])], axes=[-1], keepdims=1)
    deviation = graph.add("Sqrt", [graph.add("Add", [variance, graph.constant(1e-7, "float32")])])
    normal = graph.add("Div", [centred, deviation])
    scaled = graph.add("Add", [graph.add("Mul", [normal, graph.weight(256, gain=1.0)]), graph.weight(256)])
    value, state = _two_lstms(graph, scaled, 256)
    masked = graph.add("Mul", [graph.add("Sigmoid", [_dense(graph, value, 128, 256)]), rows])
    decoded = graph.add("Conv", [graph.add("Transpose", [masked], perm=[0, 2, 1]), graph.weight(512, 256, 1)])
    return _denoiser(graph, "learned", 512, graph.add("Transpose", [decoded], perm=[0, 2, 1]), state)


def _plain(
    graph: _Graph, name: str, inputs: Mapping[str, Sequence[int]], outputs: Mapping[str, Sequence[int]]
) -> onnx.ModelProto:
    ends = [_value(end, *shape) for end, shape in outputs.items()]
    return _model(helper.make_graph(graph.nodes, name, [_value(n, *s) for n, s in inputs.items()], ends, graph.weights))


def _renamed(graph: _Graph, value: str, name: str) -> None:
    graph.nodes.append(helper.make_node("Identity", [value], [name], name=f"{name}.end"))


def wake_words() -> dict[str, onnx.ModelProto]:
    """Return a spectrogram of 8 rows, an embedding of 76 rows, and two heads that read 16 embeddings."""
    mel = _Graph("", 5)
    value = mel.add("Relu", [mel.convolution("audio", (1, 32), 192, strides=[64])])
    _renamed(mel, mel.add("Transpose", [value], perm=[0, 2, 1]), "mel")
    embedding = _Graph("", 6)
    weights = embedding.constant(np.random.default_rng(6).standard_normal((24, 1, 8, 8)) / 6, "float32")
    value = embedding.add("Relu", [embedding.add("Conv", ["frames", weights], strides=[4, 4])])
    _renamed(embedding, embedding.add("GlobalAveragePool", [value]), "embedding")
    models = {
        "mel": _plain(mel, "mel", {"audio": (1, 1, 640)}, {"mel": (1, 8, 32)}),
        "embedding": _plain(embedding, "embedding", {"frames": (1, 1, 76, 32)}, {"embedding": (1, 24, 1, 1)}),
    }
    for seed, name in enumerate(("first", "second"), 7):
        head = _Graph("", seed)
        hidden = head.add("Tanh", [_dense(head, head.add("Flatten", ["features"]), 384, 32, 1.0)])
        _renamed(head, _dense(head, hidden, 32, 1, 1.0), "score")
        models[name] = _plain(head, name, {"features": (1, 16, 24)}, {"score": (1, 1)})
    return models


def denoiser() -> dict[str, onnx.ModelProto]:
    """Return a denoiser in four parts: a Fourier transform, a mask, the transform back, a learned mask."""
    angles = 2 * np.pi * np.outer(np.arange(512), np.arange(257)) / 512
    there = _Graph("", 9)
    for name, factors in (("real", np.cos(angles)), ("imaginary", -np.sin(angles))):
        _renamed(there, there.add("MatMul", ["frame", there.constant(factors, "float32")]), name)
    squares = [there.add("Mul", [name, name]) for name in ("real", "imaginary")]
    _renamed(there, there.add("Sqrt", [there.add("Add", squares)]), "magnitude")
    back = _Graph("", 10)
    weights = np.where(np.isin(np.arange(257), (0, 256)), 1, 2)[:, None] / 512
    parts = []
    for name, factors in (("real", np.cos(angles)), ("imaginary", -np.sin(angles))):
        masked = back.add("Mul", [name, "mask"])
        parts.append(back.add("MatMul", [masked, back.constant(weights * factors.T, "float32")]))
    _renamed(back, back.add("Add", parts), "frame")
    spectrum = dict.fromkeys(("real", "imaginary", "magnitude"), (1, 1, 257))
    given = dict.fromkeys(("mask", "real", "imaginary"), (1, 1, 257))
    return {
        "transform": _plain(there, "transform", {"frame": (1, 1, 512)}, spectrum),
        "mask": spectral_mask(),
        "inverse": _plain(back, "inverse", given, {"frame": (1, 1, 512)}),
        "learned": learned_mask(),
    }
