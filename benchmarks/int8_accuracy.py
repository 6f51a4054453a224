"""How far int8 is from float32 on networks that people ship, beside ONNX Runtime's static quantizer.

    python -m benchmarks.int8_accuracy --networks orientation,mtcnn-p

Both get the same samples; ONNX Runtime's quantizer writes QDQ with scales per channel. Ours is what `InsertQDQ` makes,
computed with NumPy. An error is the root mean square of the differences from ONNX Runtime's answers in float32, as a
part of the standard deviation of the output; of several outputs the worst counts. It is that on samples which neither
has seen, the more the smaller a network is: where an output is one number, those on a few samples say nothing.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from rich.table import Table

from benchmarks.arguments import names, output_console, parser_of
from benchmarks.engines import onnxruntime
from benchmarks.workloads import Workload
from benchmarks.zoo_files import cache_dir, judged, merged, workload
from benchmarks.zoo_networks import NETWORKS
from nnfuze_tvm.graph import evaluate
from nnfuze_tvm.passes import pipeline
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.compress.insert_qdq import METHOD
from nnfuze_tvm.passes.compress.magnitudes import CALIBRATION_METHODS
from nnfuze_tvm.passes.compress.method import Inputs
from nnfuze_tvm.passes.compress.policy import Policy

_FLOATS = tuple(name for name, shipped in NETWORKS.items() if not shipped.quantized)


def error(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the largest relative root mean square of the differences between outputs ``[N, ...]``."""
    found = [
        float(np.sqrt(np.mean(np.square(answer.astype("float64") - right))) / (float(right.std()) or 1.0))
        for answer, right in zip(answers, exact, strict=True)
    ]
    return max(found)


def ours(work: Workload, mod: tvm.IRModule, method: str) -> list[np.ndarray]:
    """Return the outputs of one network in our int8, ``[N, ...]``."""
    calibration = load_calibration(work.calibration[0], mod)
    inputs = Inputs(Policy.uniform(bits=8), calibration, {"calibration_method": method})
    run = evaluate.executor(pipeline.compression_phase(METHOD, inputs)(mod))
    rows = [run(feeds[0]) for feeds in work.evaluation]
    return [np.stack(values) for values in zip(*rows, strict=True)]


def theirs(work: Workload) -> list[np.ndarray]:
    """Return the outputs of one network in ONNX Runtime's int8."""
    return onnxruntime.sessions([onnxruntime.quantized(work, 0, "QDQ")], 1).answers(work.evaluation)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; return the exit code."""
    args = _parse(arguments)
    table = Table("network", *args.methods, "ONNX Runtime")
    for name in args.networks:
        print(name, file=sys.stderr, flush=True)
        work = workload(name, NETWORKS[name], args.work_dir, cache_dir())
        mod = merged(work)
        work = judged(work, NETWORKS[name], mod)
        exact = onnxruntime.reference(work)
        cells = [f"{error(ours(work, mod, method), exact):.1%}" for method in args.methods]
        try:
            cells.append(f"{error(theirs(work), exact):.1%}")
        except Exception as reason:  # what its quantizer raises has no common type
            cells.append(f"{type(reason).__name__}")
        table.add_row(name, *cells)
    output_console().print(table)
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = parser_of("benchmarks.int8_accuracy", __doc__)
    parser.add_argument("--networks", type=names(_FLOATS), default=list(_FLOATS), metavar="A,B,…")
    parser.add_argument(
        "--methods",
        type=names(CALIBRATION_METHODS),
        default=["minmax"],
        metavar="M,…",
        help="ways from samples to ranges",
    )
    parser.add_argument("--work-dir", type=Path, default=Path("build/zoo"), metavar="DIR", help="default: build/zoo")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
