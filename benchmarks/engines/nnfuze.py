"""Our own bundles."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx

import nnfuze_tvm
from benchmarks.engines.base import Engine
from benchmarks.workloads import Feeds, Workload, kept
from nnfuze_tvm.jobs.data import flat


def make(workload: Workload, precision: str, threads: int, trials: int = 0) -> Engine:
    """Return our bundle of all networks, merged, tuned with up to ``trials`` trials per kernel.

    The precision is ``fp32``, or one that ``--quantize`` takes.
    """
    names = _merged_names(workload)
    folder = workload.directory / f"nnfuze-{source_digest()}"

    def save(scratch: Path) -> None:
        arrays: dict[str, Any] = {}
        for own, samples in zip(names, workload.calibration, strict=True):
            arrays.update({own[name]: array for name, array in samples.items()})
        np.savez(scratch / "samples.npz", **arrays)

    quantize = None if precision == "fp32" else precision
    samples = str(kept(workload.directory / "calibration", save) / "samples.npz") if quantize else None
    path = folder / f"{precision}-{threads}-{trials}"
    if not path.exists():
        nnfuze_tvm.compile(
            [f"{model.stem}={model}" for model in workload.models],
            path,
            progress=True,
            calibration=samples,
            quantize=quantize,
            shapes=open_shapes(workload),
            trials=trials,
            work_dir=str(folder / f"tuning-{precision}-{threads}") if trials else None,
            threads=threads,
            compare=False,
        )
    bundle = nnfuze_tvm.Bundle.load(path, threads)

    def bind(feeds: Feeds) -> Callable[[], Any]:
        inputs = {own[name]: array for own, feed in zip(names, feeds, strict=True) for name, array in feed.items()}
        return lambda: bundle.run(inputs)

    return Engine(bind, lambda raw: list(flat(raw).values()), {"bundle": str(path)})


def open_shapes(workload: Workload, task: str | None = None) -> dict[str, list[int]]:
    """Return the shapes of inputs whose files leave them open; tasks are called as their files, or as is said."""
    return {
        f"{task or path.stem}:{value.name}": list(feed[value.name].shape)
        for path, feed in zip(workload.models, workload.evaluation[0], strict=True)
        for value in onnx.load(path, load_external_data=False).graph.input
        if value.name in feed and any(dim.dim_value < 1 for dim in value.type.tensor_type.shape.dim)
    }


def _merged_names(workload: Workload) -> list[dict[str, str]]:
    """Return, per network, the name of each input in the merged bundle: inputs of equal name and shape are one."""
    shapes: dict[str, set[tuple[int, ...]]] = {}
    for feed in workload.evaluation[0]:
        for name, array in feed.items():
            shapes.setdefault(name, set()).add(array.shape)
    return [
        {name: name if len(shapes[name]) == 1 else f"{path.stem}.{name}" for name in feed}
        for path, feed in zip(workload.models, workload.evaluation[0], strict=True)
    ]


@cache
def source_digest() -> str:
    """Return a digest of this package's sources and TVM's version: what is compiled or tuned depends on them."""
    digest = hashlib.sha256(version("apache-tvm").encode())
    root = Path(nnfuze_tvm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
