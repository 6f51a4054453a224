"""Instructions that an emulated AArch64 CPU executes, counted by QEMU with the plugin `count.c`."""

from __future__ import annotations

import hashlib
import os
import shutil
import struct
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.engines.base import Unavailable
from benchmarks.workloads import kept
from nnfuze_tvm.devices.remote import emulator
from nnfuze_tvm.errors import DeviceError

_HERE = Path(__file__).parent
_PLUGIN, _GUEST = _HERE / "count.c", _HERE / "guest.py"

# Under which names the interpreter and what it needs for itself are mapped: a board's program has none of them.
_INTERPRETER = ("/bin/python3", "/lib-dynload/", "/numpy/", "/numpy.libs/", "/libffi.so")

_SECONDS = 3600.0


@dataclass(frozen=True)
class Count:
    """Instructions executed: in all, multiplications of the SIMD and floating-point unit, loads, stores."""

    instructions: float = 0
    multiply: float = 0
    load: float = 0
    store: float = 0

    @property
    def other(self) -> float:
        """What is neither multiplication nor load nor store."""
        return self.instructions - self.multiply - self.load - self.store

    def __add__(self, o: Count) -> Count:
        return Count(
            self.instructions + o.instructions, self.multiply + o.multiply, self.load + o.load, self.store + o.store
        )

    def __sub__(self, o: Count) -> Count:
        return self + Count(-o.instructions, -o.multiply, -o.load, -o.store)

    def __truediv__(self, n: float) -> Count:
        return Count(self.instructions / n, self.multiply / n, self.load / n, self.store / n)


@dataclass(frozen=True)
class Block:
    """Straight-line code: the file it is mapped from, its address there, how often it ran, and what that executed."""

    file: str
    address: int
    runs: int
    count: Count


def digest() -> str:
    """Return a digest of what decides about counts on this side: the plugin and the program that is counted."""
    return hashlib.sha256(_PLUGIN.read_bytes() + _GUEST.read_bytes()).hexdigest()[:10]


