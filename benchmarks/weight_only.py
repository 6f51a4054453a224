"""Dense layers with weights of few bits and float data: against our own float32, and ONNX Runtime's `MatMulNBits`.

Both get the same weights; ONNX Runtime at accuracy level 0, where data stay float32. One thread each, in turns in one
process, processor time.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper
from rich.table import Table

from benchmarks.arguments import at_least, output_console, parser_of
from benchmarks.interleaved import interleaved
from benchmarks.layers import onnx_runtime, ours


def networks(size: int, rows: int, bits: int, block: int) -> tuple[onnx.ModelProto, onnx.ModelProto]:
    """Return a square dense layer with packed weights, and the same layer with float32 ones."""
    rng = np.random.default_rng(0)
    packed = rng.integers(0, 256, (size, size // block, block * bits // 8)).astype("uint8")
    scales = rng.uniform(0.01, 0.03, (size, size // block)).astype("float32")
    codes = (packed[..., None] >> np.arange(0, 8, bits, dtype="uint8") & (2**bits - 1)).reshape(size, -1)
    real = (codes.astype("float32") - 2 ** (bits - 1)) * np.repeat(scales, block, 1)
    few = helper.make_node(
        "MatMulNBits", ["x", "w", "s"], ["y"], domain="com.microsoft", K=size, N=size, bits=bits, block_size=block
    )
    return (
        _network(few, size, rows, {"w": packed, "s": scales}),
        _network(helper.make_node("MatMul", ["x", "w"], ["y"]), size, rows, {"w": np.ascontiguousarray(real.T)}),
    )


def _network(node: onnx.NodeProto, size: int, rows: int, weights: dict[str, np.ndarray]) -> onnx.ModelProto:
    data, result = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [rows, size]) for name in "xy")
    held = [numpy_helper.from_array(value, name) for name, value in weights.items()]
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    graph = helper.make_graph([node], "layer", [data], [result], held)
    return helper.make_model(graph, opset_imports=opsets, ir_version=10)


def measure(size: int, rows: int, bits: int, block: int, rounds: int) -> tuple[dict[str, float], float]:
    """Return medians in seconds, and the largest difference to ONNX Runtime as a part of the range."""
    packed, whole = networks(size, rows, bits, block)
    few, full, session = ours(packed), ours(whole), onnx_runtime(packed)
    feeds = {"x": np.random.default_rng(1).standard_normal((rows, size)).astype("float32")}
    (mine,), (theirs,) = few.run(feeds).values(), session(feeds)
    calls: dict[str, Callable[[], object]] = {
        "ours": lambda: few.run(feeds),
        "float32": lambda: full.run(feeds),
        "theirs": lambda: session(feeds),
    }
    times = interleaved(calls, rounds=rounds, min_seconds=1.0, clock=time.process_time)
    error = float(np.abs(np.asarray(mine) - theirs).max() / np.ptp(theirs))
    return {name: timing.median for name, timing in times.items()}, error


def main() -> None:
    """Measure and print a table."""
    parser = parser_of("python -m benchmarks.weight_only", __doc__)
    parser.add_argument("--size", type=at_least(256), default=4096, help="inputs and outputs, a multiple of 256")
    parser.add_argument("--rows", type=at_least(1), nargs="+", default=[1, 8], help="rows of data at once")
    blocks = (16, 32, 64, 128, 256)
    parser.add_argument("--blocks", type=int, nargs="+", choices=blocks, default=[32, 64, 128], help="inputs per scale")
    parser.add_argument("--rounds", type=at_least(1), default=50, help="samples of each, at least")
    arguments = parser.parse_args()
    if arguments.size % blocks[-1]:
        parser.error(f"--size {arguments.size}: give a multiple of {blocks[-1]}")
    table = Table(title=f"dense {arguments.size}×{arguments.size}, one thread, median")
    for heading in ("rows", "bits", "block", "nnfuze", "float32", "ratio", "MatMulNBits", "ratio", "difference"):
        table.add_column(heading, justify="right")
    for rows in arguments.rows:
        for bits, block in [*((4, block) for block in arguments.blocks), (8, arguments.blocks[-1])]:
            times, error = measure(arguments.size, rows, bits, block, arguments.rounds)
            mine, full, theirs = (times[name] for name in ("ours", "float32", "theirs"))
            figures = [f"{mine * 1e3:.2f} ms"]
            for other in (full, theirs):
                figures += [f"{other * 1e3:.2f} ms", f"{other / mine:.2f}×"]
            table.add_row(str(rows), str(bits), str(block), *figures, f"{error:.1e}")
    output_console().print(table)


if __name__ == "__main__":
    main()
