"""Common small and mid-sized networks as ONNX models with random, well conditioned weights.

Nothing is trained or downloaded: tests and benchmarks need the shapes, not the knowledge. Weights are drawn
per layer from the seed and the layer's name.

    python -m benchmarks.networks resnet18 -o resnet18.onnx --seed 0
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx

from benchmarks.network_builder import Builder, Tensor


def _ds_cnn(b: Builder) -> None:
    x = b.start("audio", 1, 49, 10)
    x = b.relu("stem.relu", b.conv("stem", x, 64, (10, 4), stride=2, pads=(4, 1, 5, 1)))
    for i in range(1, 5):
        x = _separable(b, f"block{i}", x, 64, 1)
    b.head(b.pool_and_flatten(x), 12, "logits")


def _separable(b: Builder, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    inputs = x.shape[0]
    x = b.conv(f"{name}.depthwise", x, inputs, 3, stride, groups=inputs)
    x = b.relu(f"{name}.relu1", x)
    x = b.conv(f"{name}.pointwise", x, channels, 1)
    return b.relu(f"{name}.relu2", x)


def _shortcut(b: Builder, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    if stride == 1 and x.shape[0] == channels:
        return x
    return b.conv(f"{name}.shortcut", x, channels, 1, stride)


def _basic_block(b: Builder, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    y = b.relu(f"{name}.relu1", b.conv(f"{name}.conv1", x, channels, 3, stride))
    y = b.conv(f"{name}.conv2", y, channels, 3)
    y = b.add(f"{name}.add", y, _shortcut(b, name, x, channels, stride))
    return b.relu(f"{name}.relu2", y)


def _bottleneck(b: Builder, name: str, x: Tensor, channels: int, stride: int) -> Tensor:
    y = b.relu(f"{name}.relu1", b.conv(f"{name}.conv1", x, channels, 1))
    y = b.relu(f"{name}.relu2", b.conv(f"{name}.conv2", y, channels, 3, stride))
    y = b.conv(f"{name}.conv3", y, 4 * channels, 1)
    y = b.add(f"{name}.add", y, _shortcut(b, name, x, 4 * channels, stride))
    return b.relu(f"{name}.relu3", y)


Block = Callable[[Builder, str, Tensor, int, int], Tensor]


def _residual_stages(b: Builder, x: Tensor, block: Block, stages: list[tuple[int, int, int]]) -> Tensor:
    """Append stages of (channels, blocks, stride of the first block)."""
    for i, (channels, blocks, stride) in enumerate(stages, 1):
        for j in range(1, blocks + 1):
            x = block(b, f"stage{i}.block{j}", x, channels, stride if j == 1 else 1)
    return x


def _resnet8(b: Builder) -> None:
    x = b.start("image", 3, 32, 32)
    x = b.relu("stem.relu", b.conv("stem", x, 16, 3))
    x = _residual_stages(b, x, _basic_block, [(16, 1, 1), (32, 1, 2), (64, 1, 2)])
    b.head(b.pool_and_flatten(x), 10, "logits")


def _resnet18(b: Builder) -> None:
    x = b.start("image", 3, 32, 32)
    x = b.relu("stem.relu", b.conv("stem", x, 64, 3))
    x = _residual_stages(b, x, _basic_block, [(64, 2, 1), (128, 2, 2), (256, 2, 2), (512, 2, 2)])
    b.head(b.pool_and_flatten(x), 10, "logits")


def _resnet50(b: Builder) -> None:
    x = b.start("image", 3, 224, 224)
    x = b.relu("stem.relu", b.conv("stem", x, 64, 7, stride=2))
    x = b.max_pool("stem.pool", x)
    x = _residual_stages(b, x, _bottleneck, [(64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)])
    b.head(b.pool_and_flatten(x), 1000, "logits")


def _mobilenet_v1(b: Builder, size: int, width: float, classes: int) -> None:
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


def _mobilenet_v1_025(b: Builder) -> None:
    _mobilenet_v1(b, size=96, width=0.25, classes=2)


def _mobilenet_v1_100(b: Builder) -> None:
    _mobilenet_v1(b, size=224, width=1.0, classes=1000)


def _inverted_residual(b: Builder, name: str, x: Tensor, channels: int, stride: int, expand: int) -> Tensor:
    inputs = x.shape[0]
    y = x
    if expand != 1:
        y = b.relu6(f"{name}.expand.relu6", b.conv(f"{name}.expand", y, inputs * expand, 1))
    y = b.conv(f"{name}.depthwise", y, inputs * expand, 3, stride, groups=inputs * expand)
    y = b.relu6(f"{name}.depthwise.relu6", y)
    y = b.conv(f"{name}.project", y, channels, 1)
    return b.add(f"{name}.add", y, x) if stride == 1 and inputs == channels else y


def _mobilenet_v2(b: Builder) -> None:
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


def _mlp_autoencoder(b: Builder) -> None:
    x = b.start("features", 640)
    for i, width in enumerate([128, 128, 128, 128, 8, 128, 128, 128, 128], 1):
        x = b.relu(f"dense{i}.relu", b.dense(f"dense{i}", x, width))
    b.head(x, 640, "reconstruction")


def _transformer(b: Builder) -> None:
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


_BUILDERS: dict[str, Callable[[Builder], None]] = {
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
    builder = Builder(seed, batch_norm, head_width, head_seed)
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
