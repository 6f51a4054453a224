"""The shipped networks that were trained apart, on one trunk: not shared, stitched only, as `nnfuze merge` makes them.

Learns from clips without labels that `synthesize.py` makes, of many words, or from the 128 calibration clips; what is
kept is decided by other clips with labels, and what is printed is the accuracy on the evaluation clips, or on more that
are made like them. Each of the three has its own words behind "unknown". Needs espeak-ng and PyTorch:

    python benchmarks/speech/merging.py --clips 20000 --epochs 45 --seeds 3 --evaluation 12800
    python benchmarks/speech/merging.py --calibration --budget 2
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from nnfuze_tvm import load
from nnfuze_tvm.jobs.merge import merge
from nnfuze_tvm.report.merging import MergeReport
from nnfuze_tvm.training.distill import answers
from nnfuze_tvm.training.network import Network
from synthesize import KEYWORDS, OFTEN, SPEAKERS, STEPS_PER_UNIT, make_clips, render

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
TASKS = ("keyword", "speaker")
# Seeds of the clips: of those to learn from, of those that decide, and of those that judge in the end.
LEARNT, DECIDE, JUDGE = 77, 78, 79


def clips(path: Path, count: int, split: str, seed: int, *, labels: bool) -> Path:
    """Make clips as a file, about one of each rendering, unless it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        spoken = len(SPEAKERS) * (len(KEYWORDS) + OFTEN[split])
        audio, keyword, speaker = make_clips(render(split, count // spoken, seed), count, split, seed)
        named = {"keyword": keyword, "speaker": speaker} if labels else {}
        np.savez(path, audio=(audio.astype("float32") / STEPS_PER_UNIT)[:, None], **named)
    return path


def right(files: list[str], evaluation: Path) -> dict[str, np.ndarray]:
    """Return by task on which of the clips that have a label a network's file is right, as 0 and 1."""
    mod = load(files)
    with np.load(evaluation) as data:
        found = {}
        for task in TASKS:
            labels = data[task]
            best = answers(Network(mod[task]), {"audio": data["audio"][:, None]})[0].reshape(len(labels), -1).argmax(1)
            found[task] = (best == labels)[labels >= 0].astype("int64")
    return found


def run(arguments: argparse.Namespace, data: Path, decide: Path, evaluation: Path, seed: int) -> dict:
    """Merge with one seed and return the table's row: by task what `right` finds."""
    given = [str(SPEECH / "independent" / f"{task}.onnx") for task in TASKS]
    output = arguments.out / f"{data.stem}-{arguments.epochs}-{arguments.budget:g}-{seed}"
    last = [0.0]

    def announce(what: str) -> None:
        if time.monotonic() - last[0] > 20:
            last[0] = time.monotonic()
            print(f"seed {seed}: {what}", file=sys.stderr, flush=True)

    report = merge(
        given,
        output,
        data=str(data),
        evaluation=str(decide),
        budget=arguments.budget,
        epochs=arguments.epochs,
        seed=seed,
        threads=arguments.threads,
        announce=announce,
    )
    return {"seed": seed, "report": report, **right([str(output / f"{task}.onnx") for task in TASKS], evaluation)}


def lost(given: np.ndarray, merged: np.ndarray) -> str:
    """Return how many points were lost, and their standard error: of the clips on which the two differ."""
    changed = given - merged
    return f"{100 * changed.mean():.2f} ±{100 * changed.std() / len(changed) ** 0.5:.2f}"


def rows(report: MergeReport) -> list[tuple[str, ...]]:
    """Return what a merge tried, as rows: with the stitch alone, and learnt."""
    found = []
    for one in report.attempts:
        for what, scores in (("stitched only", one.before), ("learnt", one.after)):
            name = f"{one.task} behind {one.behind.removeprefix(one.donor).strip('/')} of {one.donor}, {what}"
            cells = [f"{scores[task].accuracy:.2f}" for task in TASKS]
            found.append((name, f"{one.saved:.0%}", f"{one.macs / 1e6:.1f}", *cells, one.verdict))
    return found


def main() -> None:
    """Merge, and print two tables: what was tried with the first seed, and what came of all."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clips", type=int, default=20_000)
    parser.add_argument("--calibration", action="store_true", help="learn from the 128 calibration clips only")
    parser.add_argument("--budget", type=float, default=0.5, help="points of accuracy that a task may lose")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--evaluation", type=int, metavar="N", help="judge by N clips like those of the evaluation")
    parser.add_argument("--out", type=Path, default=Path("build/merging"))
    parser.add_argument("--json", type=Path, help="write the figures to a file, too")
    arguments = parser.parse_args()
    decide = clips(arguments.out / "decide.npz", 2000, "deciding", DECIDE, labels=True)
    made = arguments.out / f"clips{arguments.clips}.npz"
    data = (
        SPEECH / "calibration.npz"
        if arguments.calibration
        else clips(made, arguments.clips, "unlabelled", LEARNT, labels=False)
    )
    evaluation = SPEECH / "evaluation.npz"
    if arguments.evaluation:
        judging = arguments.out / f"evaluation{arguments.evaluation}.npz"
        evaluation = clips(judging, arguments.evaluation, "evaluation", JUDGE, labels=True)
    given = right([str(SPEECH / "independent" / f"{task}.onnx") for task in TASKS], evaluation)
    results = [run(arguments, data, decide, evaluation, seed) for seed in range(arguments.seeds)]
    first = results[0]["report"]
    tried = Table("tried, seed 0", "shared", "MACs, M", *TASKS, "", title="accuracy on the clips that decide")
    tried.add_row("not shared", "0%", f"{first.macs_before / 1e6:.1f}", *_given(first), "")
    for row in rows(first):
        tried.add_row(*row)
    table = Table(
        "seed", "shared", "MACs, M", *TASKS, *(f"{task} lost" for task in TASKS), "minutes", title="evaluation"
    )
    table.add_row("as given", "0%", f"{first.macs_before / 1e6:.1f}", *(f"{100 * given[t].mean():.2f}" for t in TASKS))
    for one in results:
        report = one["report"]
        cells = [f"{100 * one[task].mean():.2f}" for task in TASKS] + [lost(given[task], one[task]) for task in TASKS]
        macs = f"{report.macs / 1e6:.1f}"
        table.add_row(str(one["seed"]), f"{report.shared:.0%}", macs, *cells, f"{report.seconds / 60:.0f}")
    for each in (tried, table):
        Console(width=160).print(each)
    if arguments.json:
        percent = {task: 100 * given[task].mean() for task in TASKS}
        plain = [
            {**one, **{t: 100 * one[t].mean() for t in TASKS}, "report": json.loads(one["report"].to_json())}
            for one in results
        ]
        arguments.json.write_text(json.dumps({"given": percent, "results": plain}, indent=1) + "\n")


def _given(report: MergeReport) -> list[str]:
    return [f"{report.originals[task].accuracy:.2f}" for task in TASKS]


if __name__ == "__main__":
    main()
