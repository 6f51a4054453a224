"""Files that should hold arrays."""

from __future__ import annotations

import io
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from tests.hostile.harness import Case
from tests.tiny_networks import SHAPE, samples


def npy(header: str | bytes, data: bytes = b"", version: int = 1) -> bytes:
    """Return an ``.npy`` file with any header."""
    text = header.encode("latin1") if isinstance(header, str) else header
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text + data


def header(shape: str = "(2, 2, 6, 6)", descr: str = "'<f4'", order: str = "False") -> str:
    """Return the header that goes before an array."""
    return f"{{'descr': {descr}, 'fortran_order': {order}, 'shape': {shape}, }}\n"


def saved(array: np.ndarray, **options: bool) -> bytes:
    """Return an array as ``numpy.save`` writes it."""
    file = io.BytesIO()
    np.save(file, array, **options)
    return file.getvalue()


GOOD = saved(samples(2))


def npy_files() -> Iterator[tuple[str, bytes]]:
    """Give files that are no arrays, or not what they say."""
    yield "empty", b""
    yield "magic only", b"\x93NUMPY"
    yield "version 9", b"\x93NUMPY\x09\x00" + GOOD[8:]
    yield "text", b"1 2 3\n"
    yield "cut", GOOD[:-7]
    yield "no header", npy("")
    yield "header cut", GOOD[:30]
    yield "header is no dict", npy("[1, 2]\n")
    yield "header does not parse", npy("{'descr': \n")
    yield "header calls", npy("{'descr': __import__('os').system('true')}\n")
    yield "header with nul", npy("{'descr'\0: 1}\n")
    yield "header not text", npy(bytes(range(128, 256)))
    yield "header nested", npy("(" * 1000 + ")" * 1000)
    yield "header signs", npy("-" * 8000 + "1")
    yield "header nested, long", npy("[" * 50000 + "]" * 50000, version=2)
    yield "header of 4 GB", b"\x93NUMPY\x02\x00\xff\xff\xff\xff" + b" " * 100
    yield "header of 1 MB", npy(" " * 1_000_000 + header(), samples(2).tobytes(), version=2)
    yield "keys missing", npy("{'descr': '<f4'}\n")
    yield "keys too many", npy(header()[:-2] + "'x': 1}\n", samples(2).tobytes())
    yield "16 GB", npy(header("(4000000000,)"))
    yield "many GB", npy(header("(10000000000000000000000, 3)"))
    yield "negative", npy(header("(-2, 3)"))
    yield "shape of floats", npy(header("(2.0, 3)"))
    yield "shape of bools", npy(header("(True, 3)"))
    yield "shape text", npy(header("'abc'"))
    yield "rank 100", npy(header("(" + "1, " * 100 + ")"), b"1234")
    yield "zero and huge", npy(header("(0, 10000000000000000000000)"))
    yield "order text", npy(header(order="'yes'"), samples(2).tobytes())
    yield "dtype unknown", npy(header(descr="'<q9'"))
    yield "dtype huge", npy(header(descr="'<f99999999999'"))
    yield "dtype void", npy(header("(2,)", descr="'|V2000000000'"))
    yield "dtype text", npy(header("(2,)", descr="'<U3'"), b"\0" * 24)
    yield "dtype dates", npy(header("(2,)", descr="'<M8[s]'"), b"\0" * 16)
    yield "dtype structure", npy(header("(2,)", descr="[('a', '<f4'), ('b', '<f4')]"), b"\0" * 16)
    yield "dtype nested", npy(header("(2,)", descr="[" * 90 + "('a', '<f4')" + "]" * 90), b"\0" * 16)
    yield "complex", saved(samples(2).astype("complex64"))
    yield "pickle", saved(np.array([{}, None], dtype=object), allow_pickle=True)
    yield "bare pickle", b"cos\nsystem\n(S'true'\ntR."
    yield "python 2", npy("{'descr': '<f4', 'fortran_order': False, 'shape': (2L, 3L), }\n", b"\0" * 24)


