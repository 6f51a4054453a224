"""Linking what TVM compiled into a shared library, for this machine or for another one."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import tvm
from tvm import relax

from nnfuze_tvm.errors import DeviceError

# libm is only recorded as needed when a kernel calls it.
_FLAGS = ("-shared", "-fPIC", "-Wl,--build-id=none", "-Wl,--as-needed")
# The same without a compiler's driver in front of the linker.
_BARE_FLAGS = ("-shared", "-z", "noseparate-code", "--build-id=none", "--as-needed")

# The oldest C library that the wheels of TVM itself run on.
_GLIBC = "2.28"


@dataclass(frozen=True)
class _Machine:
    """How one processor family is called by those who link for it."""

    gnu_triple: str
    package: str


_MACHINES = {
    "aarch64": _Machine("aarch64-linux-gnu", "gcc-aarch64-linux-gnu"),
    "arm": _Machine("arm-linux-gnueabihf", "gcc-arm-linux-gnueabihf"),
    "x86_64": _Machine("x86_64-linux-gnu", "gcc-x86-64-linux-gnu"),
}


@dataclass(frozen=True)
class Linker:
    """A command that links object files into a shared library.

    An instance can be passed as ``fcompile`` to TVM's ``export_library``.

    Attributes
    ----------
    command : tuple of str
        The program and its leading arguments.
    env : mapping of str to str
        Environment variables that are set for the command.
    strip : bool
        Whether symbols are left out (bytes on a small device count); the dynamic symbol table, where TVM's exports
        are, stays.
    flags, libraries : tuple of str
        What comes before and after the object files.
    """

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    strip: bool = True
    flags: tuple[str, ...] = _FLAGS
    libraries: tuple[str, ...] = ("-lm",)

    output_format = "so"
    object_format = "o"

    def __call__(self, output: str, objects: Sequence[str], options: Sequence[str] | None = None) -> None:
        """Link ``objects`` into the shared library ``output``.

        Raises
        ------
        DeviceError
            If the command can't be started or fails.
        """
        flags = [*self.flags, *(["-s"] if self.strip else [])]
        command = [*self.command, *flags, "-o", str(output), *(options or ()), *objects, *self.libraries]
        try:
            done = subprocess.run(
                command,
                env={**os.environ, **self.env},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                check=False,
            )
        except OSError as err:
            raise DeviceError(f"can't start the linker {self.command[0]}: {err.strerror}") from err
        if done.returncode != 0:
            lines = done.stdout.decode(errors="replace").strip().splitlines() or ["no message"]
            errors = [line for line in lines if "error" in line.lower()] or lines
            raise DeviceError(f"linking {output} with {' '.join(self.command)} failed: {errors[0].strip()}")


def linker_for(target: tvm.target.Target) -> Linker:
    """Return the fastest linker on this machine that can link for ``target``.

    This is the system's C compiler where it links for the target's processor family, else the cross compiler
    of the distribution, else the ``zig cc`` of the Python package ``ziglang``.

    Raises
    ------
    DeviceError
        If there is none of them, or if the target's processor is not known.
    """
    here = _family(platform.machine())
    family = _target_family(target) or here
    machine = _MACHINES.get(family)
    if machine is None:
        known = ", ".join(_MACHINES)
        raise DeviceError(f"no linker is known for the processor {family!r} (known: {known})")
    names = ("cc", "gcc", "clang") if family == here else (f"{machine.gnu_triple}-gcc",)
    for name in names:
        if path := shutil.which(name):
            # Code and read-only data in one segment, and nothing that is written to on pages of its own, save up
            # to 12 KB of alignment; what C programs begin with is 1 KB. zig does without all of it.
            return Linker((path, "-Wl,-z,noseparate-code,-z,norelro", "-nostartfiles"))
    if zig := _zig():
        return Linker((zig, "cc", "-target", f"{machine.gnu_triple}.{_GLIBC}"), _zig_caches())
    package = "gcc" if family == here else machine.package
    raise DeviceError(
        f"no linker for {family}: none of {', '.join(names)} is on the PATH and the Python package ziglang "
        f"is missing; install {package} or run 'pip install ziglang'"
    )


def quick_linker_for(target: tvm.target.Target) -> Linker:
    """Return a linker like ``linker_for``'s that takes some milliseconds, for libraries that don't last.

    That is the linker which the compiler's driver would start, without what the driver adds for C programs. Where the
    driver doesn't say which one, as with zig, it is ``linker_for``'s.
    """
    linker = linker_for(target)
    return linker if linker.env else _without_driver(linker.command[0]) or linker


@cache
def _without_driver(driver: str) -> Linker | None:
    questions = ("-print-prog-name=ld", "-print-file-name=libm.so.6", "-print-libgcc-file-name")
    try:
        answers = [
            subprocess.check_output([driver, question], text=True, stderr=subprocess.DEVNULL).strip()
            for question in questions
        ]
    except (OSError, subprocess.CalledProcessError):
        return None
    program, *libraries = answers
    path = shutil.which(program)
    if path is None or not all(Path(library).is_file() for library in libraries):
        return None
    return Linker((path,), flags=_BARE_FLAGS, libraries=tuple(libraries))


def runs_here(target: tvm.target.Target) -> bool:
    """Tell whether this machine's processor is of the family that ``target`` names."""
    here = _family(platform.machine())
    return (_target_family(target) or here) == here


