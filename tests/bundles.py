"""Bundles of executables that no compilation made."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build, bundle, weights
from nnfuze_tvm.deploy.apart import take_apart
from nnfuze_tvm.deploy.manifest import KernelRecord, Manifest, describe_target, interface, signature_records
from nnfuze_tvm.deploy.runner import signature
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import export_library
from nnfuze_tvm.frontend import load
from nnfuze_tvm.passes import pipeline
from tests.tiny_networks import classifier


def write_bundle(
    path: str | os.PathLike,
    executable: relax.VMExecutable,
    manifest: Manifest,
    *,
    force: bool = False,
    extra: Mapping[str, str] | None = None,
    arrays: Sequence[np.ndarray] = (),
) -> None:
    """Write a bundle as `jobs.compile` does, all of it or nothing.

    ``extra`` are further text files by name, ``arrays`` weights that aren't in the executable.
    """
    with bundle.staged(path, force=force) as directory, tempfile.TemporaryDirectory(prefix="nnfuze-") as scratch:
        linked = export_library(executable, Path(scratch) / bundle.LIBRARY, resolve(manifest.target.string))
        shutil.copyfile(linked, directory / bundle.LIBRARY)
        weights.write(directory / weights.WEIGHTS, arrays)
        bundle.seal(directory, manifest, extra or {})


def write_tiny_bundle(path: Path) -> Path:
    """Write the bundle of a small classifier of one task, as `jobs.compile` would; return where."""
    mod = tvm.transform.Sequential(pipeline.merge_phases())(load([classifier()], ["one"]))
    target = resolve("host")
    parts = take_apart(build.lower(mod, target))
    finished = build.finished(parts.mod, target)
    found = [(k.name, [(list(shape), dtype) for shape, dtype in k.arguments]) for k in metrics.kernels(finished)]
    kernels = [KernelRecord(name=name, calls=1, arguments=arguments) for name, arguments in found]
    record = parts.record
    own = {"target": describe_target(target), "kernels": kernels, "weights": record}
    manifest = Manifest(**signature_records(*signature(mod)), **own)
    executable = build.generate(finished, target, interface(signature(mod), found, record))
    write_bundle(path, executable, manifest, arrays=parts.arrays)
    return path


def rewrite(path: Path, **changes: object) -> None:
    """Change manifest fields and seal the manifest again."""
    manifest = bundle.read_manifest(path).model_copy(update=changes)
    (path / "manifest.json").write_text(manifest.to_json())
