"""The file of a bundle's weights: arrays behind each other, as kernels or the library read them; see `apart`."""

from __future__ import annotations

import hashlib
import math
import mmap
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import tvm

from nnfuze_tvm.deploy import loading
from nnfuze_tvm.deploy.manifest import WeightsRecord
from nnfuze_tvm.reading.files import open_file

WEIGHTS = "weights.bin"

# Kernels load whole vectors from where an array begins.
_ALIGNMENT = 64
_BLOCK = 1 << 20


def size(record: WeightsRecord) -> int:
    """Return the bytes of the file of weights."""
    return _places(record)[1]


def write(path: Path, arrays: Sequence[np.ndarray]) -> None:
    """Write the file of some weights, none if there are none."""
    if not arrays:
        return
    with open(path, "wb") as file:
        for array in arrays:
            file.write(bytes(-file.tell() % _ALIGNMENT))
            file.write(np.ascontiguousarray(array).data)


class Weights:
    """The weights of a bundle in memory.

    Parameters
    ----------
    memory : buffer
        The bytes of the file.
    record : WeightsRecord
        What they are.

    Attributes
    ----------
    arrays : list of numpy.ndarray
        The weights, where they are in ``memory``.
    """

    def __init__(self, memory: mmap.mmap | bytearray, record: WeightsRecord) -> None:
        self._memory = memory
        places, _ = _places(record)
        self._spread = places[len(record.kept)] if record.spread else len(memory)
        self.arrays = [
            np.frombuffer(memory, dtype, math.prod(shape), place).reshape(shape)
            for place, (shape, dtype) in zip(places, [*record.kept, *record.spread], strict=True)
        ]

    def tensors(self) -> list[tvm.runtime.Tensor]:
        """Return the weights as tensors, without a copy."""
        return [tvm.runtime.from_dlpack(array) for array in self.arrays]

    def forget(self) -> None:
        """Give back the memory of what the library has made larger weights of."""
        begin = -(-self._spread // mmap.PAGESIZE) * mmap.PAGESIZE
        if isinstance(self._memory, mmap.mmap) and hasattr(mmap, "MADV_DONTNEED") and begin < len(self._memory):
            self._memory.madvise(mmap.MADV_DONTNEED, begin)


def read(path: Path, record: WeightsRecord, sha256: str, *, mapped: bool = False) -> Weights:
    """Read the file of a bundle's weights if it has that checksum.

    Parameters
    ----------
    path : Path
        The file.
    record : WeightsRecord
        What is in it.
    sha256 : str
        Its checksum.
    mapped : bool
        Leave them in the file, from which the system takes them when they are needed, once for all processes. By
        default they are copied first: what was checked stays what it was, whatever happens to the file.

    Raises
    ------
    BundleError
        If it can't be read or is another.
    """
    try:
        with open_file(path) as file:
            if os.fstat(file.fileno()).st_size != (length := size(record)):
                raise loading.damaged(path)
            if mapped:
                # Pages of a copy-on-write map that nobody writes to are the file's.
                memory = mmap.mmap(file.fileno(), length, access=mmap.ACCESS_COPY)
            else:
                # What is shared with nobody can be given back.
                memory = mmap.mmap(-1, length, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            found = _digest(memory, None if mapped else file.readinto)
    except OSError as error:
        raise loading.unreadable(path, error) from None
    if found != sha256:
        raise loading.damaged(path)
    return Weights(memory, record)


def _digest(memory: mmap.mmap, fill: Callable[[memoryview], int] | None) -> str:
    """Return the checksum of memory; what ``fill`` puts there block by block is looked at while the next one comes."""
    digest = hashlib.sha256()
    view = memoryview(memory)
    with ThreadPoolExecutor(1) as thread:
        done = 0
        while done < len(view):
            block = view[done : done + _BLOCK]
            count = len(block) if fill is None else fill(block)
            if not count:
                break  # it became shorter meanwhile
            thread.submit(digest.update, block[:count])
            done += count
    return digest.hexdigest()


def _places(record: WeightsRecord) -> tuple[list[int], int]:
    """Return where in the file each array begins, and how long the file is."""
    places, end = [], 0
    for shape, dtype in [*record.kept, *record.spread]:
        begin = -(-end // _ALIGNMENT) * _ALIGNMENT
        places.append(begin)
        end = begin + math.prod(shape) * np.dtype(dtype).itemsize
    return places, end
