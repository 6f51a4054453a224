"""MNN, with the converter and the quantizer that its wheel brings.

They are called in its library: the wheel's own commands install a package when they start, and tell MNN's makers what
was converted.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.base import Engine, Unavailable, fastest, require
from benchmarks.engines.onnxruntime import reference
from benchmarks.workloads import Feeds, Workload, kept

# Both take what a command line would be, its first word included.
_TOOL = "import sys, _tools; sys.exit(not getattr(_tools, sys.argv[1])(sys.argv[1:]))"
_METHODS = ("KL", "EMA")


def make(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one MNN session per network; in int8, the fastest that its quantizer's methods give."""
    require("MNN")
    count = range(len(workload.models))
    if precision == "fp32":
        return _sessions(workload, [converted(workload, n) for n in count], threads)
    variants = {
        method: _sessions(workload, [_quantized(workload, n, method) for n in count], threads) for method in _METHODS
    }
    return fastest(variants, workload.evaluation, reference(workload))


def _sessions(workload: Workload, models: list[Path], threads: int) -> Engine:
    import MNN as lib

    networks: list[Any] = []
    for path, feed in zip(models, workload.evaluation[0], strict=True):
        net = lib.Interpreter(str(path))
        session = net.createSession({"numThread": threads, "backend": "CPU", "precision": "high"})
        found = net.getSessionInputAll(session)
        if set(found) != set(feed):
            raise Unavailable("its converter loses inputs")
        outputs = net.getSessionOutputAll(session)
        networks.append((net, session, found, [outputs[name] for name in _output_names(workload, len(networks))]))

    def tensor(array: np.ndarray) -> Any:
        """Return a copy of an array as a tensor."""
        return lib.Tensor(array.shape, lib.Halide_Type_Float, array, lib.Tensor_DimensionType_Caffe)

    def bind(feeds: Feeds) -> Callable[[], Any]:
        calls = []
        for (net, session, inputs, outputs), feed in zip(networks, feeds, strict=True):
            copies_in = [(inputs[name], tensor(np.ascontiguousarray(array))) for name, array in feed.items()]
            copies_out = [(output, tensor(np.zeros(output.getShape(), np.float32))) for output in outputs]
            calls.append((net, session, copies_in, copies_out))

        def call() -> list[Any]:
            for net, session, copies_in, copies_out in calls:
                for target, source in copies_in:
                    target.copyFrom(source)
                net.runSession(session)
                for source, target in copies_out:
                    source.copyToHostTensor(target)
            return [target for *_, copies_out in calls for _, target in copies_out]

        return call

    # What it shows as an array is gone with the tensor.
    return Engine(bind, lambda raw: [np.array(result.getNumpyData()) for result in raw])


def _output_names(workload: Workload, n: int) -> list[str]:
    import onnx

    return [value.name for value in onnx.load(workload.models[n], load_external_data=False).graph.output]


def converted(workload: Workload, n: int) -> Path:
    """Return one of the networks as MNN's converter makes it.

    Raises
    ------
    Unavailable
        If it can't convert it.
    """

    def convert(folder: Path) -> None:
        model = folder / "model.mnn"
        _run("mnnconvert", "-f", "ONNX", "--modelFile", workload.models[n], "--MNNModel", model, "--bizCode", "none")
        if not model.exists():
            raise Unavailable("does not convert: mnnconvert failed")

    return kept(workload.directory / f"mnn-{version('mnn')}-{n}", convert) / "model.mnn"


def _quantized(workload: Workload, n: int, method: str) -> Path:
    exact = converted(workload, n)

    def quantize(folder: Path) -> None:
        rows = workload.calibration_rows(n)
        samples = folder / "samples"
        for number, row in enumerate(rows):
            sample = samples / str(number)
            sample.mkdir(parents=True)
            for name, array in row.items():
                np.savetxt(sample / f"{name}.txt", array.ravel())
            inputs = [{"name": name, "shape": array.shape} for name, array in row.items()]
            described = {"inputs": inputs, "outputs": _output_names(workload, n)}
            (sample / "input.json").write_text(json.dumps(described), encoding="utf-8")
        settings = {
            "input_type": "sequence",
            "path": f"{samples}/",
            "used_sample_num": len(rows),
            "batch_size": len(rows),
            "feature_quantize_method": method,
            "weight_quantize_method": "MAX_ABS",
        }
        (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
        _run("mnnquant", exact, folder / "model.mnn", folder / "settings.json")
        if not (folder / "model.mnn").exists():
            raise Unavailable("does not quantize: mnnquant failed")
        for number in range(len(rows)):
            for file in (samples / str(number)).iterdir():
                file.unlink()

    return kept(workload.directory / f"mnn-{version('mnn')}-{method}-{n}", quantize) / "model.mnn"


def _run(tool: str, *arguments: str | Path) -> None:
    """Run one of MNN's tools in a process of its own: they print, and end the process when they fail."""
    subprocess.run([sys.executable, "-c", _TOOL, tool, *map(str, arguments)], capture_output=True, check=False)
