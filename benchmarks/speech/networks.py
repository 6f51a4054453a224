"""The example network: a small ResNet over log-mel features, and its export to ONNX."""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval

from synthesize import BANDS, FRAMES

FEATURES = 64


class ConvNorm(nn.Module):
    """A convolution with its BatchNorm, which `folded` turns into one convolution with a bias."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int = 1) -> None:
        super().__init__()
        self.conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, bias=False)
        self.norm = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.conv(x))

    def folded_weight(self) -> torch.Tensor:
        """The weight that the folded convolution has at this point of the training."""
        scale = self.norm.weight / torch.sqrt(self.norm.running_var + self.norm.eps)
        return (self.conv.weight * scale[:, None, None, None]).detach()


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, which is a 1x1 convolution where the shape changes."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = ConvNorm(inputs, outputs, 3, stride)
        self.conv2 = ConvNorm(outputs, outputs, 3)
        same = inputs == outputs and stride == 1
        self.shortcut = nn.Identity() if same else ConvNorm(inputs, outputs, 1, stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.conv2(torch.relu(self.conv1(x))) + self.shortcut(x))


class Trunk(nn.Module):
    """[batch, 1, 49, 40] → 32 channels of 25x20 → 64 of 13x10 → 64 of 7x5 → their means [batch, 64]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 32, 3, stride=2)
        self.block1 = Block(32, 32, stride=1)
        self.block2 = Block(32, 64, stride=2)
        self.block3 = Block(64, FEATURES, stride=2)
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.block1(torch.relu(self.stem(x)))
        return torch.flatten(self.pool(self.block3(self.block2(x))), 1)


class Network(nn.Module):
    """A trunk and the dense head of one task."""

    def __init__(self, trunk: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.trunk = trunk
        self.head = head

    def forward(self, audio: torch.Tensor) -> torch.Tensor:
        return self.head(self.trunk(audio))


def fold(trunk: Trunk) -> Trunk:
    """Return a copy of the trunk, for inference, with every BatchNorm folded into its convolution."""
    folded = copy.deepcopy(trunk).eval()
    pairs = [(name, module) for name, module in folded.named_modules() if isinstance(module, ConvNorm)]
    for name, module in pairs:
        folded.set_submodule(name, fuse_conv_bn_eval(module.conv, module.norm))
    return folded.requires_grad_(False)


def export(network: Network, path: Path) -> None:
    """Write a folded network as ONNX, with input `audio`, output `logits` and a dynamic batch."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.onnx.export(
        copy.deepcopy(network).eval().to(memory_format=torch.contiguous_format),
        (torch.zeros(1, 1, FRAMES, BANDS),),
        str(path),
        input_names=["audio"],
        output_names=["logits"],
        dynamic_axes={"audio": {0: "batch"}, "logits": {0: "batch"}},
        opset_version=17,
        # The older exporter writes plain Conv/Relu/Add/Gemm nodes with readable names.
        dynamo=False,
    )
