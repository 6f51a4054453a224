"""What is run on emulated CPUs: our libraries, and peers' models for their AArch64 packages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np
from tvm.target import Target

from benchmarks.arm import counting, tflite
from benchmarks.arm.counting import Block, Count
from benchmarks.engines.base import Unavailable, relative_error
from benchmarks.engines.ncnn import converted
from benchmarks.engines.nnfuze import source_digest
from benchmarks.engines.onnxruntime import quantized
from benchmarks.workloads import Workload, kept
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.manifest import package_versions
from nnfuze_tvm.devices.boards import BOARDS
from nnfuze_tvm.devices.toolchain import linker_for
from nnfuze_tvm.frontend import load
from nnfuze_tvm.jobs.graphs import Graphs, make_graphs
from nnfuze_tvm.jobs.request import NetworkRequest

# Per CPU model of QEMU, the board that is compiled for.
CPUS = {
    "cortex-a53": "rpi3",
    "cortex-a72": "rpi4",
    "cortex-a76": "rpi5",
    "neoverse-n1": "neoverse-n1",
    "max": "aarch64+i8mm",
}

# After one that is not counted, one is like the other.
_INFERENCES = 1


Announce = Callable[[str], None]


@dataclass(frozen=True)
class KernelCount:
    """What one kernel computes and executes, all its calls in one inference together.

    Attributes
    ----------
    name : str
        The kernel's function.
    layers : tuple of str
        The layers it computes.
    rule : str
        The schedule rule that made it.
    macs : int
        Multiply-accumulates of its layers, of the network as it was given.
    count : Count
        Instructions.
    """

    name: str
    layers: tuple[str, ...]
    rule: str
    macs: int
    count: Count


@dataclass(frozen=True)
class Measured:
    """What one engine executes per inference.

    Attributes
    ----------
    count : Count
        Instructions, without those of the Python interpreter and of numpy.
    error : float
        The largest difference of an output from ONNX Runtime's in float32 on this machine, relative to its range.
    form : str
        Of what a peer offers, the one that it is.
    kernels : tuple of KernelCount
        Of our libraries; ``count`` has TVM's runtime and the C library in it, too.
    """

    count: Count
    error: float
    form: str = ""
    kernels: tuple[KernelCount, ...] = ()


# From a CPU's name and the exact answers to what an inference executes there.
Measure = Callable[[str, Sequence[np.ndarray]], Measured]


class Ours:
    """Our libraries of one network in one precision, for any CPU."""

    def __init__(self, work: Workload, precision: str, work_dir: Path) -> None:
        self.work = work
        self.precision = precision
        self.work_dir = work_dir

    @cached_property
    def graphs(self) -> Graphs:
        """The network's graphs, of which the last one is compiled."""

        def save(scratch: Path) -> None:
            np.savez(scratch / "samples.npz", **self.work.calibration[0])  # type: ignore[arg-type]

        integer = self.precision in ("int8", "w4a8")
        fields = {
            "calibration": str(kept(self.work.directory / "calibration", save) / "samples.npz") if integer else None,
            "quantize": None if self.precision == "fp32" else self.precision,
            # The graph is the same for every CPU that computes in float16.
            "target": "aarch64+dotprod",
        }
        return make_graphs(NetworkRequest.parse([str(self.work.models[0])], fields))

    def measure(self, cpu: str, exact: Sequence[np.ndarray]) -> Measured:
        """Return what an inference executes, and whether its answer is right."""
        if self.precision == "fp16" and "fullfp16" not in BOARDS[CPUS[cpu]].features:
            raise Unavailable("this CPU does not compute in float16")
        folder = kept(
            self.work.directory / f"nnfuze-{source_digest()}" / f"{cpu}-{self.precision}",
            lambda folder: self._compile(cpu, folder),
        )
        library = folder / "lib.so"
        about = json.loads((folder / "about.json").read_text())

        def run() -> Measured:
            feed = self.work.evaluation[0][0]
            inputs = [feed[name] for name in about["inputs"]]
            blocks, outputs = counting.run(cpu, "nnfuze", library, inputs, _INFERENCES, work_dir=self.work_dir)
            counts: dict[str, Count] = {}
            for function, count in counting.by_function(blocks, library).items():
                kernel = function.removeprefix("__tvm_ffi_").partition("_compute_")[0]
                counts[kernel] = counts.get(kernel, Count()) + count / _INFERENCES
            kernels = [KernelCount(**known, count=counts.get(known["name"], Count())) for known in about["kernels"]]
            return _measured(blocks, outputs, exact, kernels)

        return _cached(folder / "counts", run)

    def _compile(self, cpu: str, folder: Path) -> None:
        target = Target({**BOARDS[CPUS[cpu]].target, "num-cores": 1})
        lowered = build.finished(build.lower(self.graphs.last, target), target)
        executable = build.generate(lowered, target)
        # With its symbols, by which kernels are told apart; the code is the same.
        linker = replace(linker_for(target), strip=False)
        executable.export_library(str(folder / "lib.so"), fcompile=linker)
        macs = {layer.name: layer.macs for layer in metrics.layers(self.graphs.loaded)}
        kernels = [
            {
                "name": kernel.name,
                "layers": [name.partition("/")[2] for name in kernel.layers],
                "rule": kernel.rule,
                "macs": sum(macs.get(name, 0) for name in kernel.layers),
            }
            for kernel in metrics.kernels(lowered)
        ]
        # One network alone: its inputs keep their names.
        inputs = [param.name for param in self.graphs.last["main"].params]
        (folder / "about.json").write_text(json.dumps({"inputs": inputs, "kernels": kernels}))


