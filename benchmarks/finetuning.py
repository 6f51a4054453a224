"""What fine-tuning without labels gives back of what compression takes: two tables.

    python -m benchmarks.finetuning digits --seeds 3
    python -m benchmarks.finetuning speech --data unlabelled.npz --epochs 2

``digits`` trains an ordinary network, a small residual one with batch norms, on scikit-learn's 8×8 digits, and prunes
it to half of its multiplications; what the fine-tuning is shown are the images of the training, without labels.
``speech`` quantizes the two shipped pairs to int8; ``--data`` holds clips of any kind (``audio``, ``[N, 1, 49, 40]``).
Needs PyTorch; ``digits`` scikit-learn, too. Accuracies are of the graphs, on labelled samples that nothing was learnt
from.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
import tvm
from rich.table import Table
from torch import nn

from benchmarks.arguments import at_least, output_console, parser_of
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.graph import ir
from nnfuze_tvm.jobs.graphs import make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest
from nnfuze_tvm.training.distill import agreement, answers
from nnfuze_tvm.training.network import Network

SPEECH = Path(__file__).parent.parent / "examples" / "speech"
_HELD, _KEEP = 500, 0.7


class _Block(nn.Module):
    """Two convolutions and what goes around them."""

    def __init__(self, inner: int, outer: int, stride: int) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(inner, outer, 3, stride, 1), nn.Conv2d(outer, outer, 3, 1, 1)
        self.norm, self.last = nn.BatchNorm2d(outer), nn.BatchNorm2d(outer)
        self.around = nn.Identity() if (inner, stride) == (outer, 1) else nn.Conv2d(inner, outer, 1, stride)

    def forward(self, data: torch.Tensor) -> torch.Tensor:
        inner = torch.relu(self.norm(self.first(data)))
        return torch.relu(self.last(self.second(inner)) + self.around(data))


def ordinary_network(images: np.ndarray, classes: np.ndarray, seed: int, path: Path, epochs: int = 20) -> None:
    """Train a network that nobody meant to prune, and write it as an ONNX file.

    Parameters
    ----------
    images, classes : np.ndarray
        ``[N, 1, 8, 8]`` and ``[N]``.
    seed : int
        Of weights, order and shifts.
    path : Path
        The file.
    epochs : int
        How often each image is seen.
    """
    torch.manual_seed(seed)
    blocks = [_Block(24, 24, 1), _Block(24, 48, 2), _Block(48, 48, 1)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(48, 10)]
    network = nn.Sequential(nn.Conv2d(1, 24, 3, 1, 1), nn.ReLU(), *blocks, *head)
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)
    batches = len(images) // 64
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, total_steps=epochs * batches)
    shown, right = torch.from_numpy(images), torch.from_numpy(classes)
    for _ in range(epochs):
        for own in torch.randperm(len(images))[: 64 * batches].split(64):
            shift = torch.randint(-1, 2, (2,)).tolist()
            loss = nn.functional.cross_entropy(network(shown[own].roll(shift, (2, 3))), right[own])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            rate.step()
    network.eval()
    torch.onnx.export(network, (shown[:1],), path, input_names=["image"], output_names=["scores"], dynamo=False)


def judged(stages: dict[str, tvm.IRModule], inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]) -> Iterator:
    """Yield per stage its name, MACs, and by task accuracy and agreement with the first stage, in percent."""
    right: list[np.ndarray] = []
    for name, mod in stages.items():
        found = answers(Network(mod["main"]), inputs)
        right = right or found
        tasks = [output.task for output in ir.task_outputs(mod)]
        scores = {}
        for task, answer, original in zip(tasks, found, right, strict=True):
            known = labels[task] >= 0
            hits = answer.argmax(-1).reshape(len(known))[known] == labels[task][known]
            scores[task] = 100 * float(hits.mean()), agreement(answer, original)
        yield name, sum(layer.macs for layer in metrics.layers(mod)), scores


def digits(arguments: argparse.Namespace, scratch: Path) -> Iterator[list[str]]:
    """Yield a row per seed and stage."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = (data.images / 8 - 1).astype("float32")[:, None]
    order = np.random.default_rng(0).permutation(len(images))
    learnt, held = order[:-_HELD], order[-_HELD:]
    np.savez(scratch / "images.npz", image=images[learnt])
    for seed in range(arguments.seeds):
        model = scratch / f"digits{seed}.onnx"
        ordinary_network(images[learnt], data.target[learnt], seed, model)
        fields = {"prune": _KEEP, "finetune": str(scratch / "images.npz"), "work_dir": str(scratch)}
        stages = _stages([f"digits={model}"], {**fields, "epochs": arguments.epochs})
        yield from _rows(
            f"digits, seed {seed}", stages, {"image": images[held][:, None]}, {"digits": data.target[held]}
        )


def speech(arguments: argparse.Namespace, scratch: Path) -> Iterator[list[str]]:
    """Yield a row per pair and stage."""
    evaluation = dict(np.load(SPEECH / "evaluation.npz"))
    audio = {"audio": evaluation.pop("audio")[:, None]}
    for pair in ("shared", "independent"):
        models = [str(SPEECH / pair / f"{task}.onnx") for task in ("keyword", "speaker")]
        fields = {"quantize": "int8", "calibration": str(SPEECH / "calibration.npz"), "finetune": arguments.data}
        stages = _stages(models, {**fields, "work_dir": str(scratch), "epochs": arguments.epochs})
        yield from _rows(pair, stages, audio, evaluation)


def _stages(models: Sequence[str], fields: dict) -> dict[str, tvm.IRModule]:
    return dict(make_graphs(NetworkRequest.parse(models, fields), print).stages)


def _rows(
    name: str, stages: dict[str, tvm.IRModule], inputs: dict[str, np.ndarray], labels: dict[str, np.ndarray]
) -> Iterator[list[str]]:
    for stage, macs, scores in judged(stages, inputs, labels):
        found = [f"{task} {accuracy:.2f} %, {same:.2f} %" for task, (accuracy, same) in scores.items()]
        yield [name, stage, f"{macs / 1e6:.2f} M", "; ".join(found)]


def main() -> None:
    """Train and print a table."""
    parser = parser_of("benchmarks.finetuning", __doc__)
    parser.add_argument("what", choices=["digits", "speech"])
    parser.add_argument("--seeds", type=at_least(1), default=3, help="networks of digits")
    parser.add_argument("--epochs", type=at_least(1), help="of the fine-tuning")
    parser.add_argument("--data", help="clips to learn from")
    arguments = parser.parse_args()
    if arguments.what == "speech" and not arguments.data:
        parser.error("speech: give --data")
    began = time.monotonic()
    table = Table("network", "stage", "MACs", "accuracy, agreement")
    with tempfile.TemporaryDirectory() as scratch:
        rows = digits if arguments.what == "digits" else speech
        for row in rows(arguments, Path(scratch)):
            table.add_row(*row)
    console = output_console()
    console.print(table)
    console.print(f"{time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
