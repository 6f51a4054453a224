"""The examples of operators as modules with data."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.graph import ir, ops
from nnfuze_tvm.graph.dataflow import Emitter, Value
from nnfuze_tvm.graph.ops.operator import Example

Wrap = Callable[[Emitter, Value], Value]


def module(example: Example) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Return a module whose ``main`` makes one call, and data for its parameters."""
    return calls({"task/call": example})


def examples(family: str) -> dict[str, Example]:
    """Return the examples of a family as layers: ``task/<operator>-<n>``."""
    return {
        f"task/{name}-{n}": example
        for name, operator in ops.OPERATORS.items()
        if operator.family == family
        for n, example in enumerate(operator.examples)
    }


def calls(
    named: Mapping[str, Example], before: Wrap | None = None, after: Wrap | None = None
) -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Return a module whose ``main`` makes calls that have nothing in common, and data for its parameters.

    Parameters
    ----------
    named : mapping of str to Example
        The calls, by the name of the Var of their result.
    before, after : callable, optional
        What is emitted between a parameter and its call, and behind a call that returns one tensor.
    """
    rng = np.random.default_rng(0)
    emitter, params, outputs, owners, data = Emitter(), [], [], [], {}
    for name, example in named.items():
        values = [rng.uniform(example.low, example.high, shape).astype("float32") for shape in example.shapes]
        free = len(values) - example.constants
        operands = []
        for value in values[:free]:
            param = tvm.ir.Var(emitter.unique(f"x{len(params)}"), relax.TensorType(value.shape, "float32"))
            params.append(param)
            data[param.name] = value
            operands.append(param if before is None else before(emitter, param))
        result = emitter.emit(example.call(*operands, *(relax.const(value) for value in values[free:])), name)
        fields = [result]
        if isinstance(result.ty, relax.TupleType):
            fields = [emitter.emit(relax.TupleGetItem(result, n)) for n in range(len(result.ty.fields))]
        elif after is not None:
            fields = [after(emitter, result)]
        outputs += fields
        owners += [ir.TaskOutput("task", f"{name}:{n}") for n in range(len(fields))]
    main = emitter.finish(params, outputs).with_attr("global_symbol", "main")
    return ir.with_task_outputs(tvm.IRModule({"main": main}), owners), data
