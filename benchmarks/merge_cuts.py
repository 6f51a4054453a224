"""What every pair of cuts loses that saves most: what `nnfuze merge` would choose from if it tried all of them.

    python -m benchmarks.merge_cuts digit.onnx place.onnx --data unlabelled.npz --evaluation decide.npz --epochs 20
    python -m benchmarks.merge_cuts keyword.onnx speaker.onnx --data clips.npz --evaluation decide.npz --json cuts.json

Each pair is learnt from the beginning, for as long as all others, without giving any up. By default those are tried
that keep nothing but a network's last layers; ``--depths 2`` tries those in front of these, too. Needs PyTorch.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from itertools import permutations
from pathlib import Path

import numpy as np
import torch
from rich.table import Table

from benchmarks.arguments import at_least, output_console, parser_of
from nnfuze_tvm import load
from nnfuze_tvm.graph import ir
from nnfuze_tvm.training import stitches
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.judge import Evaluation
from nnfuze_tvm.training.lessons import mixed
from nnfuze_tvm.training.merging import Search, Watch
from nnfuze_tvm.training.trials import Trial

# All points may be lost: nothing is given up.
_ANY = 100.0


def try_all(
    models: list[str], data: Path, evaluation: Path, schedule: Schedule, depths: int
) -> list[tuple[Trial, dict[str, float], bool]]:
    """Return the trials of all pairs of cuts, the points lost by task, and whether `stitches.candidates` names them.

    Parameters
    ----------
    models : list of str
        Two ONNX files, each of one input of one name and one output.
    data, evaluation : Path
        ``.npz``: what to learn from, and samples with labels by task.
    schedule : Schedule
        Of each trial.
    depths : int
        How many of a network's cuts, from the last one on.
    """
    mod = load(models)
    functions = {task: mod[task] for task in dict.fromkeys(output.task for output in ir.task_outputs(mod))}
    (name,) = {param.name for func in functions.values() for param in func.params}
    with np.load(data) as given, np.load(evaluation) as judged:
        samples = {name: given[name][:, None]}
        held = Evaluation({name: judged[name][:, None]}, {task: judged[task] for task in functions if task in judged})
    found = []
    for donor, task in permutations(functions, 2):
        pair = donor, functions[donor], task, functions[task], samples
        chosen = stitches.candidates(*pair)
        last = {cut.macs for cut in sorted({one.cut for one in chosen}, key=lambda cut: -cut.macs)[:depths]}
        for candidate in stitches.every(*pair):
            if candidate.cut.macs in last:
                search = Search(mod, samples, _ANY, schedule, Watch(), held, (mixed,))
                trial = search.attempt(candidate)
                lost = search.judge.lost(trial.after)
                found.append((trial, lost, candidate in chosen))
                print(task, "behind", candidate.donor_cut.name, "lost", lost, flush=True)
    return found


def main() -> None:
    """Run from the command line."""
    parser = parser_of("python -m benchmarks.merge_cuts", __doc__)
    parser.add_argument("models", nargs=2, metavar="model.onnx")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--evaluation", type=Path, required=True)
    parser.add_argument("--epochs", type=at_least(1), default=20)
    parser.add_argument("--depths", type=at_least(1), default=1)
    parser.add_argument("--seed", type=at_least(0), default=0)
    parser.add_argument("--json", type=Path, help="write the trials to a file, too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    schedule = Schedule(arguments.epochs, 1, rate=3e-3, seed=arguments.seed)
    found = try_all(arguments.models, arguments.data, arguments.evaluation, schedule, arguments.depths)
    tasks = list(found[0][0].after)
    table = Table("task", "goes on behind", "instead of", "fit", *(f"{task} lost" for task in tasks), "in the search")
    for trial, lost, chosen in sorted(found, key=lambda row: max(row[1].values())):
        one = trial.candidate
        cells = [one.task, one.donor_cut.name, one.cut.name, f"{one.fit:.2f}", *(f"{lost[task]:.2f}" for task in tasks)]
        table.add_row(*cells, "yes" if chosen else "")
    output_console().print(table)
    if arguments.json:
        arguments.json.write_text(
            json.dumps([{**asdict(t), "lost": lost, "chosen": chosen} for t, lost, chosen in found]) + "\n"
        )


if __name__ == "__main__":
    main()
