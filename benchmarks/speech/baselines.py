"""What two networks that were trained apart can share without training: one table of all ways that there are.

    python -m benchmarks.speech.baselines
    python -m benchmarks.speech.baselines --merged build/merged

The networks of examples/speech/independent, samples of calibration.npz; the accuracy on evaluation.npz is that of the
merged graph in ONNX Runtime. A folder of `nnfuze merge` is one more line. Shared is the part of one network's
multiplications that is not done twice any more; bytes are those of weights in float32, of codebooks those of codes and
codebooks.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tvm
from onnxruntime import InferenceSession
from rich.table import Table

import nnfuze_tvm
from benchmarks.arguments import output_console, parser_of
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.frontend.export import export
from nnfuze_tvm.graph import dataflow, evaluate
from nnfuze_tvm.graph.cuts import Cut, Stitch, beginning, cuts, graft
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes import MergeTasks, ShareCodebooks, ShareTrunk, ZipFeatures, ZipUnits
from nnfuze_tvm.passes.merge.share_codebooks import stored_bytes

SPEECH = Path(__file__).parents[2] / "examples" / "speech"
TASKS = ("keyword", "speaker")
# Clips that are computed together.
BATCH = 64
# By what vectors and how many of them: as good as float32, and smaller.
CODEBOOKS = ((2, 256), (2, 64), (4, 256))
# Ridge: part of the mean square of a feature.
RIDGE = 1e-3


@dataclass(frozen=True)
class Row:
    """A way to share.

    Attributes
    ----------
    method, upto : str
        Which, and the last layer of the trunk.
    mod : tvm.IRModule
        One function per task.
    vector : int
        How many weights a code stands for, 0 where there are none.
    """

    method: str
    upto: str
    mod: tvm.IRModule
    vector: int = 0


def networks(folder: Path, batch: int = BATCH) -> tvm.IRModule:
    """Return the two networks of a folder, for batches."""
    shapes = {"audio": (batch, 1, 49, 40)}
    return nnfuze_tvm.load([folder / f"{task}.onnx" for task in TASKS], shapes=shapes)


def rows(mod: tvm.IRModule, samples: Mapping[str, np.ndarray]) -> Iterator[Row]:
    """Yield all ways to share of two networks."""
    yield Row("no sharing", "", mod)
    found = cuts(mod[TASKS[0]])
    for donor, task in (TASKS, TASKS[::-1]):
        for own, cut in zip(cuts(mod[donor]), cuts(mod[task]), strict=True):
            yield Row(f"stitch on {donor}", _block(own.name), stitched(mod, donor, own, task, cut, samples))
    for cut in found:
        yield Row("MTZ", _block(cut.name), _after(mod, ZipUnits(samples, cut.name)))
    for cut in found:
        yield Row("ZipIt!", _block(cut.name), _after(mod, ZipFeatures(samples, cut.name)))
    for length, codes in CODEBOOKS:
        yield Row(f"codebooks, {codes} × {length}", "", _after(mod, ShareCodebooks(length, codes)), length)
    for cut in found[:1]:
        both = _after(mod, ZipUnits(samples, cut.name), ShareCodebooks(2, 256))
        yield Row("MTZ and codebooks", _block(cut.name), both, 2)


def _after(mod: tvm.IRModule, *passes: tvm.transform.Pass) -> tvm.IRModule:
    return tvm.transform.Sequential(list(passes))(mod)


def _block(name: str) -> str:
    return name.split("/trunk/")[-1].split("/")[0]


def stitched(
    mod: tvm.IRModule, donor: str, own: Cut, task: str, cut: Cut, samples: Mapping[str, np.ndarray]
) -> tvm.IRModule:
    """Return the networks with one on the other's beginning, by a 1×1 convolution of ridge regression."""
    given, wanted = (
        np.concatenate([np.moveaxis(each, 1, -1).reshape(-1, each.shape[1]) for each in _features(func, samples)])
        for func in (beginning(mod[donor], own), beginning(mod[task], cut))
    )
    given, wanted = given.astype("float64"), wanted.astype("float64")
    middle, aim = given.mean(0), wanted.mean(0)
    square = (given - middle).T @ (given - middle)
    square += np.eye(len(square)) * RIDGE * np.trace(square) / len(square)
    weight = np.linalg.solve(square, (given - middle).T @ (wanted - aim)).T
    stitch = Stitch(weight.astype("float32"), (aim - weight @ middle).astype("float32"))
    grafted = graft(mod[donor], own, mod[task], cut, stitch, task)
    functions = dict(mod.functions_items())
    return dataflow.with_functions(mod, {**functions, mod.get_global_var(task): grafted})


def _features(func: tvm.relax.Function, samples: Mapping[str, np.ndarray]) -> Iterator[np.ndarray]:
    for at in range(0, len(samples["audio"]) - BATCH + 1, BATCH):
        yield evaluate.evaluate(func, {"audio": samples["audio"][at : at + BATCH]})[0]


def measured(row: Row, whole: int, data: Mapping[str, np.ndarray]) -> list[str]:
    """Return the cells of a row: what is shared, bytes, and the accuracy of each task."""
    merged = _after(row.mod, MergeTasks(), ShareTrunk())
    batch = static_shape(merged["main"].params[0])[0]
    macs = sum(layer.macs for layer in metrics.layers(merged)) * BATCH // batch
    size = stored_bytes(merged, row.vector) if row.vector else metrics.size(merged).bytes
    session = InferenceSession(export(merged).SerializeToString(), providers=["CPUExecutionProvider"])
    audio = data["audio"]
    parts = [session.run(TASKS, {"audio": audio[at : at + batch]}) for at in range(0, len(audio) - batch + 1, batch)]
    answers = [np.concatenate(each) for each in zip(*parts, strict=True)]
    right = []
    for task, scores in zip(TASKS, answers, strict=True):
        labels = data[task][: len(scores)]
        right.append(float((scores.argmax(1) == labels)[labels >= 0].mean()))
    return [f"{2 * (1 - macs / whole):.1%}", f"{size:,}", *(f"{each:.2%}" for each in right)]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    mod = networks(SPEECH / "independent")
    samples, data = dict(np.load(SPEECH / "calibration.npz")), dict(np.load(SPEECH / "evaluation.npz"))
    whole = sum(layer.macs for layer in metrics.layers(mod))
    table = Table("method", "trunk up to", "shared", "bytes", *TASKS)
    trained = (Row(folder.name, "", networks(folder, batch=1)) for folder in args.merged)
    for row in (*rows(mod, samples), *trained):
        table.add_row(row.method, row.upto, *measured(row, whole, data))
        print(row.method, row.upto, file=sys.stderr, flush=True)
    output_console().print(table)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.speech.baselines", __doc__)
    parser.add_argument("--merged", type=Path, nargs="*", default=[], metavar="FOLDER", help="what `nnfuze merge` made")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
