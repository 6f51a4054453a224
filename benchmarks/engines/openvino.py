"""OpenVINO, with NNCF to quantize."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.base import Engine, fastest, quiet, require
from benchmarks.engines.onnxruntime import reference
from benchmarks.workloads import Feeds, Workload, kept


def make(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one OpenVINO infer request per network; in int8, quantized by NNCF."""
    require("openvino")
    if precision == "fp32":
        return _requests(workload, workload.models, threads)
    require("nncf")
    # Where products are summed in 16 bits, weights of half the range keep the sums from overflowing.
    variants = {
        f"overflow fix: {fix}": _requests(
            workload, [_quantize_nncf(workload, n, fix) for n in range(len(workload.models))], threads
        )
        for fix in ("ENABLE", "DISABLE")
    }
    return fastest(variants, workload.evaluation, reference(workload))


def _requests(workload: Workload, models: Sequence[Path], threads: int) -> Engine:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        # Else it rounds the data of layers whose weights a file stores in 8 bits to 8 bits as well.
        "DYNAMIC_QUANTIZATION_GROUP_SIZE": 0,
        # It would bind the thread that calls it to one core, and all other engines with it.
        "ENABLE_CPU_PINNING": False,
    }
    core = ov.Core()
    requests = []
    for path, feed in zip(models, workload.evaluation[0], strict=True):
        model = core.read_model(path)
        if model.is_dynamic():
            model.reshape({name: array.shape for name, array in feed.items()})
        compiled = core.compile_model(model, "CPU", settings)
        requests.append((compiled.create_infer_request(), [port.any_name for port in compiled.inputs]))
    # The fastest way in and out: inputs are copied into arrays that it knows, outputs are views of its own memory.
    buffers: list[list[np.ndarray]] = []
    for (request, names), feed in zip(requests, workload.evaluation[0], strict=True):
        buffers.append([np.empty_like(feed[name]) for name in names])
        for n, buffer in enumerate(buffers[-1]):
            request.set_input_tensor(n, ov.Tensor(buffer, shared_memory=True))

    def bind(feeds: Feeds) -> Callable[[], Any]:
        copies = [
            (buffer, feed[name])
            for (_, names), feed, own in zip(requests, feeds, buffers, strict=True)
            for name, buffer in zip(names, own, strict=True)
        ]

        def call() -> list[Any]:
            for buffer, array in copies:
                buffer[...] = array
            return [request.infer(share_outputs=True) for request, _ in requests]

        return call

    return Engine(bind, lambda raw: [array for row in raw for array in row.values()])


def _quantize_nncf(workload: Workload, n: int, fix: str) -> Path:
    def make(folder: Path) -> None:
        import nncf
        import openvino as ov

        rows = workload.calibration_rows(n)
        with quiet():
            model = ov.Core().read_model(workload.models[n])
            advanced = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix[fix])
            quantized = nncf.quantize(model, nncf.Dataset(rows), subset_size=len(rows), advanced_parameters=advanced)
            ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    label = f"openvino-{version('openvino')}-nncf-{version('nncf')}-{fix}-{n}"
    return kept(workload.directory / label, make) / "model.xml"