def export_library(
    executable: relax.VMExecutable | tvm.runtime.Executable | tvm.runtime.Module,
    path: str | os.PathLike[str],
    target: tvm.target.Target,
) -> Path:
    """Write ``executable`` as a stripped shared library that TVM's runtime can load without a compiler.

    The file is linked under a temporary name and then renamed: there is never half a library at ``path``.

    Parameters
    ----------
    executable
        What TVM compiled for ``target``.
    path
        Where the library goes; its directory must exist.
    target
        What ``executable`` was compiled for: decides which linker is taken.

    Raises
    ------
    DeviceError
        If no linker for the target is installed, or if linking or writing fails.
    """
    path = Path(path)
    linker = linker_for(target)
    try:
        with tempfile.TemporaryDirectory(prefix=".link-", dir=path.parent) as scratch:
            linked = Path(scratch) / path.with_suffix(".so").name
            executable.export_library(str(linked), fcompile=linker, workspace_dir=scratch)
            os.replace(linked, path)
    except OSError as err:
        raise DeviceError(f"can't write {path}: {err.strerror or err}") from err
    return path


def _family(machine: str) -> str:
    """Return the key of ``_MACHINES`` for a machine name or the first part of a target triple."""
    machine = machine.lower()
    if machine in ("aarch64", "arm64"):
        return "aarch64"
    if machine.startswith(("arm", "thumb")):
        return "arm"
    return {"amd64": "x86_64", "x86-64": "x86_64"}.get(machine, machine)


def _target_family(target: tvm.target.Target) -> str | None:
    """Return the processor family that the target's triple names, None without a triple (this machine)."""
    attrs: Any = (target.host or target).attrs
    triple = str(attrs.get("mtriple", "") or "")
    return _family(triple.split("-", 1)[0]) if triple else None


def _zig() -> str | None:
    spec = importlib.util.find_spec("ziglang")
    for folder in (spec and spec.submodule_search_locations) or ():
        zig = Path(folder) / "zig"
        if zig.is_file():
            return str(zig)
    return None


def _zig_caches() -> dict[str, str]:
    """Keep zig's caches out of the working directory; the first link fills them in 10 to 20 s."""
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nnfuze" / "zig"
    try:
        base.mkdir(parents=True, exist_ok=True)
    except OSError:
        base = Path(tempfile.gettempdir()) / f"nnfuze-zig-{os.getuid()}"
    names = ("ZIG_GLOBAL_CACHE_DIR", "ZIG_LOCAL_CACHE_DIR")
    return {name: os.environ.get(name, str(base)) for name in names}
