"""The engines that run a workload side by side: one class each, from ONNX files to a call with numpy arrays."""

from __future__ import annotations

import hashlib
import io
import logging
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

import nnfuze_tvm
from benchmarks.interleaved import interleaved
from benchmarks.workloads import Feeds, Workload, kept
from nnfuze_tvm.job import compile_bundle
from nnfuze_tvm.manifest import package_versions
from nnfuze_tvm.options import Options
from nnfuze_tvm.tools import flat

# Settings whose latencies differ by less than this factor are equally good to a peer.
_ABOUT_EQUAL = 1.02

INSTALL = "pip install 'nnfuze-tvm[peers]'"


class Unavailable(Exception):
    """Why an engine can't run a workload, in one line."""


@dataclass
class Engine:
    """A workload, ready to run.

    Attributes
    ----------
    bind : callable
        Returns a function without arguments that runs all networks on the given inputs: what is timed. It takes
        its inputs as numpy arrays, the caller's, and has its outputs as such.
    arrays : callable
        Returns what such a call returned as a list of arrays, network by network.
    details : dict
        What is worth keeping about how it was made.
    """

    bind: Callable[[Feeds], Callable[[], Any]]
    arrays: Callable[[Any], list[np.ndarray]]
    details: dict[str, Any] = field(default_factory=dict)

    def answers(self, samples: Sequence[Feeds]) -> list[np.ndarray]:
        """Return every output for all samples, ``[N, ...]``."""
        rows = [[np.array(a) for a in self.arrays(self.bind(feeds)())] for feeds in samples]
        return [np.stack(values) for values in zip(*rows, strict=True)]


def nnfuze(workload: Workload, precision: str, threads: int, trials: int = 0) -> Engine:
    """Return our bundle of all networks, merged, tuned with up to ``trials`` trials per kernel."""
    names = _merged_names(workload)
    folder = workload.directory / f"nnfuze-{_source_digest()}"

    def save(scratch: Path) -> None:
        arrays: dict[str, Any] = {}
        for own, samples in zip(names, workload.calibration, strict=True):
            arrays.update({own[name]: array for name, array in samples.items()})
        np.savez(scratch / "samples.npz", **arrays)

    options = Options(
        models=[f"{path.stem}={path}" for path in workload.models],
        calibration=str(kept(workload.directory / "calibration", save) / "samples.npz")
        if precision == "int8"
        else None,
        quantize="int8" if precision == "int8" else None,
        trials=trials,
        work_dir=str(folder / f"tuning-{precision}-{threads}") if trials else None,
        threads=threads,
        compare=False,
    )
    path = folder / f"{precision}-{threads}-{trials}"
    if not path.exists():
        compile_bundle(options, path, progress=True)
    bundle = nnfuze_tvm.Bundle.load(path, threads)

    def bind(feeds: Feeds) -> Callable[[], Any]:
        inputs = {own[name]: array for own, feed in zip(names, feeds, strict=True) for name, array in feed.items()}
        return lambda: bundle.run(inputs)

    return Engine(bind, lambda raw: list(flat(raw).values()), {"bundle": str(path)})


