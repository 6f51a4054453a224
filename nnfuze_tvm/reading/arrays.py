"""Arrays from ``.npy`` and ``.npz`` files: numbers only, and nothing is held before it is known to be there."""

from __future__ import annotations

import ast
import math
import os
import re
import struct
import zipfile
from typing import IO, Any

import numpy as np

from nnfuze_tvm.errors import InputError
from nnfuze_tvm.reading import memory
from nnfuze_tvm.reading.files import open_file

_MAGIC = b"\x93NUMPY"
_LONGEST_HEADER = 4096
_MOST_ARRAYS = 4096
_LONGEST_NAME = 1024
# What NumPy makes, and zip programs by default.
_COMPRESSIONS = (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED)
# Deflate makes of a byte at most as many.
_DEFLATED = 1032
_DTYPE = re.compile(r"[<>|=]?[biufc][1-9][0-9]?")
_BLOCK = 1 << 20
# What was read ahead, by what its file was then.
_ahead: dict[tuple[int, ...], dict[str, np.ndarray]] = {}


def read_npy(path: str | os.PathLike[str]) -> np.ndarray:
    """Return the array of a file that ``numpy.save`` wrote.

    Raises
    ------
    OSError
        If it can't be read; ``strerror`` says why.
    ValueError
        If it holds anything but one whole array of numbers; the text says what.
    """
    with open_file(path) as file:
        return _array(file, os.fstat(file.fileno()).st_size)


def read_npz(path: str | os.PathLike[str], *, ahead: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of a file that ``numpy.savez`` or ``savez_compressed`` wrote, by name.

    Parameters
    ----------
    path : path
        The file.
    ahead : bool
        It is read to check it: who reads it next, if it is still the same, gets the same arrays.

    Raises
    ------
    OSError, ValueError
        As `read_npy`.
    """
    with open_file(path) as file:
        status = os.fstat(file.fileno())
        version = (status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns, status.st_ctime_ns)
        arrays = _ahead.pop(version, None)
        if arrays is None:
            arrays = _archive(file, status.st_size)
    if ahead:
        _ahead[version] = arrays
    return arrays


def _archive(file: IO[bytes], size: int) -> dict[str, np.ndarray]:
    if file.read(len(_MAGIC)) == _MAGIC:
        raise ValueError("a single array; save arrays by name with numpy.savez")
    file.seek(0)
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, ValueError, NotImplementedError, struct.error, OverflowError):
        raise ValueError("not an .npz file; save arrays by name with numpy.savez") from None
    with archive:
        members = archive.infolist()
        _check_members(members, size)
        arrays = {}
        for member in members:
            name = member.filename.removesuffix(".npy")
            try:
                with archive.open(member) as stream:
                    arrays[name] = _array(stream, member.file_size)
            except OSError:
                raise
            except Exception as error:  # those of zipfile and zlib have no common type
                said = error if type(error) is ValueError else "damaged"
                raise ValueError(f"array {name!r}: {said}") from None
        return arrays


def read_arrays(path: str, what: str, *, ahead: bool = False) -> dict[str, np.ndarray]:
    """Return the arrays of an ``.npz`` file.

    Parameters
    ----------
    path : str
        The file.
    what : str
        What it holds, for messages.
    ahead : bool
        As for `read_npz`.

    Raises
    ------
    InputError
        If it can't be read, isn't one, or is empty.
    """
    try:
        arrays = read_npz(path, ahead=ahead)
    except OSError as error:
        raise InputError(f"{what} {path}: can't be read ({error.strerror or error})") from None
    except ValueError as error:
        raise InputError(f"{what} {path}: {error}") from None
    if not arrays:
        raise InputError(f"{what} {path}: holds no arrays; save arrays by input name with numpy.savez")
    return arrays


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    if len(members) > _MOST_ARRAYS:
        raise ValueError(f"holds {len(members)} members; {_MOST_ARRAYS} arrays at most are read")
    seen: set[str] = set()
    for member in members:
        name = member.filename.removesuffix(".npy")
        if not name or len(name) > _LONGEST_NAME or not name.isprintable() or member.is_dir():
            raise ValueError(f"member {name!r:.60}: no name of an array")
        if name in seen:
            raise ValueError(f"two arrays are called {name!r}")
        seen.add(name)
        if member.flag_bits & 1:
            raise ValueError(f"array {name!r}: encrypted, which is not supported")
        if member.compress_type not in _COMPRESSIONS:
            raise ValueError(f"array {name!r}: compressed in another way than numpy.savez_compressed does")
        if member.compress_size > size or member.file_size > _DEFLATED * member.compress_size + _LONGEST_HEADER:
            raise ValueError(f"array {name!r}: damaged, its sizes don't fit the file's")
    if reason := memory.too_large(sum(member.file_size for member in members)):
        raise ValueError(reason)


def _array(stream: IO[bytes], size: int) -> np.ndarray:
    """Read an array from a stream that has so many bytes, perhaps others behind it."""
    start = stream.read(8)
    width = {1: 2, 2: 4, 3: 4}.get(start[6] if len(start) == 8 else 0)
    if start[:6] != _MAGIC or width is None:
        several = "; of an .npz file, give the path alone, without a name" if start[:2] == b"PK" else ""
        raise ValueError(f"not an array that numpy.save wrote{several}")
    length = int.from_bytes(stream.read(width), "little")
    if length > _LONGEST_HEADER:
        raise ValueError(f"its header has {length} characters; those of arrays of numbers are short")
    shape, order, dtype = _parse_header(stream.read(length))
    count = math.prod(shape)
    needed = count * dtype.itemsize
    if needed > size - 8 - width - length:
        raise ValueError(f"cut off: its header says {memory.readable(needed)}, there are {memory.readable(size)}")
    if reason := memory.too_large(needed):
        raise ValueError(reason)
    data, filled = np.empty(needed, np.uint8), 0
    while filled < needed:
        block = stream.read(min(_BLOCK, needed - filled))
        if not block:
            raise ValueError("cut off")
        data[filled : filled + len(block)] = np.frombuffer(block, np.uint8)
        filled += len(block)
    # The end of a member is where its checksum is compared.
    stream.read(1)
    return data.view(dtype).reshape(shape, order=order)


def _parse_header(text: bytes) -> tuple[tuple[int, ...], Any, np.dtype]:
    wrong = ValueError("its header is not one that numpy.save writes")
    if text.count(b"(") + text.count(b"[") + text.count(b"{") > 8 or not text.startswith(b"{"):
        raise wrong
    try:
        fields = ast.literal_eval(text.decode("latin1").strip())
        dtype, fortran, shape = (fields.pop(key) for key in ("descr", "fortran_order", "shape"))
        if fields:
            raise ValueError
    except Exception:  # whatever Python's parser makes of it
        raise wrong from None
    if not isinstance(dtype, str) or not _DTYPE.fullmatch(dtype):
        raise ValueError(f"holds values of type {dtype!r:.40}, not numbers")
    if not isinstance(shape, tuple) or not all(type(dim) is int and 0 <= dim < 1 << 62 for dim in shape):
        raise wrong
    # NumPy multiplies all of them, zeros or not.
    if len(shape) > 32 or math.prod(max(dim, 1) for dim in shape) >= 1 << 62 or not isinstance(fortran, bool):
        raise wrong
    try:
        return shape, "F" if fortran else "C", np.dtype(dtype)
    except TypeError:
        raise ValueError(f"holds values of type {dtype!r:.40}, not numbers") from None