def plugin(work_dir: Path) -> Path:
    """Return the plugin, compiled by the first call.

    Raises
    ------
    DeviceError
        If there is no C compiler, or it refuses.
    """
    compiler = next((path for name in ("cc", "gcc", "clang") if (path := shutil.which(name))), None)
    if compiler is None:
        raise DeviceError("no C compiler for QEMU's plugin: sudo apt install gcc")

    def compile_plugin(folder: Path) -> None:
        command = [compiler, "-O2", "-shared", "-fPIC", "-o", str(folder / "count.so"), str(_PLUGIN)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise DeviceError(f"{_PLUGIN.name}: does not compile ({_last_line(done.stderr)})")

    return (
        kept(work_dir / f"plugin-{hashlib.sha256(_PLUGIN.read_bytes()).hexdigest()[:10]}", compile_plugin) / "count.so"
    )


def run(
    cpu: str,
    engine: str,
    model: Path,
    inputs: Sequence[np.ndarray],
    inferences: int,
    *,
    work_dir: Path,
    packages: Sequence[Path] = (),
) -> tuple[list[Block], list[np.ndarray]]:
    """Run inferences on an emulated CPU, on one thread.

    Parameters
    ----------
    cpu : str
        One of QEMU's models.
    engine : str
        One of the engines of `guest`.
    model : Path
        What that engine loads.
    inputs : sequence of numpy.ndarray
        The network's inputs, in order.
    inferences : int
        How many are counted.
    work_dir : Path
        Where the plugin is kept.
    packages : sequence of Path
        Further folders with Python packages for AArch64.

    Returns
    -------
    list of Block
        What was executed, all inferences together.
    list of numpy.ndarray
        The outputs of the last inference.

    Raises
    ------
    Unavailable
        If the engine fails, with its own last words.
    """
    command, environment = emulator.python(cpu, emulator.folder())
    environment |= {"PYTHONHASHSEED": "0", "TVM_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}
    environment["PYTHONPATH"] = os.pathsep.join([*(str(p.resolve()) for p in packages), environment["PYTHONPATH"]])
    with tempfile.TemporaryDirectory(prefix="nnfuze-") as folder:
        scratch = Path(folder)
        np.savez(scratch / "inputs.npz", **{str(n): array for n, array in enumerate(inputs)})  # type: ignore[arg-type]
        plug = ["-plugin", f"{plugin(work_dir).resolve()},out={scratch / 'counts'}"]
        arguments = [engine, model.resolve(), scratch / "inputs.npz", scratch / "outputs.npz", inferences]
        command = [*command[:-1], *plug, command[-1], str(_GUEST), *map(str, arguments)]
        try:
            done = subprocess.run(
                command, capture_output=True, text=True, cwd=scratch, env=environment, timeout=_SECONDS
            )
        except subprocess.TimeoutExpired:
            raise Unavailable(f"takes more than {_SECONDS / 60:.0f} minutes under emulation") from None
        if done.returncode:
            raise Unavailable(f"fails on {cpu}: {_last_line(done.stderr) or f'exit code {done.returncode}'}")
        with np.load(scratch / "outputs.npz") as archive:
            outputs = [archive[str(n)] for n in range(len(archive.files))]
        return blocks((scratch / "counts").read_text(), done.stdout), outputs


def package(requirement: str, work_dir: Path) -> Path:
    """Return a folder with an AArch64 package from PyPI, without what it depends on.

    Parameters
    ----------
    requirement : str
        ``name==version``.
    work_dir : Path
        Where it is kept.

    Raises
    ------
    Unavailable
        If there is none, or no network.
    """

    def install(folder: Path) -> None:
        platforms = [f"manylinux_2_{minor}_aarch64" for minor in (17, 24, 27, 28, 34)]
        command = [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
            *("--only-binary=:all:", "--implementation", "cp", "--python-version", "3.11", "--target", str(folder)),
            *(f"--platform={platform}" for platform in [*platforms, "manylinux2014_aarch64"]),
            requirement,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise Unavailable(f"pip finds no {requirement} for aarch64 ({_last_line(done.stderr)})")

    return kept(work_dir / "packages" / requirement.replace("==", "-"), install)


def _last_line(text: str) -> str:
    lines = text.strip().splitlines()
    return lines[-1].strip() if lines else ""


def blocks(counts: str, maps: str) -> list[Block]:
    """Return what the plugin wrote, its addresses resolved by what the program said about its memory map."""
    regions: list[tuple[int, int, str]] = []
    bases: dict[str, int] = {}
    for line in maps.splitlines():
        fields = line.split(None, 5)
        if len(fields) < 5:
            continue
        start, end = (int(part, 16) for part in fields[0].split("-"))
        file = fields[5].strip() if len(fields) == 6 else ""
        bases.setdefault(file, start)
        regions.append((start, end, file))
    found = []
    for line in counts.splitlines():
        first, *numbers = line.split()
        address = int(first, 16)
        runs, *one = map(int, numbers)
        file = next((file for start, end, file in regions if start <= address < end), "")
        offset = address - bases[file] if file else address
        found.append(Block(file, offset, runs, Count(*(runs * n for n in one))))
    return found


def without_interpreter(found: Iterable[Block]) -> Count:
    """Return the sum of what the engine and the C library executed."""
    counted = (b.count for b in found if not any(part in b.file for part in _INTERPRETER))
    return sum(counted, Count())


def by_function(found: Iterable[Block], library: Path) -> dict[str, Count]:
    """Return the counts of a library's functions, by their names in its symbol table."""
    symbols = functions(library)
    starts = np.array([address for address, _ in symbols])
    counts: dict[str, Count] = {}
    for block in found:
        if block.file == str(library.resolve()):
            place = int(np.searchsorted(starts, block.address, side="right")) - 1
            name = symbols[place][1] if place >= 0 else ""
            counts[name] = counts.get(name, Count()) + block.count
    return counts


def functions(library: Path) -> list[tuple[int, str]]:
    """Return address and name of the functions in a 64-bit little-endian ELF file, by address."""
    data = library.read_bytes()
    (table,) = struct.unpack_from("<Q", data, 0x28)
    size, count = struct.unpack_from("<HH", data, 0x3A)
    sections = [struct.unpack_from("<IIQQQQIIQQ", data, table + n * size) for n in range(count)]
    found = []
    for _, kind, _, _, offset, length, link, _, _, entry in sections:
        if kind != 2:  # SHT_SYMTAB
            continue
        names = sections[link][4]
        for place in range(offset, offset + length, entry):
            name, info, _, section, address, _ = struct.unpack_from("<IBBHQQ", data, place)
            if info & 15 == 2 and section:  # STT_FUNC, defined here
                found.append((address, data[names + name : data.index(b"\0", names + name)].decode()))
    return sorted(found)