def archive(members: dict[str, bytes], how: int = zipfile.ZIP_DEFLATED) -> bytes:
    """Return a zip file."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", how) as writer:
        for name, data in members.items():
            writer.writestr(name, data)
    return file.getvalue()


def patched(data: bytes, at: int, what: bytes, *, central: bool) -> bytes:
    """Return an archive of one member with some bytes of its headers changed."""
    start = data.rindex(b"PK\x01\x02") if central else 0
    return data[: start + at] + what + data[start + at + len(what) :]


def npz_files() -> Iterator[tuple[str, bytes]]:
    """Give archives that are damaged, lie, or hold something else."""
    good = archive({"x.npy": GOOD})
    yield "empty", b""
    yield "no zip", b"no zip"
    yield "zip without members", archive({})
    yield "zip cut", good[: len(good) // 2]
    yield "end only", b"PK\x05\x06" + bytes(18)
    yield "single array", GOOD
    yield "member is no array", archive({"x.npy": b"hello"})
    yield "member without suffix", archive({"x": b"hello"})
    yield "member empty", archive({"x.npy": b""})
    yield "member cut", archive({"x.npy": GOOD[:-9]})
    yield "member pickled", archive({"x.npy": saved(np.array([{}], dtype=object), allow_pickle=True)})
    yield "member of 16 GB", archive({"x.npy": npy(header("(4000000000,)"))})
    yield "member nested", archive({"x.npy": npy("(" * 1000 + ")" * 1000)})
    yield "folder", archive({"x/": b"", "x.npy": GOOD, "../y.npy": GOOD})
    yield "two of a name", _twice()
    yield "text beside", archive({"x.npy": GOOD, "read me.txt": b"text"})
    yield "name with control characters", archive({"x\x1b[31m\n\a.npy": GOOD})
    yield "name too long", archive({"x" * 60000 + ".npy": GOOD})
    yield "name empty", archive({".npy": GOOD})
    yield "markup", archive({"[/red].npy": GOOD})
    yield "many members", archive({f"{n}.npy": b"" for n in range(20000)}, zipfile.ZIP_STORED)
    for how, name in ((zipfile.ZIP_BZIP2, "bzip2"), (zipfile.ZIP_LZMA, "lzma")):
        packed = archive({"x.npy": GOOD}, how)
        yield f"{name} broken", packed[:60] + bytes(60) + packed[120:]
    yield "deflate broken", good[:60] + b"\xff" * 60 + good[120:]
    yield "checksum", patched(patched(good, 16, b"abcd", central=True), 14, b"abcd", central=False)
    encrypted = patched(patched(good, 8, b"\x01\x00", central=True), 6, b"\x01\x00", central=False)
    yield "encrypted", encrypted
    yield "unknown compression", patched(patched(good, 10, b"\x63\x00", central=True), 8, b"\x63\x00", central=False)
    yield "declares 4 GB", patched(good, 24, b"\xf0\xff\xff\xff", central=True)
    yield "packed size of 4 GB", patched(good, 20, b"\xf0\xff\xff\xff", central=True)
    yield "offset beyond", patched(good, 42, b"\xf0\xff\xff\x7f", central=True)
    yield "stored, shorter", patched(archive({"x.npy": GOOD}, zipfile.ZIP_STORED), 24, b"\x10\0\0\0", central=True)
    yield "bomb", _bomb()


def _twice() -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as writer:
        writer.writestr("x.npy", GOOD)
        writer.writestr("y.npy", saved(samples(2) + 1))
    return file.getvalue().replace(b"y.npy", b"x.npy")


def _bomb() -> bytes:
    """Return 64 GB of zeros, as the headers have it, in some kilobytes."""
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    head = npy(header("(16000000000,)"))
    packed = packer.compress(head + bytes(4 << 20)) + packer.flush()
    data = bytearray(archive({"x.npy": b""}, zipfile.ZIP_STORED))
    name = data.index(b"x.npy") + 5
    central = data.rindex(b"PK\x01\x02")
    local = bytes(data[:name]) + packed
    record = bytearray(data[central:])
    size = (64_000_000_000 & 0xFFFFFFFF) - 1
    record[10:12] = (8).to_bytes(2, "little")
    record[20:28] = len(packed).to_bytes(4, "little") + size.to_bytes(4, "little")
    end = record.rindex(b"PK\x05\x06")
    record[end + 16 : end + 20] = len(local).to_bytes(4, "little")
    return local + bytes(record)


def cases(folder: Path, bundle: Path, model: Path) -> Iterator[Case]:
    """Give every file to a verb that takes such."""
    for name, data in npy_files():
        path = folder / f"{name}.npy"
        path.write_bytes(data)
        yield Case(f"npy: {name}", ["run", bundle, "--input", f"x={path}"])
    verbs: list[list[str | Path]] = [
        ["compile", model, "-o", "out", "--quantize", "int8", "--calibration"],
        ["compile", model, "-o", "out", "--evaluation"],
        ["deploy", bundle, "--tracker", "127.0.0.1:9", "--key", "pi", "--wait", "0", "--inputs"],
        ["run", bundle, "--input"],
    ]
    for n, (name, data) in enumerate(npz_files()):
        path = folder / f"{name}.npz"
        path.write_bytes(data)
        verb = verbs[n % 4]
        yield Case(f"npz: {name}", [*verb, f"x={path}" if verb[0] == "run" else path])
    yield from _labels(folder, model)


def _labels(folder: Path, model: Path) -> Iterator[Case]:
    task = model.stem
    wrong = {
        "too few": np.zeros(5, int),
        "too many": np.zeros(7, int),
        "none": np.zeros(0, int),
        "negative": np.full(6, -2),
        "very negative": np.full(6, -(2**62)),
        "too large": np.full(6, 2**62),
        "unsigned": np.full(6, 2**64 - 1, "uint64"),
        "floats": np.zeros(6),
        "bools": np.zeros(6, bool),
        "rank 2": np.zeros((6, 1), int),
        "rank 0": np.zeros((), int),
        "text": np.array(["a"] * 6),
    }
    for name, labels in wrong.items():
        path = folder / f"labels {name}.npz"
        np.savez(path, x=samples(6), **{task: labels})
        yield Case(f"labels: {name}", ["compile", model, "--evaluation", path, "-o", "out"])
    inputs = {
        "rank 0": np.zeros((), "float32"),
        "rank 30": np.zeros((1,) * 30, "float32"),
        "no samples": np.zeros((0, *SHAPE[1:]), "float32"),
        "float64": samples(2).astype("float64"),
        "other shape": samples(2)[:, :1],
        "nan": np.full((2, *SHAPE[1:]), np.nan, "float32"),
        "big endian": samples(2).astype(">f4"),
    }
    for name, array in inputs.items():
        path = folder / f"samples {name}.npz"
        np.savez(path, x=array)
        codes = (0, 2) if name in ("big endian", "float64") else (2,)
        arguments = ["compile", model, "--quantize", "int8", "--no-compare", "--calibration", path, "-o", "out"]
        yield Case(f"samples: {name}", arguments, codes)
