"""Bundles of executables that no compilation made."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

from tvm import relax

from nnfuze_tvm.deploy import bundle
from nnfuze_tvm.deploy.manifest import Manifest
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.devices.toolchain import export_library


def write_bundle(
    path: str | os.PathLike,
    executable: relax.VMExecutable,
    manifest: Manifest,
    *,
    force: bool = False,
    extra: Mapping[str, str] | None = None,
) -> None:
    """Write a bundle as `jobs.compile` does, all of it or nothing; ``extra`` are further text files by name."""
    with bundle.staged(path, force=force) as directory, tempfile.TemporaryDirectory(prefix="nnfuze-") as scratch:
        linked = export_library(executable, Path(scratch) / bundle.LIBRARY, resolve(manifest.target.string))
        shutil.copyfile(linked, directory / bundle.LIBRARY)
        bundle.seal(directory, manifest, extra or {})
