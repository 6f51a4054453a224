"""Common small and mid-sized networks as ONNX models with random, well conditioned weights.

Nothing is trained or downloaded: tests and benchmarks need the shapes, not the knowledge. Weights are drawn
per layer from the seed and the layer's name.

    python -m benchmarks.networks resnet18 -o resnet18.onnx --seed 0
"""

from __future__ import annotations

import argparse
import math
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

OPSET = 17
IR_VERSION = 8


@dataclass(frozen=True)
class _Tensor:
    """A tensor: name, shape without the batch dimension, expected moments of each channel."""

    name: str
    shape: tuple[int, ...]
    mean: np.ndarray
    variance: np.ndarray


class _Builder:
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
        self.inputs: list[_Tensor] = []
        self.outputs: list[_Tensor] = []

    def start(self, name: str, *shape: int, channel_axis: int = 0) -> _Tensor:
        """Declare an input of ``shape`` (without the batch dimension), of zero mean and unit variance."""
        channels = shape[channel_axis]
        x = _Tensor(name, shape, np.zeros(channels), np.ones(channels))
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
    ) -> _Tensor:
        """Append a node whose only output has the node's name."""
        self.nodes.append(helper.make_node(op, inputs, [name], name=name, **attrs))
        return _Tensor(name, shape, mean, variance)

    def layer(
        self,
        op: str,
        name: str,
        x: _Tensor,
        weight_shape: tuple[int, ...],
        shape: tuple[int, ...],
        groups: int = 1,
        reached: float = 1.0,
        **attrs: Any,
    ) -> _Tensor:
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
        x: _Tensor,
        channels: int,
        kernel: int | tuple[int, int],
        stride: int = 1,
        groups: int = 1,
        pads: tuple[int, int, int, int] | None = None,
    ) -> _Tensor:
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

    def dense(self, name: str, x: _Tensor, width: int) -> _Tensor:
        """Append a hidden dense layer."""
        return self.layer("Gemm", name, x, (width, *x.shape), (width,), transB=1)

    def project(self, name: str, x: _Tensor, width: int) -> _Tensor:
        """Append a dense layer on the last axis of a sequence: a MatMul and an Add, as torch exports it."""
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        weight, strength = _draw(rng, x, (width, len(x.mean)))
        shift = 0.1 * rng.standard_normal(width)
        shape = (x.shape[0], width)
        factor = self.constant(f"{name}.weight", np.ascontiguousarray(weight.T))
        y = self.node("MatMul", name, [x.name, factor], shape, _through(weight, x.mean), strength**2)
        bias = self.constant(f"{name}.bias", shift - y.mean)
        return self.node("Add", f"{name}.add", [y.name, bias], shape, shift, strength**2)

    def layer_norm(self, name: str, x: _Tensor) -> _Tensor:
        rng = np.random.default_rng([self.seed, zlib.crc32(name.encode())])
        scale, shift = _strengths(rng, x.shape[-1]), 0.1 * rng.standard_normal(x.shape[-1])
        inputs = [x.name, self.constant(f"{name}.scale", scale), self.constant(f"{name}.shift", shift)]
        return self.node("LayerNormalization", name, inputs, x.shape, shift, scale**2, axis=-1, epsilon=1e-5)

    def gelu(self, name: str, x: _Tensor) -> _Tensor:
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

    def attention(self, name: str, x: _Tensor, heads: int) -> _Tensor:
        """Append softmax(Q·Kᵀ / √depth)·V per head.

        Its moments are left those of V, though a mean varies less: amplified, what is common to all positions
        would grow from layer to layer until they were all alike.
        """
        length, width = x.shape
        depth = width // heads
        q, k, v = (self.project(f"{name}.{part}", x, width) for part in ("query", "key", "value"))

        def split(y: _Tensor, perm: list[int]) -> str:
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

    def head(self, x: _Tensor, width: int, output: str) -> None:
        """Append the last dense layer: never normalized, and the one that `shared_trunk_pair` varies."""
        width = self.head_width or width
        rng = np.random.default_rng([self.head_seed, zlib.crc32(b"head")])
        weight, strength = _draw(rng, x, (width, *x.shape))
        bias = 0.1 * rng.standard_normal(width) - _through(weight, x.mean)
        inputs = [x.name, self.constant("head.weight", weight), self.constant("head.bias", bias)]
        self.nodes.append(helper.make_node("Gemm", inputs, [output], name="head", transB=1))
        self.outputs.append(_Tensor(output, (width,), bias, strength**2))

    def relu(self, name: str, x: _Tensor) -> _Tensor:
        return self.node("Relu", name, [x.name], x.shape, *_rectify(x))

    def relu6(self, name: str, x: _Tensor) -> _Tensor:
        bounds = [self.constant("zero", np.array(0)), self.constant("six", np.array(6))]
        return self.node("Clip", name, [x.name, *bounds], x.shape, *_rectify(x))

    def add(self, name: str, x: _Tensor, y: _Tensor) -> _Tensor:
        return self.node("Add", name, [x.name, y.name], x.shape, x.mean + y.mean, x.variance + y.variance)

    def max_pool(self, name: str, x: _Tensor) -> _Tensor:
        """3×3 with stride 2; the moments are left alone, the next layer's padding and pooling err more."""
        channels, height, width = x.shape
        shape = (channels, (height + 1) // 2, (width + 1) // 2)
        attrs = {"kernel_shape": [3, 3], "strides": [2, 2], "pads": [1, 1, 1, 1]}
        return self.node("MaxPool", name, [x.name], shape, x.mean, x.variance, **attrs)

    def pool_and_flatten(self, x: _Tensor) -> _Tensor:
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
    rng: np.random.Generator, x: _Tensor, shape: tuple[int, ...], groups: int = 1, reached: float = 1.0
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


def _rectify(x: _Tensor) -> tuple[np.ndarray, np.ndarray]:
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


def _ds_cnn(b: _Builder) -> None:
    x = b.start("audio", 1, 49, 10)
    x = b.relu("stem.relu", b.conv("stem", x, 64, (10, 4), stride=2, pads=(4, 1, 5, 1)))
    for i in range(1, 5):
        x = _separable(b, f"block{i}", x, 64, 1)
    b.head(b.pool_and_flatten(x), 12, "logits")


def _separable(b: _Builder, name: str, x: _Tensor, channels: int, stride: int) -> _Tensor:
    inputs = x.shape[0]
    x = b.conv(f"{name}.depthwise", x, inputs, 3, stride, groups=inputs)
    x = b.relu(f"{name}.relu1", x)
    x = b.conv(f"{name}.pointwise", x, channels, 1)
    return b.relu(f"{name}.relu2", x)


def _shortcut(b: _Builder, name: str, x: _Tensor, channels: int, stride: int) -> _Tensor:
    if stride == 1 and x.shape[0] == channels:
        return x
    return b.conv(f"{name}.shortcut", x, channels, 1, stride)


def _basic_block(b: _Builder, name: str, x: _Tensor, channels: int, stride: int) -> _Tensor:
    y = b.relu(f"{name}.relu1", b.conv(f"{name}.conv1", x, channels, 3, stride))
    y = b.conv(f"{name}.conv2", y, channels, 3)
    y = b.add(f"{name}.add", y, _shortcut(b, name, x, channels, stride))
    return b.relu(f"{name}.relu2", y)


def _bottleneck(b: _Builder, name: str, x: _Tensor, channels: int, stride: int) -> _Tensor:
    y = b.relu(f"{name}.relu1", b.conv(f"{name}.conv1", x, channels, 1))
    y = b.relu(f"{name}.relu2", b.conv(f"{name}.conv2", y, channels, 3, stride))
    y = b.conv(f"{name}.conv3", y, 4 * channels, 1)
    y = b.add(f"{name}.add", y, _shortcut(b, name, x, 4 * channels, stride))
    return b.relu(f"{name}.relu3", y)


Block = Callable[[_Builder, str, _Tensor, int, int], _Tensor]


def _residual_stages(b: _Builder, x: _Tensor, block: Block, stages: list[tuple[int, int, int]]) -> _Tensor:
    """Append stages of (channels, blocks, stride of the first block)."""
    for i, (channels, blocks, stride) in enumerate(stages, 1):
        for j in range(1, blocks + 1):
            x = block(b, f"stage{i}.block{j}", x, channels, stride if j == 1 else 1)
    return x


def _resnet8(b: _Builder) -> None:
    x = b.start("image", 3, 32, 32)
    x = b.relu("stem.relu", b.conv("stem", x, 16, 3))
    x = _residual_stages(b, x, _basic_block, [(16, 1, 1), (32, 1, 2), (64, 1, 2)])
    b.head(b.pool_and_flatten(x), 10, "logits")


def _resnet18(b: _Builder) -> None:
    x = b.start("image", 3, 32, 32)
    x = b.relu("stem.relu", b.conv("stem", x, 64, 3))
    x = _residual_stages(b, x, _basic_block, [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)])
    b.head(b.pool_and_flatten(x), 10, "logits")


