"""The examples of operators as modules with data."""

from __future__ import annotations

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.graph.ops.operator import Example


def module(example: Example, seed: int = 0, name: str = "x") -> tuple[tvm.IRModule, dict[str, np.ndarray]]:
    """Return a module whose ``main`` makes one call, and data for its parameters.

    The Var of the call's result is named ``task/<name>``, as a layer of that name would be.
    """
    rng = np.random.default_rng(seed)
    values = [rng.uniform(example.low, example.high, shape).astype("float32") for shape in example.shapes]
    free = len(values) - example.constants
    params = [relax.Var(f"x{n}", relax.TensorType(shape, "float32")) for n, shape in enumerate(example.shapes[:free])]
    operands = [*params, *(relax.const(value) for value in values[free:])]
    builder = relax.BlockBuilder()
    with builder.function("main", params):
        with builder.dataflow():
            result = builder.emit(example.call(*operands))
            fields = [result]
            if isinstance(result.ty, relax.TupleType):
                fields = [builder.emit(relax.TupleGetItem(result, n)) for n in range(len(result.ty.fields))]
            returned = builder.emit_output(relax.Tuple(fields))
        builder.emit_func_output(returned)
    return builder.get(), {param.name: value for param, value in zip(params, values, strict=False)}
