"""What pruning costs with repair and without, on networks that were not trained to be pruned.

    python -m benchmarks.ordinary_networks --out build/ordinary    # needs PyTorch
    python -m benchmarks.repair --networks digits,mnist --folder build/ordinary

Accuracy is that of the held-out images or clips; nothing is trained, and labels are not looked at before.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.passes.compress.prune.budget import Budget
from nnfuze_tvm.passes.compress.prune.prune_channels import PruneChannels


@dataclass(frozen=True)
class Case:
    """A network, and what it is judged by."""

    mod: tvm.IRModule
    calibration: dict[str, np.ndarray]
    inputs: dict[str, np.ndarray]
    labels: np.ndarray

    @classmethod
    def load(cls, name: str, folder: Path) -> Case:
        """Read what `benchmarks.ordinary_networks` wrote."""
        mod = tvm.transform.Sequential(pipeline.merge_phases())(load([f"{name}={folder / name}.onnx"]))
        calibration, held = (dict(np.load(folder / f"{name}-{part}.npz")) for part in ("calibration", "evaluation"))
        return cls(mod, calibration, held, held.pop(name))

    def accuracy(self, mod: tvm.IRModule) -> float:
        """Return how many of the labels a network finds, in percent."""
        run, right = host_executor(mod), []
        for n in np.flatnonzero(self.labels >= 0):
            (scores,) = run({name: array[n : n + 1] for name, array in self.inputs.items()})
            right.append(scores.argmax() == self.labels[n])
        return 100 * float(np.mean(right))


def macs(mod: tvm.IRModule) -> int:
    """Return the multiply-accumulates of one inference."""
    return sum(layer.macs for layer in metrics.layers(mod))


def ways(case: Case, keep: float) -> list[tvm.IRModule]:
    """Return a network pruned in several ways, the last one to as many multiply-accumulates as the first one has."""
    policy = Policy.uniform(keep=keep)
    plain = PruneChannels(policy, "l2")(case.mod)
    budget = Budget(macs=macs(plain) / macs(case.mod))
    return [
        plain,
        PruneChannels(policy, "l2", case.calibration)(case.mod),
        PruneChannels(policy, "repair", case.calibration)(case.mod),
        PruneChannels(Policy(), "repair", case.calibration, budget=budget)(case.mod),
    ]


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", default="digits,mnist", help="of those that ordinary_networks made")
    parser.add_argument("--folder", type=Path, default=Path("build/ordinary"))
    parser.add_argument("--keep", default="0.7,0.5", help="fractions of the channels")
    arguments = parser.parse_args()
    print("| network | MACs left | whole | removed by l2 norms | the same, repaired | chosen for repair | `--macs` |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.networks.split(","):
        case = Case.load(name, arguments.folder)
        whole = case.accuracy(case.mod)
        for keep in map(float, arguments.keep.split(",")):
            plain, *others = ways(case, keep)
            found = [case.accuracy(mod) for mod in (plain, *others)]
            cells = " | ".join(f"{each:.1f} %" for each in (whole, *found))
            print(f"| {name} | {macs(plain) / macs(case.mod):.2f} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
