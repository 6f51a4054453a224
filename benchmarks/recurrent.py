"""Recurrent layers against ONNX Runtime: one layer at a time, one thread each, in turns in one process.

Both get the same ONNX network of one node; ours also runs in 8 bits, calibrated on other random inputs. A layer of one
step is as streaming networks have it: its states are inputs and outputs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from time import process_time
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from benchmarks.arguments import at_least, names, output_console
from benchmarks.interleaved import interleaved
from benchmarks.layers import onnx_runtime, ours
from nnfuze_tvm.passes.compress.insert_qdq import InsertQDQ
from nnfuze_tvm.passes.compress.policy import Policy

_GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


@dataclass(frozen=True)
class Layer:
    """One layer: its operator, steps, inputs and hidden units, sequences, and its node's other attributes."""

    operator: str
    steps: int
    inputs: int
    units: int
    batch: int = 1
    attributes: dict[str, Any] = field(default_factory=dict)

    @property
    def directions(self) -> int:
        """How many directions it has."""
        return 2 if self.attributes.get("direction") == "bidirectional" else 1

    @property
    def states(self) -> tuple[str, ...]:
        """The states that are inputs and outputs of its network."""
        if self.steps > 1:
            return ()
        return ("h", "c") if self.operator == "LSTM" else ("h",)


LAYERS = (
    Layer("LSTM", 64, 64, 128),
    Layer("LSTM", 32, 128, 256),
    Layer("LSTM", 50, 64, 64, attributes={"direction": "bidirectional"}),
    Layer("LSTM", 32, 64, 64, batch=4),
    Layer("LSTM", 1, 128, 128),
    Layer("LSTM", 1, 64, 64),
    Layer("GRU", 100, 64, 64),
    Layer("GRU", 100, 64, 64, attributes={"linear_before_reset": 1}),
    Layer("GRU", 1, 64, 64, attributes={"linear_before_reset": 1}),
    Layer("RNN", 64, 64, 64),
)


def network(layer: Layer) -> onnx.ModelProto:
    """Return the network of one layer with random weights."""
    rng = np.random.default_rng(0)
    rows, count = _GATES[layer.operator] * layer.units, layer.directions
    shapes = {"w": (count, rows, layer.inputs), "r": (count, rows, layer.units), "b": (count, 2 * rows)}
    constants = {
        name: (rng.uniform(-1, 1, shape) / np.sqrt(layer.units)).astype("float32") for name, shape in shapes.items()
    }
    node = helper.make_node(
        layer.operator,
        ["x", *shapes, *([""] if layer.states else []), *layer.states],
        [*(["y"] if not layer.states else [""]), *(f"{state}_new" for state in layer.states)],
        hidden_size=layer.units,
        **layer.attributes,
    )

    def value(name: str, shape: tuple[int, ...] | None) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    state = (count, layer.batch, layer.units)
    graph = helper.make_graph(
        [node],
        "layer",
        [value("x", (layer.steps, layer.batch, layer.inputs)), *(value(name, state) for name in layer.states)],
        [value(name, None) for name in node.output if name],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 14)], ir_version=8)
    return onnx.shape_inference.infer_shapes(model)


def data(model: onnx.ModelProto, seed: int = 1) -> dict[str, np.ndarray]:
    """Return random inputs of a network."""
    rng = np.random.default_rng(seed)
    shapes = {value.name: [dim.dim_value for dim in value.type.tensor_type.shape.dim] for value in model.graph.input}
    return {name: rng.standard_normal(shape).astype("float32") for name, shape in shapes.items()}


def outputs(results: dict[str, Any]) -> list[np.ndarray]:
    """Return the outputs of a network of one task in order."""
    (only,) = results.values()
    return [np.asarray(each) for each in (only.values() if isinstance(only, dict) else [only])]


def in_8_bits(model: onnx.ModelProto) -> InsertQDQ:
    """Return the pass that quantizes a network, calibrated on random inputs."""
    samples = [data(model, seed) for seed in range(2, 10)]
    return InsertQDQ(
        {name: np.concatenate([each[name] for each in samples]) for name in samples[0]}, Policy.uniform(bits=8)
    )


def measure(layer: Layer, rounds: int) -> tuple[dict[str, float], list[float]]:
    """Return the medians of all in seconds, and the largest differences from ONNX Runtime as parts of the range."""
    model = network(layer)
    session, feeds = onnx_runtime(model), data(model)
    theirs = session(feeds)
    runners = {"fp32": ours(model), "int8": ours(model, in_8_bits(model))}
    calls: dict[str, Callable[[], object]] = {name: partial(runner.run, feeds) for name, runner in runners.items()}
    errors = []
    for runner in runners.values():
        pairs = zip(outputs(runner.run(feeds)), theirs, strict=True)
        errors.append(max(float(np.abs(mine - other).max() / np.ptp(other)) for mine, other in pairs))
    times = interleaved(calls | {"theirs": lambda: session(feeds)}, rounds=rounds, min_seconds=1.0, clock=process_time)
    return {name: timing.median for name, timing in times.items()}, errors


def main() -> None:
    """Measure and print a table."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.recurrent", description=__doc__)
    parser.add_argument("--operators", type=names(tuple(_GATES)), default=list(_GATES), help="which operators")
    parser.add_argument("--rounds", type=at_least(1), default=100, help="samples of each, at least")
    arguments = parser.parse_args()
    table = Table(title="one recurrent layer, one thread, median of the processor's time")
    own = ("nnfuze", "int8", "ONNX Runtime", "ratio", "int8 ratio", "difference", "int8 difference")
    for heading in ("layer", "steps", "inputs", "units", "batch", *own):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for layer in LAYERS:
        if layer.operator not in arguments.operators:
            continue
        times, errors = measure(layer, arguments.rounds)
        kind = " ".join([layer.operator, *(f"{name}={value}" for name, value in layer.attributes.items())])
        sizes = map(str, (layer.steps, layer.inputs, layer.units, layer.batch))
        figures = [f"{seconds * 1e6:.0f} µs" for seconds in times.values()]
        figures += [f"{times['theirs'] / times[name]:.2f}×" for name in ("fp32", "int8")]
        table.add_row(kind, *sizes, *figures, *(f"{error:.1e}" for error in errors))
    output_console().print(table)


if __name__ == "__main__":
    main()
