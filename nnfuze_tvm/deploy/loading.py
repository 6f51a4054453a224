"""The libraries of bundles: loaded from the very bytes that were checked, and gone again when nobody needs them."""

from __future__ import annotations

import hashlib
import itertools
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import tvm

from nnfuze_tvm.devices import scratch as temporary
from nnfuze_tvm.errors import BundleError, last_line
from nnfuze_tvm.reading.files import open_file, read_file

_BLOCK = 1 << 18

# TVM's own `load_module` keeps whatever it loaded until the process ends.
_load = tvm.get_global_func("ffi.Module.load_from_file.so")
_copies = itertools.count()


def load(path: str | os.PathLike[str]) -> tvm.runtime.Module:
    """Load a library that was built just now; it is unloaded when nothing refers to it or its functions any more.

    The system's loader knows libraries by their paths: what replaces a loaded library would not be loaded.
    """
    return _load(os.path.abspath(path), "so")


def load_checked(path: Path, sha256: str) -> tvm.runtime.Module:
    """Load a library if it has that checksum, whatever happens to the file meanwhile; see `load`.

    It is read once, into memory that has no name, and loaded from there.

    Raises
    ------
    BundleError
        If it can't be read, is another or can't be loaded.
    """
    with _private_copy(path.name) as (file, name):
        if _copy(path, file) != sha256:
            raise damaged(path)
        try:
            return _load(name, "so")
        except Exception as error:  # the loader's errors have no common type
            raise BundleError(f"{path}: can't be loaded ({reason(error)})") from None


def read_checked(path: Path, sha256: str) -> bytearray:
    """Return the bytes of a file of a bundle if it has that checksum.

    Raises
    ------
    BundleError
        If it can't be read or is another.
    """
    try:
        data = bytearray(read_file(path))
    except OSError as error:
        raise unreadable(path, error) from None
    if hashlib.sha256(data).hexdigest() != sha256:
        raise damaged(path)
    return data


def sha256(path: Path) -> str:
    """Return the checksum of a file."""
    return _copy(path, None)


def damaged(path: Path) -> BundleError:
    """Return the error of a file with another checksum than it should have."""
    return BundleError(f"{path}: damaged, its checksum doesn't match; copy or compile the bundle again")


def reason(error: BaseException) -> str:
    """Return what went wrong in a few words: of TVM's messages the last line, before which come its own frames."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return last_line(error)


def unreadable(path: Path, error: OSError) -> BundleError:
    """Return the error of a file that the system doesn't let us read."""
    return BundleError(f"{path}: can't be read ({error.strerror}); copy the bundle again")


def _copy(path: Path, to: int | None) -> str:
    digest = hashlib.sha256()
    block = memoryview(bytearray(_BLOCK))
    try:
        with open_file(path) as file:
            while count := file.readinto(block):
                digest.update(block[:count])
                rest = block[: count if to is not None else 0]
                while to is not None and rest:
                    rest = rest[os.write(to, rest) :]
    except OSError as error:
        raise unreadable(path, error) from None
    return digest.hexdigest()


@contextmanager
def _private_copy(name: str) -> Iterator[tuple[int, str]]:
    """Give a file that only this process knows, and a path for the loader that no library had before."""
    with ExitStack() as stack:
        file = _in_memory(name)
        if file is not None:
            # The loader takes equal paths for equal libraries, and numbers of files are used again.
            number = "".join("./" if bit == "1" else "/" for bit in f"{next(_copies):b}")
            path = f"/proc/self/fd/{number}{file}"
        else:
            path = os.path.join(stack.enter_context(temporary.folder()), name)
            file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o700)
        stack.callback(os.close, file)
        yield file, path


def _in_memory(name: str) -> int | None:
    """Open a file that is in memory only; None where the system has none."""
    if not (hasattr(os, "memfd_create") and os.path.isdir("/proc/self/fd")):
        return None
    with suppress(OSError):
        return os.memfd_create(name, os.MFD_CLOEXEC)
    return None
