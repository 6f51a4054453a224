"""ncnn, with pnnx to convert."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.engines.base import Engine, Unavailable, require
from benchmarks.workloads import Feeds, Workload, kept


def make(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one ncnn network per network, converted by pnnx."""
    require("ncnn")
    import ncnn as lib

    if precision == "int8":
        raise Unavailable("neither its wheel nor pnnx brings its quantization tools (ncnn2table, ncnn2int8)")
    nets = []
    for n, feed in enumerate(workload.evaluation[0]):
        folder = converted(workload, n)
        net = lib.Net()
        net.opt.num_threads = threads
        net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = False
        if net.load_param(str(folder / "model.ncnn.param")) or net.load_model(str(folder / "model.ncnn.bin")):
            raise Unavailable("does not load what pnnx converted")
        nets.append((net, list(feed), list(net.output_names())))

    def run(net: Any, arrays: list[np.ndarray], outputs: list[str]) -> list[np.ndarray]:
        extractor = net.create_extractor()
        for n, array in enumerate(arrays):
            extractor.input(f"in{n}", lib.Mat(array))
        return [np.array(extractor.extract(name)[1]) for name in outputs]

    def bind(feeds: Feeds) -> Callable[[], Any]:
        calls = [
            (net, [feed[name][0] for name in inputs], outputs)
            for (net, inputs, outputs), feed in zip(nets, feeds, strict=True)
        ]
        return lambda: [run(*call) for call in calls]

    return Engine(bind, lambda raw: [array for row in raw for array in row])


def converted(workload: Workload, n: int) -> Path:
    """Return the folder with one of the networks as pnnx converts it.

    Raises
    ------
    Unavailable
        If pnnx is not installed or can't convert it.
    """
    found = find_spec("pnnx")
    if found is None or found.origin is None:
        # The wheel asks for torch, which the converter itself can do without.
        raise Unavailable("no converter: pip install --no-deps pnnx")
    program = Path(found.origin).parent / "pnnx"

    def convert(folder: Path) -> None:
        copy = folder / "model.onnx"
        copy.symlink_to(workload.models[n].resolve())
        feed = workload.evaluation[0][n]
        shapes = ",".join(str(list(array.shape)).replace(" ", "") for array in feed.values())
        done = subprocess.run([program, copy, f"inputshape={shapes}", "fp16=0"], capture_output=True, text=True)
        if done.returncode or not (folder / "model.ncnn.param").exists():
            raise Unavailable("does not convert: pnnx failed")
        for file in folder.iterdir():
            if not file.name.startswith("model.ncnn."):
                file.unlink()

    return kept(workload.directory / f"ncnn-{version('pnnx')}-{n}", convert)