def onnxruntime(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one ONNX Runtime session per network; in int8, the fastest of the forms its quantizer offers."""
    _require("onnxruntime")
    if precision == "fp32":
        return _sessions(workload.models, threads)
    variants = {
        f"{form}, {'reduced' if reduced else 'full'} range": _sessions(
            [_quantize_static(workload, n, form, reduced) for n in range(len(workload.models))],
            threads,
        )
        for form in ("QDQ", "QOperator")
        for reduced in (False, True)
    }
    return _fastest(workload, variants)


def _fastest(workload: Workload, variants: dict[str, Engine]) -> Engine:
    """Return the fastest variant; of those that are about equally fast, the most exact one."""
    calls = {name: engine.bind(workload.evaluation[0]) for name, engine in variants.items()}
    times = {name: t.median for name, t in interleaved(calls, rounds=10, min_seconds=0.5).items()}
    exact = reference(workload)
    fast = [name for name, seconds in times.items() if seconds < _ABOUT_EQUAL * min(times.values())]
    errors = {name: relative_error(variants[name].answers(workload.evaluation), exact) for name in fast}
    chosen = min(fast, key=errors.__getitem__)
    variants[chosen].details = {"chosen": chosen, "seconds": times}
    return variants[chosen]


def reference(workload: Workload) -> list[np.ndarray]:
    """Return the outputs that all engines are judged by: ONNX Runtime's in float32, ``[N, ...]``."""
    _require("onnxruntime")
    return _sessions(workload.models, 1).answers(workload.evaluation)


def _sessions(models: Sequence[Path], threads: int) -> Engine:
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    # Its threads may spin while it computes, which makes it faster, but not while another engine has its turn.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [ort.InferenceSession(p, settings, providers=["CPUExecutionProvider"]) for p in models]

    def bind(feeds: Feeds) -> Callable[[], Any]:
        pairs = [(session.run, feed) for session, feed in zip(sessions, feeds, strict=True)]
        return lambda: [run(None, feed) for run, feed in pairs]

    return Engine(bind, lambda raw: [array for row in raw for array in row])


def _quantize_static(workload: Workload, n: int, form: str, reduced: bool) -> Path:
    from onnxruntime import quantization as q

    samples = workload.calibration[n]

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = (
                {name: array[row : row + 1] for name, array in samples.items()}
                for row in range(len(next(iter(samples.values()))))
            )

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    def make(folder: Path) -> None:
        prepared = folder / "prepared.onnx"
        with _quiet():
            q.quant_pre_process(workload.models[n], prepared, skip_symbolic_shape=True)
            q.quantize_static(
                prepared,
                folder / "model.onnx",
                Reader(),
                quant_format=q.QuantFormat[form],
                per_channel=True,
                reduce_range=reduced,
                activation_type=q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
            )
        prepared.unlink()

    label = f"onnxruntime-{version('onnxruntime')}-{form}-{'reduced' if reduced else 'full'}-{n}"
    return kept(workload.directory / label, make) / "model.onnx"


def openvino(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one OpenVINO infer request per network; in int8, quantized by NNCF."""
    _require("openvino")
    if precision == "fp32":
        return _requests(workload, workload.models, threads)
    _require("nncf")
    # Where products are summed in 16 bits, weights of half the range keep the sums from overflowing.
    variants = {
        f"overflow fix: {fix}": _requests(
            workload, [_quantize_nncf(workload, n, fix) for n in range(len(workload.models))], threads
        )
        for fix in ("ENABLE", "DISABLE")
    }
    return _fastest(workload, variants)


def _requests(workload: Workload, models: Sequence[Path], threads: int) -> Engine:
    import openvino as ov

    settings = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "f32",
        # It would bind the thread that calls it to one core, and all other engines with it.
        "ENABLE_CPU_PINNING": False,
    }
    core = ov.Core()
    requests = []
    for path in models:
        compiled = core.compile_model(core.read_model(path), "CPU", settings)
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

        samples = workload.calibration[n]
        count = len(next(iter(samples.values())))
        rows = [{name: array[row : row + 1] for name, array in samples.items()} for row in range(count)]
        with _quiet():
            model = ov.Core().read_model(workload.models[n])
            advanced = nncf.AdvancedQuantizationParameters(overflow_fix=nncf.OverflowFix[fix])
            quantized = nncf.quantize(model, nncf.Dataset(rows), subset_size=count, advanced_parameters=advanced)
            ov.save_model(quantized, folder / "model.xml", compress_to_fp16=False)

    label = f"openvino-{version('openvino')}-nncf-{version('nncf')}-{fix}-{n}"
    return kept(workload.directory / label, make) / "model.xml"


def ncnn(workload: Workload, precision: str, threads: int) -> Engine:
    """Return one ncnn network per network, converted by pnnx."""
    _require("ncnn")
    import ncnn as lib

    if precision == "int8":
        raise Unavailable("neither its wheel nor pnnx brings its quantization tools (ncnn2table, ncnn2int8)")
    found = find_spec("pnnx")
    if found is None or found.origin is None:
        # The wheel asks for torch, which the converter itself can do without.
        raise Unavailable("no converter: pip install --no-deps pnnx")
    program = Path(found.origin).parent / "pnnx"
    nets = []
    for n, (path, feed) in enumerate(zip(workload.models, workload.evaluation[0], strict=True)):

        def convert(folder: Path, path: Path = path, feed: dict[str, np.ndarray] = feed) -> None:
            copy = folder / "model.onnx"
            copy.symlink_to(path.resolve())
            shapes = ",".join(str(list(array.shape)).replace(" ", "") for array in feed.values())
            done = subprocess.run([program, copy, f"inputshape={shapes}", "fp16=0"], capture_output=True, text=True)
            if done.returncode or not (folder / "model.ncnn.param").exists():
                raise Unavailable("does not convert: pnnx failed")
            for file in folder.iterdir():
                if not file.name.startswith("model.ncnn."):
                    file.unlink()

        folder = kept(workload.directory / f"ncnn-{version('pnnx')}-{n}", convert)
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


PEERS: dict[str, Callable[[Workload, str, int], Engine]] = {
    "onnxruntime": onnxruntime,
    "openvino": openvino,
    "ncnn": ncnn,
}

_PACKAGES = {"onnxruntime": ["onnxruntime"], "openvino": ["openvino", "nncf"], "ncnn": ["ncnn", "pnnx"]}


def versions(peers: Sequence[str]) -> dict[str, str]:
    """Return the versions of all packages that are compared."""
    found = package_versions()
    for package in (name for peer in peers for name in _PACKAGES.get(peer, [])):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep quantizers from printing what they do."""
    logging.disable(logging.WARNING)
    try:
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(logging.NOTSET)


def relative_error(answers: Sequence[np.ndarray], exact: Sequence[np.ndarray]) -> float:
    """Return the largest difference between outputs ``[N, ...]``, relative to the range of the exact output."""
    worst = 0.0
    for found, wanted in zip(answers, exact, strict=True):
        if found.size != wanted.size or not np.isfinite(found).all():
            return math.inf
        difference = np.abs(found.reshape(wanted.shape).astype(np.float64) - wanted).max()
        worst = max(worst, float(difference) / float(np.ptp(wanted)))
    return worst


def _require(package: str) -> None:
    if find_spec(package) is None:
        raise Unavailable(f"not installed: {INSTALL}")


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
def _source_digest() -> str:
    """Return a digest of this package's sources and TVM's version: what is compiled or tuned depends on them."""
    digest = hashlib.sha256(version("apache-tvm").encode())
    root = Path(nnfuze_tvm.__file__).parent
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:10]
