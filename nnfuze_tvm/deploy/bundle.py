"""What is written for the device, and the object that loads and runs it."""

from __future__ import annotations

import ctypes
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.deploy import loading, weights
from nnfuze_tvm.deploy.manifest import (
    CPU_FLAGS,
    INTERFACE,
    MANIFEST,
    FileRecord,
    Manifest,
    TargetRecord,
    WeightsRecord,
    interface,
    read_manifest,
    recorded_signature,
)
from nnfuze_tvm.deploy.runner import Input, Output, Runner, Stream
from nnfuze_tvm.deploy.weights import WEIGHTS
from nnfuze_tvm.devices import cpu, scratch
from nnfuze_tvm.errors import BundleError, NNFuzeError

LIBRARY = "lib.so"
_NEEDED = (LIBRARY, WEIGHTS)


def seal(directory: Path, manifest: Manifest, extra: Mapping[str, str]) -> None:
    """Write the remaining files and the manifest with everybody's checksums."""
    for name, text in extra.items():
        (directory / name).write_text(text, encoding="utf-8")
    files = {}
    for file in sorted(directory.iterdir()):
        if file.name != MANIFEST:
            files[file.name] = FileRecord(sha256=loading.sha256(file), bytes=file.stat().st_size)
    text = manifest.model_copy(update={"files": files}).to_json()
    (directory / MANIFEST).write_text(text, encoding="utf-8")


def check_destination(path: str | os.PathLike, *, force: bool = False) -> Path:
    """Return where a bundle will be written, or say at once why it can't be.

    Of a link that is to be replaced, that is where it points.

    Raises
    ------
    BundleError
        If the directory exists (with ``force``: and is no bundle), or its parent can't be written.
    """
    final = Path(os.path.realpath(path) if force and os.path.islink(path) else os.path.abspath(path))
    old = _set_aside(final)
    # Whoever was replacing it was killed.
    if old.exists() and not os.path.lexists(final):
        old.rename(final)
    elif (old / MANIFEST).is_file():
        shutil.rmtree(old, ignore_errors=True)
    if os.path.lexists(final):
        is_bundle = (final / MANIFEST).is_file()
        is_empty = final.is_dir() and not any(final.iterdir())
        if not (is_bundle or is_empty):
            raise BundleError(f"{path}: exists and is not a bundle, so it is not replaced; choose another output")
        if not force:
            raise BundleError(f"{path}: exists already; use --force to replace it")
    parent = next(parent for parent in final.parents if os.path.lexists(parent))
    try:
        with scratch.folder(parent=parent):
            pass
    except OSError as error:
        raise BundleError(f"{path}: can't be written ({loading.reason(error)}); choose another output") from None
    return final


@contextmanager
def staged(path: str | os.PathLike, *, force: bool = False) -> Iterator[Path]:
    """Give a temporary sibling of ``path`` that becomes ``path`` when the block ends well, and vanishes otherwise."""
    final = check_destination(path, force=force)
    missing = [parent for parent in final.parents if not parent.exists()]
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
        try:
            with scratch.folder(parent=final.parent) as directory:
                yield directory
                directory.chmod(0o755)
                _publish(directory, final, force)
        finally:
            for parent in missing:
                if not any(parent.iterdir()):
                    parent.rmdir()
    except NNFuzeError:
        raise
    except OSError as error:
        raise BundleError(f"{path}: can't be written ({loading.reason(error)}); nothing was left behind") from None


def _publish(directory: Path, final: Path, force: bool) -> None:
    if not os.path.lexists(final):
        directory.rename(final)
    elif not force:
        raise BundleError(f"{final}: appeared meanwhile; use --force to replace it")
    elif not _exchange(directory, final):
        old = _set_aside(final)
        shutil.rmtree(old, ignore_errors=True)
        final.rename(old)
        try:
            directory.rename(final)
        except OSError:
            old.rename(final)
            raise
        shutil.rmtree(old, ignore_errors=True)


def _set_aside(final: Path) -> Path:
    """Return what a bundle is called while another one takes its place, where that isn't one step."""
    return final.with_name(f".{final.name}.old")


