"""Small networks whose channels can be put into another order by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import dataflow, ir, ops
from nnfuze_tvm.graph.dataflow import Emitter, Value
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.merge.merge_tasks import MergeTasks
from nnfuze_tvm.passes.merge.share_trunk import ShareTrunk

SIZE = (1, 3, 8, 8)
STREAM, INNER, SIDE, LAST = 8, 6, 4, 6
SHAPES = {
    "stem": (STREAM, 3, 3, 3),
    "depthwise": (STREAM, 1, 3, 3),
    "narrow": (INNER, STREAM, 1, 1),
    "wide": (STREAM, INNER, 3, 3),
    "side": (SIDE, STREAM, 1, 1),
    "join": (LAST, STREAM + SIDE, 3, 3),
}
NAMES = [*SHAPES, "head"]
Weights = dict[str, np.ndarray]


def weights(seed: int, classes: int = 5) -> Weights:
    """Return random weights and biases; the head's as ``[channels, classes]``."""
    rng = np.random.default_rng(seed)
    found: Weights = {}
    for name, shape in SHAPES.items():
        found[name] = rng.normal(0, np.prod(shape[1:]) ** -0.5, shape)
        found[f"{name}.bias"] = rng.normal(0, 0.2, shape[0])
    found["head"] = rng.normal(0, 1, (LAST, classes))
    return {name: value.astype("float32") for name, value in found.items()}


def shuffled(own: Weights, seed: int) -> Weights:
    """Return the weights of a network of the same function whose channels are in another order."""
    rng = np.random.default_rng(seed)
    stream, side, inner = (rng.permutation(n) for n in (STREAM, SIDE, INNER))
    every, last = np.concatenate([stream, STREAM + side]), rng.permutation(LAST)
    made = {"stem": stream, "depthwise": stream, "narrow": inner, "wide": stream, "side": side, "join": last}
    read = {"narrow": stream, "wide": inner, "side": stream, "join": every}
    new = {}
    for name, order in made.items():
        value = own[name][order]
        new[name], new[f"{name}.bias"] = value[:, read[name]] if name in read else value, own[f"{name}.bias"][order]
    return {**new, "head": own["head"][last]}


def noisy(own: Weights, noise: float) -> Weights:
    """Return weights with noise of a part of their size."""
    rng = np.random.default_rng(7)
    return {n: v + rng.normal(0, noise * v.std(), v.shape).astype("float32") for n, v in own.items()}


def network(task: str, own: Weights, image: str = "image") -> relax.Function:
    """Return a network with a skip, a depthwise convolution, a join, and a dense head."""
    emitter = Emitter()
    x = tvm.ir.Var(emitter.unique(image), relax.TensorType(SIZE, "float32"))

    def layer(value: Value, name: str, **how: int) -> Value:
        padding = own[name].shape[-1] // 2
        value = emitter.emit(op.nn.conv2d(value, relax.const(own[name]), padding=padding, **how), f"{task}/{name}")
        return emitter.emit(op.add(value, relax.const(own[f"{name}.bias"].reshape(1, -1, 1, 1))))

    stream = emitter.emit(op.nn.relu(layer(x, "stem", strides=2)))
    inner = emitter.emit(op.nn.relu(layer(stream, "depthwise", groups=STREAM)))
    inner = emitter.emit(op.nn.relu(layer(inner, "narrow")))
    stream = emitter.emit(op.nn.relu(emitter.emit(op.add(layer(inner, "wide"), stream))))
    side = layer(stream, "side")
    both = emitter.emit(op.concat([stream, side], 1))
    both = emitter.emit(op.nn.relu(layer(both, "join")))
    flat = emitter.emit(op.reshape(emitter.emit(op.mean(both, [2, 3])), (1, LAST)))
    return emitter.finish([x], [emitter.emit(op.matmul(flat, relax.const(own["head"])), f"{task}/head")])


def module(other_inputs: Sequence[str] = (), **tasks: Weights) -> tvm.IRModule:
    """Return a module with a network per task, some of which have an input of another name."""
    functions = {
        task: network(task, own, "sound" if task in other_inputs else "image").with_attr("global_symbol", task)
        for task, own in tasks.items()
    }
    mod = dataflow.with_functions(tvm.IRModule({}), functions)
    return ir.with_task_outputs(mod, [ir.TaskOutput(task, "scores") for task in tasks])


def images(count: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return samples."""
    return {"image": np.random.default_rng(seed).normal(size=(count, *SIZE[1:])).astype("float32")}


def merged(mod: tvm.IRModule) -> tvm.IRModule:
    """Return one function of all tasks."""
    return tvm.transform.Sequential([MergeTasks(), ShareTrunk()])(mod)


def layers(mod: tvm.IRModule) -> list[str]:
    """Return the names of the layers of ``main``."""
    return [b.var.name for b in dataflow.bindings(mod["main"]) if ops.is_layer(b.value)]


def answers(mod: tvm.IRModule, task: str) -> np.ndarray:
    """Return what a task's network says of a few other samples, ``[8, classes]``."""
    return np.concatenate([evaluate(mod[task], {"image": each[None]})[0] for each in images(8, 9)["image"]])
