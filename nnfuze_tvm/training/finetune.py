"""Teach a compressed network the answers that the original gives, with the compression in the loop."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.folding import settled
from nnfuze_tvm.passes.compress.method import Training
from nnfuze_tvm.reading import memory
from nnfuze_tvm.training.distill import Progress, Samples, Schedule, answers, distance, distill, held_back
from nnfuze_tvm.training.network import Network, torch

Parameters = Mapping[str, np.ndarray]
"""What was learnt, by the parameters' names in `Network`."""

# Where a network learns nothing better, steps were too large: it tries once more with smaller ones.
_RATES = (1.0, 0.1)
# Bytes of tensors, and samples at most, that are computed at once.
_ROOM, _AT_ONCE = 1 << 30, 256


def finetune(
    mod: tvm.IRModule,
    original: tvm.IRModule,
    samples: Samples,
    schedule: Schedule,
    training: Training | None = None,
    labels: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
) -> tvm.IRModule:
    """Return a compressed network, trained to answer as the original does.

    Parameters
    ----------
    mod, original : tvm.IRModule
        Before and behind the compression, each with ``main`` and the same inputs and outputs.
    samples : mapping
        What to learn from: by input name ``[N, *shape]``.
    schedule : Schedule
        How long and how fast.
    training : Training, optional
        How the network looks in training: that of its last method of compression.
    labels : mapping, optional
        Right classes ``[N, …]`` by task, one for each row of scores, -1 where there is none. Without, the
        original is the only teacher.
    progress : callable, optional
        Is told of each step.

    Raises
    ------
    NNFuzeError
        If the network can't be trained.
    """
    training = Training() if training is None else training
    return with_parameters(mod, learn(mod, original, samples, schedule, training, labels, progress), training)


def learn(
    mod: tvm.IRModule,
    original: tvm.IRModule,
    samples: Samples,
    schedule: Schedule,
    training: Training,
    labels: Mapping[str, np.ndarray] | None = None,
    progress: Progress | None = None,
) -> Parameters:
    """Return what `finetune` learns; where that answers worse than before, on samples held back, what there was."""
    student, teacher = Network(training.form(mod["main"])), Network(original["main"])
    before = _parameters(student)
    if not before:
        raise NNFuzeError("fine-tuning: the network has no weights in floating point to train")
    count = len(next(iter(samples.values())))
    most = _most_at_once(mod, original, count)
    learnt, held = held_back(count, seed=schedule.seed)
    given, judged = ({name: values[own] for name, values in samples.items()} for own in (learnt, held))
    classes = _by_place(mod, labels or {})
    taught, known = ({place: values[own] for place, values in classes.items()} for own in (learnt, held))
    wanted, right = (answers(teacher, shown, most) for shown in (given, judged))
    error = distance(answers(student, judged, most), right, known)
    for rate in _RATES:
        own = replace(schedule, rate=schedule.rate * rate, batch=min(schedule.batch, most))
        distill(student, given, wanted, own, progress, taught)
        # Nothing is better that isn't finite.
        if distance(answers(student, judged, most), right, known) < error:
            return _parameters(student)
        _take(student, before)
    return before


def _most_at_once(mod: tvm.IRModule, original: tvm.IRModule, count: int) -> int:
    """Return of how many samples all that the networks compute is held at once.

    Raises
    ------
    NNFuzeError
        If not even one fits, or their answers don't.
    """
    each = max(_bytes([binding.var for binding in dataflow.bindings(one["main"])]) for one in (mod, original))
    told = _bytes(dataflow.output_fields(original["main"]))
    if reason := memory.too_large(2 * each + count * told):
        raise NNFuzeError(f"fine-tuning on {count} samples {reason}; give fewer")
    return max(1, min(_AT_ONCE, _ROOM // max(each, 1)))


def _bytes(values: Sequence[dataflow.Value]) -> int:
    tensors = [value for value in values if isinstance(value.ty, relax.TensorType)]
    return sum(4 * math.prod(ir.static_shape(value)) for value in tensors)


def _by_place(mod: tvm.IRModule, labels: Mapping[str, np.ndarray]) -> dict[int, np.ndarray]:
    """Return labels by task by the place of the task's first output."""
    places: dict[str, int] = {}
    for place, output in enumerate(ir.task_outputs(mod)):
        places.setdefault(output.task, place)
    return {places[task]: values.astype("int64") for task, values in labels.items()}


def with_parameters(mod: tvm.IRModule, parameters: Parameters, training: Training) -> tvm.IRModule:
    """Return a network with what was learnt.

    Parameters
    ----------
    mod : tvm.IRModule
        The compressed network, as it was given to `learn`.
    parameters : mapping
        What that returned.
    training : Training
        How the network looks in training.

    Raises
    ------
    ValueError
        If they aren't of this network.
    """
    student = Network(training.form(mod["main"]))
    own = dict(student.named_parameters())
    if own.keys() != parameters.keys() or any(own[n].shape != parameters[n].shape for n in own):
        raise ValueError("parameters of another network")
    if all(np.array_equal(values, parameters[name]) for name, values in _parameters(student).items()):
        return mod
    _take(student, parameters)
    return dataflow.with_main(mod, settled(student.trained()))


def _take(network: Network, parameters: Parameters) -> None:
    with torch.no_grad():
        for name, values in network.named_parameters():
            values.copy_(torch.from_numpy(parameters[name]))


def _parameters(network: Network) -> dict[str, np.ndarray]:
    return {name: values.detach().numpy().copy() for name, values in network.named_parameters()}
