"""What ``nnfuze run``, ``bench``, ``inspect`` and ``bundle`` do with a bundle."""

from __future__ import annotations

import difflib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from nnfuze_tvm.analysis import measure
from nnfuze_tvm.deploy import signing
from nnfuze_tvm.deploy.bundle import Bundle, bytes_on_disk, check_files
from nnfuze_tvm.deploy.manifest import read_manifest, read_signed
from nnfuze_tvm.deploy.runner import made_up
from nnfuze_tvm.errors import BundleError, InputError
from nnfuze_tvm.graph.samples import by_inference


def bench(bundle: Bundle, repeats: int) -> dict[str, Any]:
    """Return a bundle's latency on this machine, as a whole and kernel by kernel, in seconds."""
    inputs = made_up(bundle.inputs)
    latency = measure.measure(lambda: bundle.run(inputs), repeats)
    kernels = bundle.manifest.kernels
    times = measure.kernel_times(bundle.runner.library, [(k.name, k.arguments) for k in kernels])
    return {
        "latency": latency.median,
        "latency_p95": latency.p95,
        "throughput": latency.throughput,
        "repeats": latency.repeats,
        "threads": bundle.runner.threads,
        "bytes": bytes_on_disk(bundle.path),
        "kernels": [
            {
                "name": k.name,
                "calls": k.calls,
                "seconds": times[k.name] * k.calls,
                "tasks": k.tasks,
                "layers": k.layers,
            }
            for k in kernels
            if k.name in times
        ],
    }


def run(bundle: Bundle, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Run a bundle once or, where arrays hold the inputs of several inferences, as often as that.

    Parameters
    ----------
    bundle : Bundle
        The bundle; its states are zeros at first, then what the inference before left.
    arrays : mapping of str to numpy.ndarray
        By input, of its shape, ``[N, *shape]``, or samples one behind the other as calibration takes them; of what has
        its shape, every inference gets the same.

    Returns
    -------
    dict
        What `Bundle.run` returns, of several inferences stacked along a new first axis.

    Raises
    ------
    InputError
        If names, shapes or types aren't the bundle's, or numbers of inferences differ.
    """
    shapes = {i.name: i.shape for i in bundle.inputs}
    arrays = {name: by_inference(a, shapes[name]) if name in shapes else a for name, a in arrays.items()}
    counts = {name: len(a) for name, a in arrays.items() if name in shapes and a.ndim == len(shapes[name]) + 1}
    if len(set(counts.values())) > 1:
        found = ", ".join(f"{name}: {count}" for name, count in counts.items())
        raise InputError(f"inputs: arrays of several inferences must be equally long ({found})")
    stream = bundle.stream()
    # A single number may be given as [1].
    if not counts or (set(counts.values()) == {1} and all(shapes[name] == () for name in counts)):
        return stream.run(arrays)
    calls = [
        stream.step({name: a[n, ...] if name in counts else a for name, a in arrays.items()})
        for n in range(next(iter(counts.values())))
    ]
    if not calls:
        raise InputError(f"inputs: no inference in {', '.join(counts)}; give at least one")
    return bundle.runner.named([np.stack(values) for values in zip(*calls, strict=True)])


def inspect(path: str | os.PathLike[str], trust: str | None = None) -> dict[str, Any]:
    """Return what a bundle that is whole says about itself, without loading its code; it may be another machine's."""
    directory = Path(path)
    manifest = read_manifest(directory, trust)
    check_files(directory, manifest)
    signed = (directory / signing.SIGNATURE).is_file()
    return {**manifest.model_dump(mode="json"), "bytes": bytes_on_disk(directory), "signed": signed}


def sign(path: str | os.PathLike[str], key: str) -> Path:
    """Sign a bundle that is whole, without loading its code; return the signature's file. See `signing`."""
    directory = Path(path)
    manifest, data = read_signed(directory)
    check_files(directory, manifest)
    return signing.sign(directory, data, key)


def load_bundle(path: str | os.PathLike[str], threads: int | None, trust: str | None) -> Bundle:
    """Load a bundle; say which neighbour was perhaps meant when there is none."""
    try:
        return Bundle.load(path, threads, trust=trust)
    except BundleError as error:
        parent = Path(path).parent
        if not Path(path).exists() and parent.is_dir():
            bundles = [p.name for p in parent.iterdir() if (p / "manifest.json").is_file()]
            if near := difflib.get_close_matches(Path(path).name, bundles, n=1):
                raise BundleError(f"{error}, or did you mean {parent / near[0]}?") from None
        raise
