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
from nnfuze_tvm.training.course import Schedule
from nnfuze_tvm.training.distill import Progress, answers, distill, held_back
from nnfuze_tvm.training.lessons import Samples, number
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
        Right classes ``[N, …]`` by task, one for each row of scores of its first output, -1 where there is none: where
        the original's greatest score is another class's, the two change places (Wen et al., 2019).
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
    student, teacher = Network(_in_numbers(training.form(mod["main"]))), Network(_in_numbers(original["main"]))
    before = _parameters(student)
    if not before:
        raise NNFuzeError("fine-tuning: the network has no weights in floating point to train")
    count = number(samples)
    most = _most_at_once(mod, original, count)
    learnt, held = held_back(count, seed=schedule.seed)
    given, judged = ({name: values[own] for name, values in samples.items()} for own in (learnt, held))
    wanted, right = (
        _corrected(mod, answers(teacher, shown, most), {task: values[own] for task, values in (labels or {}).items()})
        for shown, own in ((given, learnt), (judged, held))
    )
    error = _error(answers(student, judged, most), right)
    for rate in _RATES:
        paced = replace(schedule, rate=schedule.rate * rate, batch=min(schedule.batch, most))
        distill(student, given, wanted, paced, progress)
        # Nothing is better that isn't finite.
        if _error(answers(student, judged, most), right) < error:
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


def _in_numbers(func: relax.Function) -> relax.Function:
    """Return a function with the outputs that are floats, under the same names: others teach nothing."""
    emitter, values = dataflow.Emitter(), dict[dataflow.Value, dataflow.Value]()
    emitter.copy(dataflow.bindings(func), values)
    fields = [values.get(field, field) for field in dataflow.output_fields(func) if _is_float(field)]
    return emitter.finish(func.params, fields, func.attrs)


def _is_float(value: dataflow.Value) -> bool:
    return isinstance(value.ty, relax.TensorType) and str(value.ty.dtype).startswith("float")


def _corrected(mod: tvm.IRModule, wanted: Sequence[np.ndarray], labels: Mapping[str, np.ndarray]) -> list[np.ndarray]:
    """Return answers with the greatest score where the right class is, in the first outputs of tasks with labels."""
    result = list(wanted)
    fields = zip(ir.task_outputs(mod), dataflow.output_fields(mod["main"]), strict=True)
    tasks = [output.task for output, field in fields if _is_float(field)]
    for task, classes in labels.items():
        scores = result[tasks.index(task)].copy()
        rows, right = scores.reshape(-1, scores.shape[-1]), classes.ravel()
        (known,) = np.nonzero(right >= 0)
        places = known, right[known], rows[known].argmax(1)
        own, greatest = rows[places[0], places[1]], rows[places[0], places[2]]
        rows[places[0], places[2]], rows[places[0], places[1]] = own, greatest
        result[tasks.index(task)] = rows.reshape(scores.shape)
    return result


def _error(got: Sequence[np.ndarray], wanted: Sequence[np.ndarray]) -> float:
    """Return the mean square of the differences of answers, relative to how much those vary that are wanted."""
    pairs = zip(got, wanted, strict=True)
    return float(sum(np.square(own - right).mean() / (right.var(0).mean() or 1.0) for own, right in pairs))


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
    form = training.form(mod["main"])
    student, wanted = Network(form), _parameters(Network(_in_numbers(form)))
    if wanted.keys() != parameters.keys() or any(wanted[n].shape != parameters[n].shape for n in wanted):
        raise ValueError("parameters of another network")
    if all(np.array_equal(values, parameters[name]) for name, values in wanted.items()):
        return mod
    _take(student, parameters)
    return dataflow.with_main(mod, settled(student.trained()))


def _take(network: Network, parameters: Parameters) -> None:
    with torch.no_grad():
        own = dict(network.named_parameters())
        for name, values in parameters.items():
            own[name].copy_(torch.from_numpy(values))


def _parameters(network: Network) -> dict[str, np.ndarray]:
    return {name: values.detach().numpy().copy() for name, values in network.named_parameters()}
