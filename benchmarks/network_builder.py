"""Appends layers with random, well conditioned weights to an ONNX graph: what the reference networks are built with."""

from __future__ import annotations

import math
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


@dataclass(frozen=True)
class Tensor:
    """A tensor: name, shape without the batch dimension, expected moments of each channel."""

    name: str
    shape: tuple[int, ...]
    mean: np.ndarray
    variance: np.ndarray


class Builder:
    """Appends named layers to a graph.

    The moments of every channel are carried along as if all values were normal and independent. Each layer
    uses them to scale its weights and to centre its output, as a BatchNormalization fitted to data would. The
    channels of a layer differ in strength, as those of trained networks do, so that pruning has something to
    choose and per-channel quantization something to gain.
    """

    def __init__(self, seed: int, batch_norm: bool, head_width: int | None, head_seed: int | None) -> None:
        self.seed = seed
        self.batch_norm = batch_norm
        self.head_width = head_width
        self.head_seed = seed if head_seed is None else head_seed
        self.nodes: list[onnx.NodeProto] = []
        self.weights: dict[str, onnx.TensorProto] = {}
        self.inputs: list[Tensor] = []
        self.outputs: list[Tensor] = []

    def start(self, name: str, *shape: int, channel_axis: int = 0) -> Tensor:
        """Declare an input of ``shape`` (without the batch dimension), of zero mean and unit variance."""
        channels = shape[channel_axis]
        x = Tensor(name, shape, np.zeros(channels), np.ones(channels))
        self.inputs.append(x)
        return x

    def constant(self, name: str, value: np.ndarray) -> str:
        self.weights[name] = numpy_helper.from_array(value.astype(np.float32), name)
        return name

    def integers(self, name: str, values: list[int]) -> str:
        self.weights[name] = numpy_helper.from_array(np.array(values, "int64"), name)
        return name

    def node(
        self,
        op: str,
        name: str,
        inputs: list[str],
        shape: tuple[int, ...],
        mean: np.ndarray,
        variance: np.ndarray,
        **attrs: Any,
    ) -> Tensor:
        """Append a node whose only output has the node's name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        return Tensor(name, shape, mean, variance)

    def layer(
        self,
        op: str,
        name: str,
        x: Tensor,
        weight_shape: tuple[int, ...],
        shape: tuple[int, ...],
        groups: int = 1,
        reached: float = 1.0,
        **attrs: Any,
    ) -> Tensor:
        """Append a convolution or dense layer with its bias, or with a BatchNormalization behind it.

        ``reached`` is the share of the taps that meet data and not padding.
        """
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        weight, strength = _draw(rng, x, weight_shape, groups, reached)
        mean = reached * _through(weight, x.mean, groups)
        shift = 0.1 * rng.standard_normal(len(strength))
        inputs = [x.name, self.constant(f"{name}.weight", weight)]
        if not self.batch_norm:
            inputs.append(self.constant(f"{name}.bias", shift - mean))
            return self.node(op, name, inputs, shape, shift, strength**2, **attrs)
        y = self.node(op, name, inputs, shape, mean, strength**2, **attrs)
        norm = f"{name}.norm"
        scale = _strengths(rng, len(strength))
        statistics = {
            "scale": scale,
            "shift": shift,
            "mean": mean + 0.1 * strength * rng.standard_normal(len(strength)),
            "var": strength**2 * rng.uniform(0.8, 1.25, len(strength)),
        }
        names = [self.constant(f"{norm}.{key}", value) for key, value in statistics.items()]
        return self.node("BatchNormalization", norm, [y.name, *names], shape, shift, scale**2, epsilon=1e-5)

    def conv(
        self,
        name: str,
        x: Tensor,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        groups: int = 1,
        pads: tuple[int, int, int, int] | None = None,
    ) -> Tensor:
        """Append a convolution; ``pads`` (top, left, bottom, right) is half the kernel unless given."""
        kh, kw = (kernel, kernel) if isinstance(kernel, int) else kernel
        pads = pads or (kh // 2, kw // 2, kh // 2, kw // 2)
        in_channels, height, width = x.shape
        rows, reached_rows = _slide(height, kh, stride, pads[0], pads[2])
        columns, reached_columns = _slide(width, kw, stride, pads[1], pads[3])
        return self.layer(
            "Conv",
            name,
            x,
            (channels, in_channels // groups, kh, kw),
            (channels, rows, columns),
            groups,
            reached_rows * reached_columns,
            kernel_shape=[kh, kw],
            strides=[stride, stride],
            pads=list(pads),
            group=groups,
        )

    def dense(self, name: str, x: Tensor, width: int) -> Tensor:
        """Append a hidden dense layer."""
        return self.layer("Gemm", name, x, (width, *x.shape), (width,), transB=1)

    def project(self, name: str, x: Tensor, width: int) -> Tensor:
        """Append a dense layer on the last axis of a sequence: a MatMul and an Add, as torch exports it."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        weight, strength = _draw(rng, x, (width, len(x.mean)))
        shift = 0.1 * rng.standard_normal(width)
        shape = (x.shape[0], width)
        factor = self.constant(f"{name}.weight", np.ascontiguousarray(weight.T))
        y = self.node("MatMul", name, [x.name, factor], shape, _through(weight, x.mean), strength**2)
        bias = self.constant(f"{name}.bias", shift - y.mean)
        return self.node("Add", f"{name}.add", [y.name, bias], shape, shift, strength**2)

    def layer_norm(self, name: str, x: Tensor) -> Tensor:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        scale, shift = _strengths(rng, x.shape[-1]), 0.1 * rng.standard_normal(x.shape[-1])
        inputs = [x.name, self.constant(f"{name}.scale", scale), self.constant(f"{name}.shift", shift)]
        return self.node("LayerNormalization", name, inputs, x.shape, shift, scale**2, axis=-1, epsilon=1e-5)

    def gelu(self, name: str, x: Tensor) -> Tensor:
        """Append x · (1 + erf(x / √2)) / 2, in the five nodes that stand for it below opset 20."""
        moments = _rectify(x)

        def step(op: str, suffix: str, *inputs: str) -> str:
            return self.node(op, f"{name}.{suffix}", list(inputs), x.shape, *moments).name

        root, one, half = (
            self.constant(key, np.array(value)) for key, value in (("root2", math.sqrt(2)), ("one", 1), ("half", 0.5))
        )
        error = step("Erf", "erf", step("Div", "div", x.name, root))
        gated = step("Mul", "mul", x.name, step("Add", "add", error, one))
        return self.node("Mul", name, [gated, half], x.shape, *moments)

    def attention(self, name: str, x: Tensor, heads: int) -> Tensor:
        """Append softmax(Q·Kᵀ / √depth)·V per head.

        Its moments are left those of V, though a mean varies less: amplified, what is common to all positions
        would grow from layer to layer until they were all alike.
        """
        length, width = x.shape
        depth = width // heads
        q, k, v = (self.project(f"{name}.{part}", x, width) for part in ("query", "key", "value"))

        def split(y: Tensor, perm: list[int]) -> str:
            sizes = self.integers("head_shape", [0, 0, heads, depth])
            y = self.node("Reshape", f"{y.name}.split", [y.name, sizes], (length, heads, depth), y.mean, y.variance)
            return self.node("Transpose", f"{y.name}.transpose", [y.name], (), y.mean, y.variance, perm=perm).name

        def step(op: str, suffix: str, *inputs: str, **attrs: Any) -> str:
            return self.node(op, f"{name}.{suffix}", list(inputs), (), v.mean, v.variance, **attrs).name

        scores = step("MatMul", "scores", split(q, [0, 2, 1, 3]), split(k, [0, 2, 3, 1]))
        scaled = step("Div", "scaled", scores, self.constant("root_depth", np.array(math.sqrt(depth))))
        mixed = step("MatMul", "mix", step("Softmax", "softmax", scaled, axis=-1), split(v, [0, 2, 1, 3]))
        merged = step("Transpose", "merge", mixed, perm=[0, 2, 1, 3])
        sizes = self.integers("sequence_shape", [0, 0, width])
        y = self.node("Reshape", f"{name}.flat", [merged, sizes], x.shape, v.mean, v.variance)
        return self.project(f"{name}.output", y, width)

    def head(self, x: Tensor, width: int, output: str) -> None:
        """Append the last dense layer: never normalized, and the one that `shared_trunk_pair` varies."""
        width = self.head_width or width
        rng = np.random.default_rng([self.head_seed, zlib.crc32(b"head")])
        weight, strength = _draw(rng, x, (width, *x.shape))
        bias = 0.1 * rng.standard_normal(width) - _through(weight, x.mean)
        inputs = [x.name, self.constant("head.weight", weight), self.constant("head.bias", bias)]
        self.nodes.append(helper.make_node("Gemm", inputs, [output], name="head", transB=1))
        self.outputs.append(Tensor(output, (width,), bias, strength**2))

    def relu(self, name: str, x: Tensor) -> Tensor:
        return self.node("Relu", name, [x.name], x.shape, *_rectify(x))

    def relu6(self, name: str, x: Tensor) -> Tensor:
        bounds = [self.constant("zero", np.array(0)), self.constant("six", np.array(6))]
        return self.node("Clip", name, [x.name, *bounds], x.shape, *_rectify(x))

    def add(self, name: str, x: Tensor, y: Tensor) -> Tensor:
        return self.node("Add", name, [x.name, y.name], x.shape, x.mean + y.mean, x.variance + y.variance)

    def max_pool(self, name: str, x: Tensor) -> Tensor:
        """3×3 with stride 2; the moments are left alone, the next layer's padding and pooling err more."""
        channels, height, width = x.shape
        shape = (channels, (height + 1) // 2, (width + 1) // 2)
        attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        return self.node("MaxPool", name, [x.name], shape, x.mean, x.variance, **attrs)

    def pool_and_flatten(self, x: Tensor) -> Tensor:
        """Average over the whole image, whose pixels are far from independent."""
        channels, height, width = x.shape
        variance = x.variance / math.sqrt(height * width)
        x = self.node("GlobalAveragePool", "pool", [x.name], (channels, 1, 1), x.mean, variance)
        return self.node("Flatten", "flatten", [x.name], (channels,), x.mean, variance)

    def model(self, name: str) -> onnx.ModelProto:
        inputs, outputs = (
            [helper.make_tensor_value_info(t.name, TensorProto.FLOAT, ["N", *t.shape]) for t in tensors]
            for tensors in (self.inputs, self.outputs)
        )
        graph = helper.make_graph(self.nodes, name, inputs, outputs, list(self.weights.values()))
        opset = helper.make_opsetid("", OPSET)
        return helper.make_model(
            graph, opset_imports=[opset], ir_version=IR_VERSION, producer_name="benchmarks.networks"
        )


def _draw(
    rng: np.random.Generator, x: Tensor, shape: tuple[int, ...], groups: int = 1, reached: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """Draw a weight that turns ``x`` into channels of the returned standard deviations."""
    weight = rng.standard_normal(shape)
    # The moments are estimates: a filter of zero mean is not swamped by an error in the mean of its input.
    weight -= weight.mean(axis=tuple(range(1, len(shape))), keepdims=True)
    strength = _strengths(rng, shape[0])
    deviation = np.sqrt(reached * _through(weight**2, x.variance, groups))
    return weight * (strength / deviation).reshape(-1, *(1 for _ in shape[1:])), strength


def _through(weight: np.ndarray, moments: np.ndarray, groups: int = 1) -> np.ndarray:
    """Return the weighted sum of the input channels' moments for each output channel."""
    taps = weight.reshape(*weight.shape[:2], -1).sum(axis=2).reshape(groups, -1, weight.shape[1])
    return np.einsum("goi,gi->go", taps, moments.reshape(groups, -1)).reshape(-1)


def _strengths(rng: np.random.Generator, channels: int) -> np.ndarray:
    """Draw one positive factor per channel, with a mean square of about 1."""
    return rng.uniform(0.4, 1.6, channels) / math.sqrt(1.12)


def _rectify(x: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return mean and variance of max(x, 0) for a normal x."""
    deviation = np.sqrt(x.variance)
    ratio = x.mean / deviation
    density = np.exp(-(ratio**2) / 2) / math.sqrt(2 * math.pi)
    positive = np.array([0.5 * math.erfc(-r / math.sqrt(2)) for r in ratio])
    mean = x.mean * positive + deviation * density
    square = (x.mean**2 + x.variance) * positive + x.mean * deviation * density
    return mean, square - mean**2


def _slide(size: int, kernel: int, stride: int, before: int, after: int) -> tuple[int, float]:
    """Return how many positions a window takes and the mean share of it that lies on data."""
    starts = range(-before, size + after - kernel + 1, stride)
    covered = sum(min(start + kernel, size) - max(start, 0) for start in starts)
    return len(starts), covered / (kernel * len(starts))
