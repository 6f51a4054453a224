"""Four networks on one camera that looks at digits: made here, for `nnfuze merge` to bring onto common trunks.

    pip install torch scikit-learn
    python -m benchmarks.camera --out examples/camera              # trains them
    python -m benchmarks.camera --unlabelled 12000 --out build     # only images without labels: unlabelled.npz

Each answers a question of its own: which digit it is, where in the image it is, whether it is in focus, and whether it
is dark on light or light on dark. The first two are residual networks of one shape, trained from different seeds; the
third is made of depthwise and pointwise convolutions, the fourth of a few plain ones. Images are scikit-learn's 8×8
digits (handwriting of 43 people, UCI Machine Learning Repository, CC BY 4.0), shown larger, shifted, slanted and with
noise; those in ``evaluation.npz`` and ``decide.npz`` are of digits that no network was trained with.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from sklearn.datasets import load_digits
from torch import nn

sys.path.insert(0, str(Path(__file__).parent / "speech"))

from networks import Block, ConvNorm, Network, fold

SIZE = 32
# Pixels have so many levels of grey.
LEVELS = 31
CLASSES = {"digit": 10, "place": 5, "focus": 2, "ink": 2}
# Where the digits of the splits begin.
SPLITS = {"training": (0, 1097), "decide": (1097, 1297), "evaluation": (1297, 1797)}
# In the middle, above, below, left, right.
PLACES = ((0, 0), (-1, 0), (1, 0), (0, -1), (0, 1))
EPOCHS, TRAINED, HELD = 8, 24_000, 1000


def photographs(split: str, count: int, seed: int) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    """Return images ``[count, 1, SIZE, SIZE]`` of values from 0 to 1, and by task what is to be seen in them."""
    rng = np.random.default_rng(seed)
    digits, names = load_digits(return_X_y=True)
    first, last = SPLITS[split]
    order = np.random.default_rng(1).permutation(len(digits))[first:last]
    chosen = order[rng.integers(0, len(order), count)]
    labels = {
        "digit": names[chosen],
        **{task: rng.integers(0, CLASSES[task], count) for task in ("place", "focus", "ink")},
    }
    images = np.empty((count, 1, SIZE, SIZE), "float32")
    for n, index in enumerate(chosen):
        image = _shown(digits[index].reshape(8, 8) / 16, PLACES[labels["place"][n]], rng)
        image = ndimage.gaussian_filter(image, rng.uniform(1.6, 2.4) if labels["focus"][n] else rng.uniform(0, 0.5))
        image = image if labels["ink"][n] else 1 - image
        dark, light = rng.uniform(0, 0.35), rng.uniform(0.6, 1)
        slope = rng.uniform(-0.15, 0.15, 2) @ np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j].reshape(2, -1)
        image = dark + (light - dark) * image + slope.reshape(SIZE, SIZE) + rng.normal(0, 0.03, image.shape)
        images[n, 0] = np.round(np.clip(image, 0, 1) * LEVELS) / LEVELS
    return images, {task: values.astype("int64") for task, values in labels.items()}


def _shown(digit: np.ndarray, place: tuple[int, int], rng: np.random.Generator) -> np.ndarray:
    """Return a digit somewhere in an image, a little turned, slanted, larger or smaller."""
    angle, slant, scale = rng.uniform(-0.2, 0.2), rng.uniform(-0.2, 0.2), rng.uniform(2.0, 2.8)
    turn = np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    matrix = turn @ np.array([[1, 0], [slant, 1]]) / scale
    middle = (SIZE - 1) / 2 + np.multiply(place, rng.uniform(4, 7)) + rng.uniform(-1.5, 1.5, 2)
    return ndimage.affine_transform(digit, matrix, 3.5 - matrix @ middle, (SIZE, SIZE), order=1)


class Residual(nn.Module):
    """[batch, 1, 32, 32] → 16 channels of 16×16 → 24 of 8×8 → 32 of 4×4 → their means [batch, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, 3, 2)
        self.blocks = nn.Sequential(Block(16, 16, 1), Block(16, 24, 2), Block(24, 32, 2))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.blocks(torch.relu(self.stem(x))).mean((2, 3))


class Separable(nn.Module):
    """[batch, 1, 32, 32] → depthwise and pointwise convolutions → means of 32 channels of 4×4."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = ConvNorm(1, 16, 3, 2)
        sizes = ((16, 24, 2), (24, 24, 1), (24, 32, 2), (32, 32, 1))
        self.depthwise = nn.ModuleList(nn.Conv2d(n, n, 3, stride, 1, groups=n) for n, _, stride in sizes)
        self.pointwise = nn.ModuleList(ConvNorm(n, more, 1) for n, more, _ in sizes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.stem(x))
        for depthwise, pointwise in zip(self.depthwise, self.pointwise, strict=True):
            x = torch.relu(pointwise(torch.relu(depthwise(x))))
        return x.mean((2, 3))


class Plain(nn.Module):
    """[batch, 1, 32, 32] → 16, 24 and 32 channels, half as large each time → means [batch, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(*(ConvNorm(n, more, 3, 2) for n, more in ((1, 16), (16, 24), (24, 32))))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x.mean((2, 3))


TRUNKS = {"digit": Residual, "place": Residual, "focus": Separable, "ink": Plain}


def train(task: str, images: torch.Tensor, labels: torch.Tensor, seed: int) -> nn.Module:
    """Return a network that learnt a task, with its batch norms folded."""
    torch.manual_seed(seed)
    network = Network(TRUNKS[task](), nn.Linear(32, CLASSES[task]))
    steps = EPOCHS * (len(images) // 64)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=0.01)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=steps)
    for _ in range(EPOCHS):
        for batch in torch.randperm(len(images))[: len(images) // 64 * 64].split(64):
            loss = nn.functional.cross_entropy(network(images[batch]), labels[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rates.step()
    return Network(fold(network.trunk), network.head).eval()


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument(
        "--unlabelled", type=int, metavar="N", help="make so many images without labels, and no network"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    arguments.out.mkdir(parents=True, exist_ok=True)
    if arguments.unlabelled:
        images, _ = photographs("training", arguments.unlabelled, 5)
        np.savez_compressed(arguments.out / "unlabelled.npz", image=images)
        return
    images, labels = photographs("training", TRAINED, 2)
    held = {split: photographs(split, HELD, seed) for split, seed in (("evaluation", 3), ("decide", 4))}
    for split, (shown, wanted) in held.items():
        np.savez_compressed(arguments.out / f"{split}.npz", image=shown, **wanted)
    np.savez_compressed(arguments.out / "calibration.npz", image=images[:128])
    for seed, task in enumerate(CLASSES):
        network = train(task, torch.from_numpy(images), torch.from_numpy(labels[task]), seed)
        shown, wanted = held["evaluation"]
        with torch.no_grad():
            right = network(torch.from_numpy(shown)).argmax(1).numpy() == wanted[task]
        print(f"{task}: {100 * right.mean():.1f} % of {HELD}", flush=True)
        torch.onnx.export(
            network, (torch.from_numpy(shown[:1]),), str(arguments.out / f"{task}.onnx"), input_names=["image"],
            output_names=["logits"], opset_version=17, dynamo=False,
        )  # fmt: skip


if __name__ == "__main__":
    main()
