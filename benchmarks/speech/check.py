"""Check the shipped example: shapes, sizes, accuracy, the shared trunk, and what removing channels costs.

Needs only the files, onnx and onnxruntime. Prints a Markdown table and fails where the example is not what its
README promises.
"""

from __future__ import annotations

import argparse
import collections
import sys
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import numpy_helper

from groups import GROUPS, weakest

PAIRS = ("shared", "independent")
TASKS = ("keyword", "speaker")
PRUNED = 0.25
LEAST_ACCURACY = 0.90
LARGEST_FILE = 1_000_000
OPERATORS = {"Conv", "Relu", "Add", "GlobalAveragePool", "Flatten", "Gemm"}


def accuracy(model: onnx.ModelProto, audio: np.ndarray, labels: np.ndarray) -> float:
    """Share of the labelled clips (label >= 0) that ONNX Runtime classifies correctly."""
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    logits = session.run(["logits"], {"audio": audio})[0]
    labelled = labels >= 0
    return float((logits.argmax(axis=1) == labels)[labelled].mean())


def weights(model: onnx.ModelProto) -> dict[str, np.ndarray]:
    """The initializers of a model by name."""
    return {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}


def without_weakest(model: onnx.ModelProto, only_inner: bool) -> onnx.ModelProto:
    """Return a copy whose weakest channels produce exactly zero.

    Parameters
    ----------
    model : onnx.ModelProto
        One of the example networks.
    only_inner : bool
        Leave the residual stream alone, mask only the channels between the two convolutions of a block.
    """
    masked = onnx.ModelProto()
    masked.CopyFrom(model)
    tensors = {tensor.name: tensor for tensor in masked.graph.initializer}
    values = weights(model)
    for group in GROUPS.values():
        if only_inner and not group.inner:
            continue
        chosen = weakest([values[f"trunk.{name}.weight"] for name in group.producers], PRUNED)
        for name in group.producers:
            for key in (f"trunk.{name}.weight", f"trunk.{name}.bias"):
                value = values[key].copy()
                value[chosen] = 0
                tensors[key].CopyFrom(numpy_helper.from_array(value, key))
    return masked


def multiply_accumulates(model: onnx.ModelProto) -> int:
    """Multiply-accumulates of the Conv and Gemm nodes for one clip."""
    inferred = onnx.shape_inference.infer_shapes(model)
    shapes = {info.name: [d.dim_value for d in info.type.tensor_type.shape.dim] for info in inferred.graph.value_info}
    values = weights(model)
    total = 0
    for node in model.graph.node:
        if node.op_type == "Conv":
            total += values[node.input[1]].size * int(np.prod(shapes[node.output[0]][2:]))
        elif node.op_type == "Gemm":
            total += values[node.input[1]].size
    return total


def check_form(name: str, path: Path, model: onnx.ModelProto, audio: np.ndarray) -> list[str]:
    """What is wrong with the form of one file: its size, its input and output, its operators."""
    wrong = []
    if path.stat().st_size >= LARGEST_FILE:
        wrong.append(f"{name}: {path.stat().st_size:,} bytes")
    if [value.name for value in (*model.graph.input, *model.graph.output)] != ["audio", "logits"]:
        wrong.append(f"{name}: the input must be `audio` and the output `logits`")
    shape = [d.dim_param or d.dim_value for d in model.graph.input[0].type.tensor_type.shape.dim]
    if shape != ["batch", *audio.shape[1:]]:
        wrong.append(f"{name}: input {shape}")
    if others := {node.op_type for node in model.graph.node} - OPERATORS:
        wrong.append(f"{name}: operators {sorted(others)}")
    onnx.checker.check_model(model, full_check=True)
    return wrong


def check_sharing(pair: str, models: dict[str, onnx.ModelProto]) -> list[str]:
    """What is wrong with the weights of a pair: one trunk in the shared pair, no equal tensor in the other."""
    first, second = (weights(models[task]) for task in TASKS)
    trunk = [name for name in first if name.startswith("trunk.")]
    equal = sum(first[name].tobytes() == second[name].tobytes() for name in trunk)
    if equal == (len(trunk) if pair == "shared" else 0):
        return []
    return [f"{pair}: {equal} of {len(trunk)} trunk tensors are bit-equal"]


def check(folder: Path) -> list[str]:
    """Print the table for the example in `folder` and return what is wrong with it."""
    wrong = []
    with np.load(folder / "evaluation.npz") as data:
        evaluation = {key: data[key] for key in ("audio", *TASKS)}
    audio = evaluation["audio"]
    with np.load(folder / "calibration.npz") as data:
        calibration = data["audio"]
    print(f"calibration: {calibration.shape} {calibration.dtype}")
    print(f"evaluation: {audio.shape} {audio.dtype}, {(evaluation['speaker'] >= 0).sum()} with a speaker")
    print("\n| network | bytes | parameters | MMAC | fp32 | inner channels -25 % | all channels -25 % |")
    print("|---|---|---|---|---|---|---|")
    operators: collections.Counter[str] = collections.Counter()
    for pair in PAIRS:
        models = {task: onnx.load(folder / pair / f"{task}.onnx") for task in TASKS}
        for task, model in models.items():
            name, path = f"{pair}/{task}", folder / pair / f"{task}.onnx"
            wrong += check_form(name, path, model, audio)
            full = accuracy(model, audio, evaluation[task])
            inner = accuracy(without_weakest(model, only_inner=True), audio, evaluation[task])
            every = accuracy(without_weakest(model, only_inner=False), audio, evaluation[task])
            if full < LEAST_ACCURACY:
                wrong.append(f"{name}: accuracy {full:.2%} < {LEAST_ACCURACY:.0%}")
            parameters = sum(value.size for value in weights(model).values())
            sizes = f"{path.stat().st_size:,} | {parameters:,} | {multiply_accumulates(model) / 1e6:.1f}"
            print(f"| {name} | {sizes} | {full:.2%} | {inner:.2%} | {every:.2%} |")
            operators = collections.Counter(node.op_type for node in model.graph.node)
        wrong += check_sharing(pair, models)
    print("\noperators of each: " + ", ".join(f"{count} {name}" for name, count in operators.items()))
    return wrong


def main() -> int:
    """Run the check from the command line."""
    parser = argparse.ArgumentParser(description="Check the files of the speech example.")
    parser.add_argument("folder", type=Path, nargs="?", default=Path("examples/speech"))
    wrong = check(parser.parse_args().folder)
    for line in wrong:
        print(f"wrong: {line}", file=sys.stderr)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