def _resnet50(b: _Builder) -> None:
    x = b.start("image", 3, 224, 224)
    x = b.relu("stem.relu", b.conv("stem", x, 64, 7, stride=2))
    x = b.max_pool("stem.pool", x)
    x = _residual_stages(b, x, _bottleneck, [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)])
    b.head(b.pool_and_flatten(x), 1000, "logits")


def _mobilenet_v1(b: _Builder, size: int, width: float, classes: int) -> None:
    x = b.start("image", 3, size, size)
    x = b.relu("stem.relu", b.conv("stem", x, int(32 * width), 3, stride=2))
    blocks = [
        (64, 1),
        (128, 2),
        (128, 1),
        (256, 2),
        (256, 1),
        (512, 2),
        *[(512, 1)] * 5,
        (1024, 2),
        (1024, 1),
    ]
    for i, (channels, stride) in enumerate(blocks, 1):
        x = _separable(b, f"block{i}", x, int(channels * width), stride)
    b.head(b.pool_and_flatten(x), classes, "logits")


def _mobilenet_v1_025(b: _Builder) -> None:
    _mobilenet_v1(b, size=96, width=0.25, classes=2)


def _mobilenet_v1_100(b: _Builder) -> None:
    _mobilenet_v1(b, size=224, width=1.0, classes=1000)


