"""Sums of two layers: 8 bits where something reads them as such, floats where nothing does."""

from __future__ import annotations

import numpy as np
import pytest
import tvm
from tvm import relax
from tvm.relax import op

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter, bindings, op_name
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy

FLOATS = {
    "nothing": lambda value, matrix: value,
    "a gate": lambda value, matrix: op.sigmoid(op.strided_slice(value, [1], [0], [8])),
    "a bound": lambda value, matrix: op.tanh(op.nn.relu(value)),
    "a sum like it": lambda value, matrix: op.add(value, op.nn.relu(value)),
}
CODES = {
    "a layer": lambda value, matrix: op.matmul(value, matrix),
    "a layer behind a bound": lambda value, matrix: op.matmul(op.nn.relu(value), matrix),
}


def network(reader):
    """Return a module of two layers whose results are added and read, and its inputs."""
    rng, emitter = np.random.default_rng(0), Emitter()
    params = [tvm.ir.Var(name, relax.TensorType((1, 16), "float32")) for name in "xy"]
    weights = [relax.const(rng.standard_normal((16, 16)).astype("float32")) for _ in range(3)]
    sums = [emitter.emit(op.matmul(param, own), f"t/{param.name}") for param, own in zip(params, weights, strict=False)]
    total = emitter.emit(op.add(*sums), "t/total")
    result = emitter.emit(reader(total, weights[2]), "t/result")
    main = emitter.finish(params, [result]).with_attr("global_symbol", "main")
    mod = ir.with_task_outputs(tvm.IRModule({"main": main}), [ir.TaskOutput("t", "out")])
    return mod, {name: rng.standard_normal((1, 16)).astype("float32") for name in "xy"}


@pytest.mark.parametrize(("reader", "points"), [*((each, 2) for each in FLOATS), *((each, 4) for each in CODES)])
def test_sums_are_rounded_for_what_reads_codes_only(reader, points):
    mod, inputs = network((FLOATS | CODES)[reader])
    quantized = InsertQDQ(inputs, Policy.uniform(bits=8))(mod)
    assert sum(op_name(b.value) == "quantize" for b in bindings(quantized["main"])) == points
    (want,), (got,) = (evaluate(each["main"], inputs) for each in (mod, quantized))
    assert np.abs(got - want).max() <= 0.05 * np.ptp(want)
