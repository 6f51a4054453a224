"""Running a float graph on this machine: with NumPy for few inferences, compiled for many."""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call

from nnfuze_tvm.devices import targets
from nnfuze_tvm.graph import evaluate, ops
from nnfuze_tvm.graph.dataflow import Value, bindings
from nnfuze_tvm.graph.evaluate import Run
from nnfuze_tvm.graph.ir import static_shape

# What a network and a layer take to compile, and NumPy for an operator, for a multiply-accumulate of a matrix product
# and for a number that it writes; in seconds, from networks of 0.3 to 600 million multiply-accumulates.
# A layer takes up to four times as long; so does NumPy on a busy machine, where its threads wait for each other.
_BUILD, _LAYER, _CALL, _MAC, _NUMBER = 0.1, 0.05, 2e-4, 1e-10, 2e-9
# NumPy keeps all values of an inference.
_MOST_NUMBERS = 1 << 26


def calibration_executor(mod: tvm.IRModule, inferences: int) -> Run:
    """Make ``mod`` ready for so many inferences in the least time; see `graph.evaluate.Executor`."""
    values = [binding.value for binding in bindings(mod["main"])]
    each = list(map(_seconds, values))
    build = _BUILD + _LAYER * sum(map(ops.is_layer, values))
    quick = None not in each and sum(map(_numbers, values)) <= _MOST_NUMBERS
    if quick and inferences * sum(seconds or 0.0 for seconds in each) <= build:
        return evaluate.executor(mod)
    return host_executor(mod)


def _seconds(value: Value) -> float | None:
    """Return what NumPy takes for a value; None for what it has no form of, or a loop of many steps."""
    if not isinstance(value, Call):
        return 0.0
    operator = ops.of(value)
    if operator is None or operator.evaluate is None or operator.recurs is not None:
        return None
    macs, layer = ops.macs(value), ops.layer(value)
    seen = 0
    if layer is not None:
        shape = static_shape(value.args[1])
        # What a matrix product reads is written window by window before.
        seen = macs * layer.filters.groups // shape[layer.filters.outer]
    return _CALL + _MAC * macs + _NUMBER * (_numbers(value) + seen)


def _numbers(value: Value) -> int:
    types = value.ty.fields if isinstance(value.ty, relax.TupleType) else [value.ty]
    return sum(prod(int(dim) for dim in ty.shape.values) for ty in types if isinstance(ty, relax.TensorType))


def host_executor(mod: tvm.IRModule, inferences: int = 0) -> Run:
    """Build ``mod`` for this machine with the package's own schedules, for however many inferences."""
    from nnfuze_tvm.deploy import build  # with all schedules: most calibrations do without

    machine = relax.VirtualMachine(build.build_quickly(mod, targets.resolve("host")), tvm.cpu())
    names = [param.name for param in mod["main"].params]

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = machine["main"](*(tvm.runtime.tensor(np.asarray(inputs[name], order="C")) for name in names))
        return [output.numpy() for output in outputs]

    return run
