"""The two shipped pairs of networks, merged and quantized without tuning, beside two ONNX Runtime sessions.

The independent pair also with the trunk that it learnt to share. All stages of a pair and both sessions are measured
in one process, in turns, one thread each, median of many; ratios are to ONNX Runtime in float32. Run it on a quiet
machine: ``python -m benchmarks.speech_pairs``.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from pathlib import Path

from rich.console import Console
from rich.table import Table

import nnfuze_tvm
from nnfuze_tvm.report import Report

SPEECH = Path(__file__).parent.parent / "examples" / "speech"
TASKS = ("keyword", "speaker")
PAIRS = (("shared", None), ("independent", None), ("independent", "merged"))


def measure(pair: str, trunk: str | None, prune: float | None) -> Report:
    """Return the report of compiling one pair (``shared`` or ``independent``) to int8, perhaps with a learnt trunk."""
    with tempfile.TemporaryDirectory() as scratch:
        return nnfuze_tvm.compile(
            [str(SPEECH / pair / f"{task}.onnx") for task in TASKS],
            Path(scratch) / "bundle",
            calibration=str(SPEECH / "calibration.npz"),
            evaluation=str(SPEECH / "evaluation.npz"),
            quantize="int8",
            prune=prune,
            merge=trunk and str(SPEECH / trunk),
        )


def rows(pair: str, report: Report) -> list[dict]:
    """Return one row per stage, with ratios to the reference."""
    reference = report.stages[0]
    assert reference.reference and reference.latency and reference.bytes, "needs onnxruntime"
    return [
        {
            "pair": pair,
            "stage": stage.name,
            "latency_us": stage.latency * 1e6,
            "latency_ratio": stage.latency / reference.latency,
            "bytes": stage.bytes,
            "bytes_ratio": stage.bytes / reference.bytes,
            **{f"{task}_accuracy": stage.tasks[task].accuracy for task in TASKS},
        }
        for stage in report.stages
        if stage.latency and stage.bytes
    ]


def main() -> None:
    """Measure both pairs and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prune", type=float, help="fraction of the channels to keep, for example 0.75")
    parser.add_argument("--json", metavar="FILE", help="write the rows to a file, too")
    arguments = parser.parse_args()
    found = [
        row
        for pair, trunk in PAIRS
        for row in rows(f"{pair}, {trunk}" if trunk else pair, measure(pair, trunk, arguments.prune))
    ]
    table = Table("pair", "stage", "latency, µs", "of ONNX Runtime", "bytes", "of the files", *TASKS)
    for row in found:
        table.add_row(
            row["pair"],
            row["stage"],
            f"{row['latency_us']:.0f}",
            f"{row['latency_ratio']:.2f}",
            f"{row['bytes']:,}",
            f"{row['bytes_ratio']:.2f}",
            *(f"{row[f'{task}_accuracy']:.2%}" for task in TASKS),
        )
    Console().print(table)
    if arguments.json:
        Path(arguments.json).write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