def _inverted_residual(b: _Builder, name: str, x: _Tensor, channels: int, stride: int, expand: int) -> _Tensor:
    inputs = x.shape[0]
    y = x
    if expand != 1:
        y = b.relu6(f"{name}.expand.relu6", b.conv(f"{name}.expand", y, inputs * expand, 1))
    y = b.conv(f"{name}.depthwise", y, inputs * expand, 3, stride, groups=inputs * expand)
    y = b.relu6(f"{name}.depthwise.relu6", y)
    y = b.conv(f"{name}.project", y, channels, 1)
    return b.add(f"{name}.add", y, x) if stride == 1 and inputs == channels else y


def _mobilenet_v2(b: _Builder) -> None:
    x = b.start("image", 3, 224, 224)
    x = b.relu6("stem.relu6", b.conv("stem", x, 32, 3, stride=2))
    # Expansion, channels, blocks, stride of the first block.
    stages = [
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ]
    for i, (expand, channels, blocks, first) in enumerate(stages, 1):
        for j in range(1, blocks + 1):
            stride = first if j == 1 else 1
            x = _inverted_residual(b, f"stage{i}.block{j}", x, channels, stride, expand)
    x = b.relu6("last.relu6", b.conv("last", x, 1280, 1))
    b.head(b.pool_and_flatten(x), 1000, "logits")


def _mlp_autoencoder(b: _Builder) -> None:
    x = b.start("features", 640)
    for i, width in enumerate([128, 128, 128, 128, 8, 128, 128, 128, 128], 1):
        x = b.relu(f"dense{i}.relu", b.dense(f"dense{i}", x, width))
    b.head(x, 640, "reconstruction")


