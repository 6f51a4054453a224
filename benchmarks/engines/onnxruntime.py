"""ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.version_converter

from benchmarks.engines.base import Engine, fastest, quiet, require
from benchmarks.workloads import Feeds, Workload, kept
from nnfuze_tvm.jobs.check.originals import calls_of


def make(workload: Workload, precision: str, threads: int, forms: Sequence[str] = ("QDQ", "QOperator")) -> Engine:
    """Return one ONNX Runtime session per network; in int8, the fastest of the forms its quantizer offers."""
    require("onnxruntime")
    if precision == "fp32":
        return sessions(workload.models, threads)
    variants = {
        f"{form}, {'reduced' if reduced else 'full'} range": sessions(
            [quantized(workload, n, form, reduced) for n in range(len(workload.models))],
            threads,
        )
        for form in forms
        for reduced in (False, True)
    }
    return fastest(variants, workload.evaluation, reference(workload))


def reference(workload: Workload, optimized: bool = True) -> list[np.ndarray]:
    """Return the outputs that all engines are judged by: ONNX Runtime's in float32, ``[N, ...]``.

    Where networks have 8-bit products, none is saturated.
    """
    require("onnxruntime")
    runs = [calls_of(onnx.load(path), "exact" if optimized else "plain") for path in workload.models]
    return _engine(runs).answers(workload.evaluation)


def sessions(models: Sequence[Path], threads: int) -> Engine:
    """Return one session per file."""
    import onnxruntime as ort

    settings = ort.SessionOptions()
    settings.intra_op_num_threads = threads
    settings.inter_op_num_threads = 1
    settings.log_severity_level = 4
    # Its threads may spin while it computes, which makes it faster, but not while another engine has its turn.
    settings.add_session_config_entry("session.force_spinning_stop", "1")
    sessions = [ort.InferenceSession(p, settings, providers=["CPUExecutionProvider"]) for p in models]
    return _engine([partial(session.run, None) for session in sessions])


def _engine(runs: Sequence[Callable[[Any], Sequence[np.ndarray]]]) -> Engine:
    def bind(feeds: Feeds) -> Callable[[], Any]:
        pairs = list(zip(runs, feeds, strict=True))
        return lambda: [run(feed) for run, feed in pairs]

    return Engine(bind, lambda raw: [array for row in raw for array in row])


def quantized(workload: Workload, n: int, form: str, reduced: bool = False, signed: bool = False) -> Path:
    """Return a network as ONNX Runtime's quantizer makes it.

    Parameters
    ----------
    workload : Workload
        Its calibration data decide ranges.
    n : int
        Which of its networks.
    form : str
        ``QDQ`` or ``QOperator``.
    reduced : bool
        Whether weights have 7 bits.
    signed : bool
        Whether activations are signed.
    """
    from onnxruntime import quantization as q

    class Reader(q.CalibrationDataReader):
        def __init__(self) -> None:
            self.rows = iter(workload.calibration_rows(n))

        def get_next(self) -> dict[str, np.ndarray] | None:
            return next(self.rows, None)

    def make(folder: Path) -> None:
        prepared = folder / "prepared.onnx"
        with quiet():
            q.quant_pre_process(_since_opset_13(workload.models[n], folder), prepared, skip_symbolic_shape=True)
            q.quantize_static(
                prepared,
                folder / "model.onnx",
                Reader(),
                quant_format=q.QuantFormat[form],
                per_channel=True,
                reduce_range=reduced,
                activation_type=q.QuantType.QInt8 if signed else q.QuantType.QUInt8,
                weight_type=q.QuantType.QInt8,
            )
        for file in folder.glob("prepared*.onnx"):
            file.unlink()

    label = f"onnxruntime-{version('onnxruntime')}-{form}-{'reduced' if reduced else 'full'}{'-signed' * signed}-{n}"
    return kept(workload.directory / label, make) / "model.onnx"


def _since_opset_13(model: Path, folder: Path) -> Path:
    """Return a network in which weights can be quantized per channel, which needs opset 13."""
    proto = onnx.load(model)
    if all(entry.version >= 13 for entry in proto.opset_import if entry.domain in ("", "ai.onnx")):
        return model
    onnx.save(onnx.version_converter.convert_version(proto, 13), folder / "prepared13.onnx")
    return folder / "prepared13.onnx"
