"""TVM without this package: its own kernels, not scheduled at all, or tuned by its own MetaSchedule."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from tvm import relax
from tvm.relax.frontend.onnx import from_onnx
from tvm.s_tir import meta_schedule as ms

from benchmarks.engines.base import Engine, Unavailable, quiet
from benchmarks.workloads import Feeds, Workload, kept
from nnfuze_tvm.deploy.threads import use_threads
from nnfuze_tvm.devices import targets, toolchain


def make(workload: Workload, precision: str, threads: int, trials: int = 0) -> Engine:
    """Return one virtual machine per network; with ``trials``, as many MetaSchedule trials per kernel."""
    if precision == "int8":
        raise Unavailable("it has no quantizer")
    target = targets.resolve("host")
    config = {**{k: v for k, v in target.export().items() if k != "tag"}, "num-cores": threads}
    target = tvm.target.Target(config)
    use_threads(threads)
    machines = []
    for n, path in enumerate(workload.models):
        folder = workload.directory / f"tvm-{version('apache-tvm')}-{threads}-{trials}-{n}"
        log = workload.directory / f"tvm-{version('apache-tvm')}-{threads}-tuning-{n}"

        def build(scratch: Path, path: Path = path, log: Path = log) -> None:
            mod = from_onnx(onnx.load(path))
            with target:
                if trials:
                    mod = tuned(mod, target, trials, log)
                else:
                    mod = relax.get_pipeline("zero")(mod)
                toolchain.export_library(relax.build(mod, target), scratch / "lib.so", target)

        library = tvm.runtime.load_module(str(kept(folder, build) / "lib.so"))
        machines.append((relax.VirtualMachine(library, tvm.cpu())["main"], list(workload.evaluation[0][n])))

    def bind(feeds: Feeds) -> Callable[[], Any]:
        calls = [(main, [feed[name] for name in names]) for (main, names), feed in zip(machines, feeds, strict=True)]

        def call() -> list[np.ndarray]:
            outputs: list[np.ndarray] = []
            for main, arrays in calls:
                result = main(*(tvm.runtime.tensor(array) for array in arrays))
                fields = [result] if isinstance(result, tvm.runtime.Tensor) else list(result)
                outputs += [field.numpy() for field in fields]
            return outputs

        return call

    return Engine(bind, lambda raw: raw)


def tuned(mod: tvm.IRModule, target: tvm.target.Target, trials: int, log: Path) -> tvm.IRModule:
    """Return a module whose kernels TVM's own MetaSchedule tuned, weights packed; its records stay in ``log``."""
    phases = [
        relax.transform.DecomposeOpsForInference(),
        relax.transform.CanonicalizeBindings(),
        relax.get_pipeline("zero"),
        relax.transform.AttachAttrLayoutFreeBuffers(),
    ]
    fused = tvm.transform.Sequential(phases)(mod)
    tasks = len(ms.relax_integration.extract_tasks(fused, target))
    log.mkdir(parents=True, exist_ok=True)
    with quiet():
        database = ms.relax_integration.tune_relax(
            fused, {}, target, str(log), max_trials_global=trials * tasks, max_trials_per_task=trials, seed=0
        )
    packed = [
        relax.transform.MetaScheduleApplyDatabase(),
        relax.transform.SplitLayoutRewritePreproc(),
        relax.transform.FoldConstant(),
        relax.transform.DeadCodeElimination(),
    ]
    with database:
        return tvm.transform.Sequential(packed)(fused)