def _transformer(b: _Builder) -> None:
    """A small encoder with its layer norms behind the residuals, and a classifier on the mean of the sequence."""
    x = b.start("embeddings", 64, 128, channel_axis=1)
    for i in range(1, 5):
        y = b.attention(f"layer{i}.attention", x, heads=4)
        x = b.layer_norm(f"layer{i}.norm1", b.add(f"layer{i}.add1", x, y))
        y = b.gelu(f"layer{i}.gelu", b.project(f"layer{i}.expand", x, 512))
        y = b.project(f"layer{i}.contract", y, 128)
        x = b.layer_norm(f"layer{i}.norm2", b.add(f"layer{i}.add2", x, y))
    # Attention makes the positions of a sequence alike in part.
    variance = x.variance / math.sqrt(x.shape[0])
    x = b.node("ReduceMean", "pool", [x.name], x.shape[1:], x.mean, variance, axes=[1], keepdims=0)
    b.head(x, 10, "logits")


_BUILDERS: dict[str, Callable[[_Builder], None]] = {
    "ds_cnn": _ds_cnn,
    "resnet8": _resnet8,
    "mobilenet_v1_025": _mobilenet_v1_025,
    "mlp_autoencoder": _mlp_autoencoder,
    "resnet18": _resnet18,
    "resnet50": _resnet50,
    "mobilenet_v1": _mobilenet_v1_100,
    "mobilenet_v2": _mobilenet_v2,
    "transformer": _transformer,
}
NAMES = tuple(_BUILDERS)


def _build(
    name: str,
    seed: int,
    batch_norm: bool,
    head_width: int | None = None,
    head_seed: int | None = None,
) -> onnx.ModelProto:
    if name not in _BUILDERS:
        raise ValueError(f"no network {name!r}; there are {', '.join(NAMES)}")
    builder = _Builder(seed, batch_norm, head_width, head_seed)
    _BUILDERS[name](builder)
    return builder.model(name)


def build(name: str, seed: int = 0, batch_norm: bool = False) -> onnx.ModelProto:
    """Build a network with random weights.

    Parameters
    ----------
    name
        One of `NAMES`. The first four are those of MLPerf Tiny, the next four have the size of everyday work; the
        last is a small transformer encoder.
    seed
        Every weight depends on it and on the layer's name only.
    batch_norm
        Put a BatchNormalization with its own statistics behind each layer but the head, instead of a bias; the
        transformer has layer norms in any case.

    Returns
    -------
    onnx.ModelProto
        One float32 input with dynamic batch dimension: `audio` [N, 1, 49, 10], `image` [N, 3, H, W],
        `features` [N, 640] or `embeddings` [N, 64, 128]; one output: `logits` [N, classes] (no softmax) or
        `reconstruction` [N, 640].
        Inputs of zero mean and unit variance give outputs with a standard deviation of the order of 1.

    Raises
    ------
    ValueError
        If there is no network of that name.
    """
    return _build(name, seed, batch_norm)


def shared_trunk_pair(
    name: str, seed: int = 0, heads: tuple[int, int] = (10, 7)
) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Build two networks with bit-equal trunks and different last dense layers, of ``heads`` outputs each."""
    first, second = (
        _build(name, seed, False, head_width=width, head_seed=seed + 1 + i) for i, width in enumerate(heads)
    )
    return first, second


def inputs(model: onnx.ModelProto, count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw ``count`` inputs for a model: standard normal for vectors, patches and noise for images.

    Returns
    -------
    dict
        Input name to float32 array [count, ...] of about zero mean and unit variance.
    """
    rng = np.random.default_rng(seed)
    feed = {}
    for value in model.graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim[1:]]
        x = rng.standard_normal((count, *shape))
        if len(shape) == 3:
            channels, height, width = shape
            patch = max(2, min(height, width) // 8)
            coarse = rng.standard_normal((count, channels, height // patch + 1, width // patch + 1))
            coarse = coarse.repeat(patch, axis=2).repeat(patch, axis=3)[:, :, :height, :width]
            x = math.sqrt(0.5) * (x + coarse)
        feed[value.name] = x.astype(np.float32)
    return feed


def main() -> None:
    """Write one network to a file."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("name", choices=NAMES)
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--batch-norm", action="store_true")
    args = parser.parse_args()
    onnx.save(build(args.name, args.seed, args.batch_norm), args.output)


if __name__ == "__main__":
    main()