def onnxruntime(work: Workload, precision: str, work_dir: Path) -> Measure:
    """Return how ONNX Runtime is measured; in int8, as its quantizer makes networks for ARM."""

    def measure(cpu: str, exact: Sequence[np.ndarray]) -> Measured:
        if precision == "fp32":
            return _peer("onnxruntime", work.models[0], "fp32", cpu, work, exact, work_dir)
        # Signed activations take fewer instructions than unsigned ones on every CPU, and QOperator as many as QDQ.
        model = quantized(work, 0, "QDQ", signed=True)
        return _peer("onnxruntime", model, "s8", cpu, work, exact, work_dir)

    return measure


def ncnn(work: Workload, precision: str, work_dir: Path) -> Measure:
    """Return how ncnn is measured."""

    def measure(cpu: str, exact: Sequence[np.ndarray]) -> Measured:
        if precision == "int8":
            raise Unavailable("neither its wheel nor pnnx brings its quantization tools (ncnn2table, ncnn2int8)")
        return _peer("ncnn", converted(work, 0), "fp32", cpu, work, exact, work_dir)

    return measure


def tensorflow_lite(work: Workload, precision: str, work_dir: Path) -> Measure:
    """Return how TensorFlow Lite with XNNPACK is measured."""

    def measure(cpu: str, exact: Sequence[np.ndarray]) -> Measured:
        if precision == "int8" and cpu not in ("cortex-a53", "cortex-a72"):
            raise Unavailable("XNNPACK asks Linux for dot products, which QEMU does not let it see")
        return _peer("tflite", tflite.model(work, precision), precision, cpu, work, exact, work_dir)

    return measure


# The newest AArch64 packages that run in QEMU 7.2: what follows ONNX Runtime 1.23 crashes there.
_REQUIREMENTS = {
    "onnxruntime": ["onnxruntime==1.23.2"],
    "ncnn": ["ncnn==1.0.20261020"],
    # It was compiled for the old numpy.
    "tflite": ["tflite-runtime==2.14.0", "numpy==1.26.4"],
}
PEERS: dict[str, Callable[[Workload, str, Path], Measure]] = {
    "onnxruntime": onnxruntime,
    "ncnn": ncnn,
    "tflite": tensorflow_lite,
}


def _peer(
    engine: str,
    model: Path,
    form: str,
    cpu: str,
    work: Workload,
    exact: Sequence[np.ndarray],
    work_dir: Path,
) -> Measured:
    """Return what a peer executes for one form of a network."""
    requirements = _REQUIREMENTS[engine]

    def run() -> Measured:
        packages = [counting.package(requirement, work_dir) for requirement in requirements]
        inputs = list(work.evaluation[0][0].values())
        blocks, outputs = counting.run(cpu, engine, model, inputs, _INFERENCES, work_dir=work_dir, packages=packages)
        return _measured(blocks, outputs, exact, form=form)

    return _cached(work.directory / f"{requirements[0].replace('==', '-')}-{form}-{cpu}", run)


def makers(work: Workload, precision: str, engines: Sequence[str], work_dir: Path) -> dict[str, Measure]:
    """Return, per engine, the function that measures it on a CPU."""
    known = {"nnfuze": lambda *args: Ours(*args).measure, **PEERS}
    return {name: known[name](work, precision, work_dir) for name in engines}


def versions(engines: Iterable[str]) -> dict[str, str]:
    """Return the versions of what is compared."""
    peers = (_REQUIREMENTS[engine][0].split("==") for engine in engines if engine in _REQUIREMENTS)
    return {**package_versions(), **dict(peers)}


def macs(work: Workload) -> int:
    """Return the multiply-accumulates of one inference of a network as it was given."""
    return sum(layer.macs for layer in metrics.layers(load([str(work.models[0])])))


def _measured(
    blocks: Sequence[Block],
    outputs: Sequence[np.ndarray],
    exact: Sequence[np.ndarray],
    kernels: Sequence[KernelCount] = (),
    form: str = "",
) -> Measured:
    error = relative_error([a[None] for a in outputs], [a[:1] for a in exact])
    return Measured(counting.without_interpreter(blocks) / _INFERENCES, error, form, tuple(kernels))


def _cached(path: Path, run: Callable[[], Measured]) -> Measured:
    """Return what ``run`` returns, from a file if it was there before."""

    def save(folder: Path) -> None:
        (folder / "measured.json").write_text(json.dumps(asdict(run())))

    folder = kept(path.with_name(f"{path.name}-{counting.digest()}"), save)
    fields = json.loads((folder / "measured.json").read_text())
    kernels = tuple(
        KernelCount(**{**kernel, "layers": tuple(kernel["layers"]), "count": Count(**kernel["count"])})
        for kernel in fields["kernels"]
    )
    return Measured(Count(**fields["count"]), fields["error"], fields["form"], kernels)
