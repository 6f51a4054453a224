"""Train a network with weights of one bit on scikit-learn's digits: what docs/few-bits.md compiles.

    pip install torch scikit-learn
    python -m benchmarks.binary_digits --out examples/digits

Writes ``binary.onnx``, and ``evaluation.npz`` with the images that were held out and their labels. Behind a stem of
floats stand two 3×3 convolutions whose weights are signs times a number per output channel. The first reads signs, the
second numbers of two bits. Gradients go straight through what rounds (Hubara et al., "Binarized Neural Networks",
NeurIPS 2016).
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from benchmarks.ordinary_networks import images

EPOCHS, CHANNELS, OUTPUTS = 60, 16, 32
# Activations of two bits are this many times 0, 1, 2 or 3.
STEP = 0.5


def through(rounded: torch.Tensor, smooth: torch.Tensor) -> torch.Tensor:
    """Return ``rounded``, with the gradient of ``smooth``."""
    return smooth + (rounded - smooth).detach()


def signs(x: torch.Tensor) -> torch.Tensor:
    """Return 1 where numbers are not negative, else -1."""
    return through(torch.where(x >= 0, 1.0, -1.0), x.clamp(-1, 1))


def two_bits(x: torch.Tensor) -> torch.Tensor:
    """Return the nearest of 0, 1, 2 and 3 steps."""
    bounded = (x / STEP).clamp(0, 3)
    return through(bounded.round(), bounded) * STEP


class SignConv(nn.Module):
    """A 3×3 convolution whose weights are signs times a number per output channel, and a batch norm."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    @property
    def size(self) -> torch.Tensor:
        """What the signs of each output channel are multiplied by."""
        return self.conv.weight.abs().mean((1, 2, 3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        weight = signs(self.conv.weight) * self.size[:, None, None, None]
        return self.norm(nn.functional.conv2d(x, weight, None, self.conv.stride, self.conv.padding))


class Digits(nn.Module):
    """[batch, 1, 8, 8] → [batch, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, CHANNELS, 3, 1, 1, bias=False), nn.BatchNorm2d(CHANNELS)
        self.first, self.second = SignConv(CHANNELS, OUTPUTS, 1), SignConv(OUTPUTS, OUTPUTS, 2)
        self.head = nn.Linear(OUTPUTS, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = signs(self.norm(self.stem(x)))
        x = two_bits(self.second(two_bits(self.first(x))))
        return self.head(x.mean((2, 3)))


def trained(pixels: torch.Tensor, labels: torch.Tensor) -> Digits:
    """Return a network that has learnt images."""
    torch.manual_seed(1)
    network = Digits()
    steps = EPOCHS * (len(pixels) // 64)
    optimizer = torch.optim.Adam(network.parameters())
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(pixels))[: len(pixels) // 64 * 64].split(64):
            loss = nn.functional.cross_entropy(network(pixels[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return network.eval()


class Writer:
    """Writes nodes, each behind the one before."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, np.ndarray] = {}

    def add(self, operator: str, inputs: list[str], name: str, **attributes: object) -> str:
        """Add a node whose name is that of its output."""
        self.nodes.append(helper.make_node(operator, inputs, [name], name, **attributes))
        return name

    def constant(self, name: str, value: np.ndarray) -> str:
        """Add a weight."""
        self.constants[name] = value
        return name

    def norm(self, source: str, name: str, norm: nn.BatchNorm2d) -> str:
        """Add a batch norm."""
        values = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        numbers = [each.detach().numpy() for each in values if each is not None]
        names = [self.constant(f"{name}.{n}", each) for n, each in enumerate(numbers)]
        return self.add("BatchNormalization", [source, *names], name, epsilon=norm.eps)

    def sign_conv(self, source: str, name: str, layer: SignConv) -> str:
        """Add a convolution of signs, and quantize what it gives to two bits."""
        codes = np.where(layer.conv.weight.detach().numpy() >= 0, 1, -1).astype("int8")
        parameters = [
            self.constant(f"{name}.codes", codes),
            self.constant(f"{name}.size", layer.size.detach().numpy()),
            self.constant(f"{name}.zero", np.zeros(len(codes), "int8")),
        ]
        weights = self.add("DequantizeLinear", parameters, f"{name}.weights", axis=0)
        pads, strides = [1, 1, 1, 1], list(layer.conv.stride)
        sums = self.add("Conv", [source, weights], f"{name}/Conv", pads=pads, strides=strides)
        normed = self.norm(sums, f"{name}/norm", layer.norm)
        bounds = [self.constant("low", np.float32(0)), self.constant("high", np.float32(3 * STEP))]
        bounded = self.add("Clip", [normed, *bounds], f"{name}/bounded")
        step = [self.constant("step", np.float32(STEP)), self.constant("zero", np.uint8(0))]
        codes_of = self.add("QuantizeLinear", [bounded, *step], f"{name}/codes")
        return self.add("DequantizeLinear", [codes_of, *step], f"{name}/two_bits")


def exported(network: Digits) -> onnx.ModelProto:
    """Return a network in ONNX: signs as a comparison, weights and two bits by QuantizeLinear and DequantizeLinear."""
    writer = Writer()
    stem = writer.constant("stem.weight", network.stem.weight.detach().numpy())
    normed = writer.norm(writer.add("Conv", ["image", stem], "stem/Conv", pads=[1, 1, 1, 1]), "stem/norm", network.norm)
    positive = writer.add("GreaterOrEqual", [normed, writer.constant("low", np.float32(0))], "stem/positive")
    ones = [writer.constant(name, np.float32(value)) for name, value in (("one", 1), ("minus_one", -1))]
    data = writer.add("Where", [positive, *ones], "stem/signs")
    for name, layer in (("first", network.first), ("second", network.second)):
        data = writer.sign_conv(data, name, layer)
    pooled = writer.add("Flatten", [writer.add("GlobalAveragePool", [data], "pool")], "flat")
    head = [writer.constant(f"head.{n}", each.detach().numpy()) for n, each in network.head.named_parameters()]
    writer.add("Gemm", [pooled, *head], "logits", transB=1)
    graph = helper.make_graph(
        writer.nodes,
        "digits",
        [helper.make_tensor_value_info("image", TensorProto.FLOAT, [1, 1, 8, 8])],
        [helper.make_tensor_value_info("logits", TensorProto.FLOAT, [1, 10])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in writer.constants.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("build/digits"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    pixels, labels = images("digits")
    held = len(labels) // 4
    network = trained(*(torch.from_numpy(each[held:]) for each in (pixels, labels)))
    with torch.no_grad():
        right = network(torch.from_numpy(pixels[:held])).argmax(1).numpy() == labels[:held]
    print(f"{100 * right.mean():.2f} % of {held}")
    onnx.save(exported(network), arguments.out / "binary.onnx")
    np.savez_compressed(arguments.out / "evaluation.npz", image=pixels[:held, None], binary=labels[:held])


if __name__ == "__main__":
    main()