def _exchange(one: Path, other: Path) -> bool:
    """Swap two directories in one step; ``False`` where the system has no such call."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    at_cwd, exchange = -100, 2
    return renameat2(at_cwd, os.fsencode(one), at_cwd, os.fsencode(other), exchange) == 0


class Bundle:
    """A compiled network, ready to run: ``Bundle.load("out").run({"audio": x})["keyword"]``.

    Several bundles can be loaded at the same time. Made by `Bundle.load`.
    """

    def __init__(self, path: Path, manifest: Manifest, runner: Runner) -> None:
        self.path = path
        self.manifest = manifest
        self.runner = runner

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        threads: int | None = None,
        *,
        trust: str | os.PathLike | None = None,
    ) -> Bundle:
        """Load a bundle after checking that it is whole and made for this CPU.

        A bundle is a program: whoever made it can do what you can. Load those of people you trust.

        Parameters
        ----------
        path : path
            The bundle's directory.
        threads : int, optional
            How many threads a call uses; by default as many as the bundle was compiled for.
        trust : path, optional
            An Ed25519 public key, as PEM: load only what ``nnfuze bundle sign`` signed with its private key.

        Raises
        ------
        BundleError
            If the bundle is missing, damaged, of another format, for another CPU, or not signed with that key. No code
            of it has run then.
        """
        directory = Path(path)
        manifest = read_manifest(directory, trust)
        check_files(directory, manifest, but=_NEEDED)
        check_cpu(directory, manifest.target)
        library = loading.load_checked(directory / LIBRARY, manifest.files[LIBRARY].sha256)
        _check_interface(directory, manifest, library)
        count = manifest.threads if threads is None else threads
        found = read_weights(directory, manifest)
        tensors = found.tensors() if found else ()
        runner = Runner(library, *recorded_signature(manifest), threads=count, tensors=tensors)
        if found:
            found.forget()
        return cls(directory, manifest, runner)

    @property
    def tasks(self) -> list[str]:
        """The tasks, in the order they were given."""
        return self.manifest.tasks

    @property
    def inputs(self) -> list[Input]:
        """The inputs that `run` takes."""
        return self.runner.inputs

    @property
    def outputs(self) -> list[Output]:
        """The outputs that `run` gives."""
        return self.runner.outputs

    @property
    def states(self) -> list[Input]:
        """What one call of `run` leaves to the next."""
        return self.runner.states

    def run(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray | dict[str, np.ndarray]]:
        """Run all tasks once, with the states that the call before left; see `Runner.run`."""
        return self.runner.run(inputs)

    def reset(self) -> None:
        """Begin anew: the states become zeros."""
        self.runner.reset()

    def stream(self) -> Stream:
        """Return a stream with states of its own: ``stream.run(inputs)``, ``stream.reset()``."""
        return self.runner.stream()

    def __repr__(self) -> str:
        return f"Bundle({str(self.path)!r}, tasks={self.tasks})"


def bytes_on_disk(directory: Path) -> int:
    """Return the bytes of what a device needs of a bundle: the library, the weights and the manifest."""
    return sum(file.stat().st_size for name in (*_NEEDED, MANIFEST) if (file := directory / name).exists())


def read_weights(directory: Path, manifest: Manifest) -> weights.Weights | None:
    """Return the weights of a bundle, checked; None if it has no file of them."""
    if not _has_weights(manifest):
        return None
    checksum = manifest.files[WEIGHTS].sha256
    return weights.read(directory / WEIGHTS, manifest.weights, checksum, mapped=manifest.mapped)


def _has_weights(manifest: Manifest) -> bool:
    return manifest.weights != WeightsRecord()


def check_files(directory: Path, manifest: Manifest, but: Sequence[str] = ()) -> None:
    """Check the files of a bundle, all ``but`` some, against the checksums in its manifest."""
    needed = [LIBRARY, *([WEIGHTS] if _has_weights(manifest) else [])]
    for name in needed:
        if name not in manifest.files:
            raise BundleError(f"{directory}: the manifest lists no {name}; compile the bundle again")
    for name, record in manifest.files.items():
        file = directory / name
        inside = name == Path(name).name
        if name in but or (inside and not file.exists() and name not in needed):
            continue  # a report may be deleted to save space
        if not (inside and loading.sha256(file) == record.sha256):
            raise loading.damaged(file)


def _check_interface(directory: Path, manifest: Manifest, library: tvm.runtime.Module) -> None:
    """Check that a library takes and gives what the manifest says: its kernels don't, and would write anywhere."""
    machine = relax.VirtualMachine(library, tvm.cpu())
    try:
        found = machine[INTERFACE]()
    except AttributeError:
        # ``main`` checks what it is given.
        found = None
    kernels = [(kernel.name, kernel.arguments) for kernel in manifest.kernels]
    said = found or kernels or _has_weights(manifest)
    if said and found != interface(recorded_signature(manifest), kernels, manifest.weights):
        what = f"{MANIFEST} and {LIBRARY} differ in their inputs, outputs, weights or kernels"
        raise BundleError(f"{directory}: {what}; compile the bundle again")


def check_cpu(directory: Path, target: TargetRecord) -> None:
    """Check that this CPU has what the code of a bundle uses."""
    if reason := unfit(target):
        raise BundleError(f"{directory}: {reason}; compile it for --target host on this machine")


def unfit(target: TargetRecord, where: cpu.Cpu | None = None) -> str | None:
    """Return why a CPU (by default this one) can't run code for a target, None if it can."""
    name = "this CPU" if where is None else "the board"
    where = where or cpu.this()
    if target.arch and target.arch != where.machine:
        return f"made for {target.arch}, {name} is {where.machine}"
    known = CPU_FLAGS.get(target.arch, {})
    missing = [feature for feature in target.features if known.get(feature, feature) not in where.flags]
    if where.flags and missing:
        made_for = f" ({target.cpu})" if target.cpu else ""
        return f"made for a CPU with {', '.join(missing)}{made_for}, which {name} lacks"
    return None
