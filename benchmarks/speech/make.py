"""Make the speech example from a seed: speech, features, two pairs of networks, and the check of all of it."""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

import numpy as np
import torch

from check import check
from networks import Network, export, fold
from synthesize import KEYWORD_LABELS, SPEAKERS, STEPS_PER_UNIT, make_clips, render
from train import CLASSES, train, train_heads

# Renderings of each keyword by each speaker, and clips mixed from them.
SIZES = {"training": (24, 20_000), "evaluation": (6, 1_280)}
CALIBRATION = 128
Clips = tuple[np.ndarray, np.ndarray, np.ndarray]


def clips(split: str, seed: int, cache: Path) -> Clips:
    """Make the clips of a split, or take them from the cache."""
    file = cache / f"{split}-{seed}-{'-'.join(map(str, SIZES[split]))}.npz"
    if not file.exists():
        if shutil.which("espeak-ng") is None:
            sys.exit("make.py: espeak-ng is not installed; on Debian: apt-get install espeak-ng")
        per_keyword, count = SIZES[split]
        audio, keyword, speaker = make_clips(render(split, per_keyword, seed), count, split, seed)
        cache.mkdir(parents=True, exist_ok=True)
        np.savez_compressed(file, audio=audio, keyword=keyword, speaker=speaker)
    with np.load(file) as data:
        return data["audio"], data["keyword"], data["speaker"]


def write_data(training: Clips, evaluation: Clips, out: Path) -> None:
    """Write calibration data, evaluation data and class names."""
    out.mkdir(parents=True, exist_ok=True)

    def to_float(audio: np.ndarray) -> np.ndarray:
        return (audio[:, None] / np.float32(STEPS_PER_UNIT)).astype(np.float32)

    np.savez_compressed(out / "calibration.npz", audio=to_float(training[0][:CALIBRATION]))
    audio, keyword, speaker = evaluation
    np.savez_compressed(out / "evaluation.npz", audio=to_float(audio), keyword=keyword, speaker=speaker)
    names = {"keyword": list(KEYWORD_LABELS), "speaker": [speaker.voice for speaker in SPEAKERS]}
    (out / "labels.json").write_text(json.dumps(names, indent=2) + "\n")


def write_networks(training: Clips, epochs: int, seed: int, out: Path) -> None:
    """Train and export both pairs."""
    audio = training[0]
    labels = dict(zip(CLASSES, map(torch.from_numpy, training[1:]), strict=True))
    trunk, heads = train("shared", tuple(CLASSES), audio, labels, epochs, seed)
    # Folded once: both files get the very same bits.
    frozen = fold(trunk)
    train_heads(frozen, heads, audio, labels, seed)
    for task in CLASSES:
        export(Network(frozen, heads[task]), out / "shared" / f"{task}.onnx")
    for number, task in enumerate(CLASSES, 1):
        trunk, heads = train(f"independent {task}", (task,), audio, labels, epochs, seed + number)
        export(Network(fold(trunk), heads[task]), out / "independent" / f"{task}.onnx")


def main() -> int:
    """Run from the command line."""
    here = Path(__file__).parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("examples/speech"), help="where the example is written")
    parser.add_argument("--cache", type=Path, default=here / ".cache", help="where the clips are kept between runs")
    parser.add_argument("--seed", type=int, default=1, help="the seed of everything")
    parser.add_argument("--epochs", type=int, default=3, help="epochs per network")
    parser.add_argument("--threads", type=int, default=1, help="threads; another number gives slightly other weights")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    training = clips("training", arguments.seed, arguments.cache)
    evaluation = clips("evaluation", arguments.seed, arguments.cache)
    write_data(training, evaluation, arguments.out)
    write_networks(training, arguments.epochs, arguments.seed, arguments.out)
    wrong = check(arguments.out)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
