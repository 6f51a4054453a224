"""Layers with fewer numbers beside the dense ones that they replace: low rank, butterflies, block sparsity.

All of one layer in one process, one thread, in turns, processor time. A ReLU follows; int8 data are quantized before.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

import numpy as np
import onnx
import tvm
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from benchmarks.arguments import at_least, output_console, parser_of
from benchmarks.interleaved import interleaved
from benchmarks.layers import ours
from nnfuze_tvm.passes import BlockSparse, Butterfly, InsertQDQ, LowRank
from nnfuze_tvm.passes.compress.policy import Policy

# By name: what the layer takes, and its weights.
LAYERS = {
    "dense 1024×1024": ((1, 1024), (1024, 1024)),
    "1×1 256→256, 14×14": ((1, 256, 14, 14), (256, 256, 1, 1)),
    "3×3 256→256, 8×8": ((1, 256, 8, 8), (256, 256, 3, 3)),
}
FORMS: dict[str, Callable[[dict[str, np.ndarray]], list[tvm.transform.Pass]]] = {
    "dense": lambda _: [],
    "rank 1/4": lambda samples: [LowRank(Policy.uniform(rank=0.25), samples)],
    "butterfly 1/4": lambda samples: [Butterfly(Policy.uniform(butterfly=0.25), samples)],
    "sparsity 3/4": lambda samples: [BlockSparse(Policy.uniform(sparsity=0.75), samples)],
}


def network(data: tuple[int, ...], weights: tuple[int, ...]) -> onnx.ModelProto:
    """Return a layer of random weights and a ReLU."""
    values = np.random.default_rng(0).standard_normal(weights).astype("float32") / math.sqrt(math.prod(weights[1:]))
    dense = len(weights) == 2
    padding = {} if dense else {"pads": [weights[2] // 2] * 4}
    layer = helper.make_node("MatMul" if dense else "Conv", ["x", "w"], ["c"], **padding)
    graph = helper.make_graph(
        [layer, helper.make_node("Relu", ["c"], ["y"])],
        "layer",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, data)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(values, "w")],
    )
    return onnx.shape_inference.infer_shapes(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    )


def measure(name: str, precision: str, rounds: int) -> dict[str, float]:
    """Return medians in seconds by form; a form that is the dense one is left out."""
    data, weights = LAYERS[name]
    model = network(data, weights)
    samples = {"x": np.random.default_rng(1).standard_normal((16, *data[1:])).astype("float32")}
    calls: dict[str, Callable[[], object]] = {}
    for form, passes in FORMS.items():
        if form.startswith("butterfly") and math.prod(weights[2:]) > 1:
            continue
        last = [InsertQDQ(samples, Policy.uniform(bits=8))] if precision == "int8" else []
        runner = ours(model, *passes(samples), *last)
        feeds = {"x": samples["x"][:1]}
        calls[form] = lambda runner=runner, feeds=feeds: runner.run(feeds)
    times = interleaved(calls, rounds=rounds, min_seconds=1.0, clock=time.process_time)
    return {form: timing.median for form, timing in times.items()}


def main() -> None:
    """Measure and print a table."""
    parser = parser_of("python -m benchmarks.fewer_numbers", __doc__)
    parser.add_argument("--rounds", type=at_least(1), default=50, help="samples of each, at least")
    arguments = parser.parse_args()
    table = Table(title="microseconds and parts of the dense layer's, one thread, median")
    for heading in ("layer", "precision", *FORMS):
        table.add_column(heading, justify="left" if heading == "layer" else "right")
    for name in LAYERS:
        for precision in ("fp32", "int8"):
            times = measure(name, precision, arguments.rounds)
            cells = [
                f"{times[form] * 1e6:.1f}, {times[form] / times['dense']:.2f}×" if form in times else "–"
                for form in FORMS
            ]
            table.add_row(name, precision, *cells)
    output_console().print(table)


if __name__ == "__main__":
    main()
