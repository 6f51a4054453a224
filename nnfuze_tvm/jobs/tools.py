"""What ``nnfuze run``, ``bench`` and ``inspect`` do with a bundle, and how options are read from text."""

from __future__ import annotations

import difflib
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from nnfuze_tvm.analysis import measure
from nnfuze_tvm.deploy.bundle import Bundle, bytes_on_disk
from nnfuze_tvm.deploy.manifest import read_manifest
from nnfuze_tvm.deploy.runner import made_up
from nnfuze_tvm.errors import BundleError, InputError

Answers = Mapping[str, Any]


def parse_shapes(texts: Sequence[str]) -> dict[str, list[int]]:
    """Return ``{"audio": [1, 1, 49, 40]}`` for ``["audio=1,1,49,40"]``.

    Raises
    ------
    InputError
        If a text is written otherwise.
    """
    shapes = {}
    for text in texts:
        name, found, dims = text.rpartition("=")
        try:
            shape = [int(dim) for dim in dims.replace("x", ",").split(",")]
        except ValueError:
            shape = []
        if not found or not name or not shape or min(shape) < 1:
            raise InputError(f"--shape {text}: write it as name=1,3,224,224")
        shapes[name] = shape
    return shapes


def read_inputs(texts: Sequence[str]) -> dict[str, np.ndarray]:
    """Return the arrays of ``["audio=x.npy"]`` by input name.

    Raises
    ------
    InputError
        If a text is written otherwise, or a file can't be read.
    """
    arrays = {}
    for text in texts:
        name, found, path = text.partition("=")
        if not found or not name or not path:
            raise InputError(f"--input {text}: write it as name=array.npy")
        try:
            array = np.load(path, allow_pickle=False)
        except OSError as error:
            raise InputError(f"--input {text}: can't be read ({error.strerror or error})") from None
        except (ValueError, EOFError):
            raise InputError(f"--input {text}: not an array that numpy.save wrote") from None
        if not isinstance(array, np.ndarray):
            raise InputError(f"--input {text}: holds several arrays; save one with numpy.save")
        arrays[name] = array
    return arrays


def flat(answers: Answers) -> dict[str, np.ndarray]:
    """Return answers by task, or by ``task.output`` where a task has several outputs."""
    result = {}
    for task, value in answers.items():
        if isinstance(value, Mapping):
            result.update({f"{task}.{name}": array for name, array in value.items()})
        else:
            result[task] = value
    return result


def save_answers(answers: Answers, directory: str | os.PathLike[str]) -> list[Path]:
    """Write one ``.npy`` file per output and return their paths.

    Raises
    ------
    InputError
        If the directory can't be written.
    """
    written = []
    try:
        Path(directory).mkdir(parents=True, exist_ok=True)
        for name, array in flat(answers).items():
            path = Path(directory) / f"{name.replace(os.sep, '_')}.npy"
            np.save(path, array)
            written.append(path)
    except OSError as error:
        raise InputError(f"--output {directory}: can't be written ({error.strerror or error})") from None
    return written


@contextmanager
def array_file(path: str | os.PathLike[str]) -> Iterator[dict[str, np.ndarray]]:
    """Give a dict that becomes an ``.npz`` file when the block ends well; that it can be is found out before.

    Raises
    ------
    InputError
        If it can't be written.
    """
    try:
        with tempfile.TemporaryDirectory(dir=Path(path).parent, prefix=".npz-") as directory:
            arrays: dict[str, np.ndarray] = {}
            yield arrays
            file = Path(directory) / "arrays.npz"
            np.savez(file, **arrays)  # type: ignore[arg-type]
            os.replace(file, path)
    except OSError as error:
        raise InputError(f"--output {path}: can't be written ({error.strerror or error})") from None


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


def inspect(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return what a bundle says about itself, without loading its code; it may be another machine's."""
    directory = Path(path)
    manifest = read_manifest(directory)
    return {**manifest.model_dump(mode="json"), "bytes": bytes_on_disk(directory)}


def load_bundle(path: str | os.PathLike[str], threads: int | None) -> Bundle:
    """Load a bundle; say which neighbour was perhaps meant when there is none."""
    try:
        return Bundle.load(path, threads)
    except BundleError as error:
        parent = Path(path).parent
        if not Path(path).exists() and parent.is_dir():
            bundles = [p.name for p in parent.iterdir() if (p / "manifest.json").is_file()]
            if near := difflib.get_close_matches(Path(path).name, bundles, n=1):
                raise BundleError(f"{error}, or did you mean {parent / near[0]}?") from None
        raise
