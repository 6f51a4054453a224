"""Whatever files, options and addresses hold: one line, the right exit code, nothing left behind."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import onnx
import pytest

from nnfuze_tvm import cli
from nnfuze_tvm.cli import guard
from nnfuze_tvm.errors import printable
from nnfuze_tvm.reading import files, memory
from nnfuze_tvm.reading.arrays import read_npy, read_npz
from tests.hostile import mutants
from tests.tiny_networks import classifier


def _suite(*options: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.hostile", *options],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"


@pytest.mark.timeout(900)
def test_every_input_ends_in_one_line() -> None:
    """Two cases of eight: more than 200."""
    _suite("--part", "0-1/8")


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_every_other_input_ends_in_one_line() -> None:
    _suite("--part", "2-7/8")


def test_mutants(tmp_path: Path) -> None:
    assert list(mutants.run(200, tmp_path)) == []


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_many_mutants(tmp_path: Path) -> None:
    assert list(mutants.run(4000, tmp_path, seed=1000)) == []


CRASHES = {
    "os.kill(os.getpid(), signal.SIGSEGV)": "native code was ended by SIGSEGV",
    "os.kill(os.getpid(), signal.SIGKILL)": "out of memory",
    "os.write(2, b'terminate called: std::bad_alloc') and os.abort()": "out of memory",
    "os.write(2, b'LLVM ERROR: IO failure: No space left on device') and os._exit(1)": "No space left on device",
    "os._exit(1)": "native code ended",
    "os.write(2, b'a remark of C++') and 0": None,
    "len(bytearray(1 << 50))": "out of memory",
    "(_ for _ in ()).throw(RuntimeError('std::bad_alloc'))": "out of memory",
}


_EACH = """
import os, signal, sys
from nnfuze_tvm import cli

for command in {commands}:
    if not os.fork():
        cli._application = lambda _: lambda *_, **__: eval(command)
        cli.main()
    code = os.waitstatus_to_exitcode(os.wait()[1])
    print("ended", code, file=sys.stderr, flush=True)
"""


def test_crashes_of_native_code_end_in_one_line(tmp_path: Path) -> None:
    code = _EACH.format(commands=list(CRASHES))
    env = {**os.environ, "PYTHONPATH": os.getcwd(), "XDG_STATE_HOME": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, check=False)
    lines = iter(done.stderr.splitlines())
    for wanted in CRASHES.values():
        if wanted is not None:
            line = next(lines)
            assert line.startswith(f"error: {wanted}")
            assert not line.startswith("error: native") or Path(line.rpartition(" with ")[2]).is_file()
        assert next(lines) == f"ended {2 if wanted else 0}"
    assert list(lines) == []


def test_signals_reach_the_child_once(tmp_path: Path) -> None:
    """Ctrl-C comes to both processes, and the parent hands it on."""
    lines = [
        "import os, sys, time",
        "from nnfuze_tvm import cli",
        "def wait(_):",
        "    try:",
        "        print('ready', flush=True); time.sleep(60)",
        "    finally:",
        "        time.sleep(0.3); print('cleaned', flush=True)",
        "cli._run = wait",
        "cli.main()",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        env={**os.environ, "PYTHONPATH": os.getcwd()},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, out, errors) == (130, "cleaned\n", "error: interrupted\n")


def test_a_child_ends_with_its_parent(tmp_path: Path) -> None:
    wait = "print(os.getpid(), flush=True) or time.sleep(60)"
    code = f"import os, time\nfrom nnfuze_tvm import cli\ncli._run = lambda _: {wait}\ncli.main()"
    env = {**os.environ, "PYTHONPATH": os.getcwd()}
    with subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert int(process.stdout.readline()) != process.pid
        process.kill()
        # The pipe ends when the last of both has.
        assert process.stdout.read() == ""


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("a\x1b[31m\nb\x00\u202e", r"a\x1b[31m b\x00\u202e"),
        ("x" * 500, f"{'x' * 148} … {'x' * 148}"),
        ("\udcff é 中", r"\udcff é 中"),
        ("\x07" * 10_000, None),
    ],
)
def test_what_is_printed_is_one_short_line(text: str, line: str | None) -> None:
    assert len(printable(text)) <= 300 and printable(text).isprintable()
    assert line is None or printable(text) == line


class TestFiles:
    def test_what_is_no_file_is_not_waited_for(self, tmp_path: Path) -> None:
        os.mkfifo(tmp_path / "pipe")
        for path, why in {
            tmp_path / "pipe": "a pipe, not a file",
            tmp_path: "a directory, not a file",
            "/dev/zero": "a device, not a file",
            "a\0b": "no file has such a name",
            "\ud800": "no file has such a name",
        }.items():
            with pytest.raises(OSError, match=why):
                files.read_file(path)

    def test_larger_than_memory(self, tmp_path: Path) -> None:
        with open(tmp_path / "large", "wb") as file:
            file.truncate(1 << 42)
        with pytest.raises(OSError, match=r"takes 4\.4 TB of memory; .* left here"):
            files.read_file(tmp_path / "large")

    def test_growing(self, tmp_path: Path) -> None:
        """What is read ends, whoever writes."""
        path, stop = tmp_path / "log", threading.Event()
        path.write_bytes(b"0" * 100_000)

        def write() -> None:
            with open(path, "ab") as file:
                while not stop.is_set():
                    file.write(b"0" * 10_000)
                    file.flush()

        writer = threading.Thread(target=write)
        writer.start()
        try:
            with pytest.raises(OSError, match="it is being written"):
                # Where others run, it takes a while until a write comes in between.
                deadline = time.monotonic() + 30
                while time.monotonic() < deadline:
                    files.read_file(path)
        finally:
            stop.set()
            writer.join()

    def test_json(self) -> None:
        assert files.parse_json(b'{"a": [1, "\xc3\xa9"]}') == {"a": [1, "é"]}
        for text in ("[" * 65 + "]" * 65, "[" * 100_000, "", b"\xff"):
            with pytest.raises(ValueError):
                files.parse_json(text)
        assert files.parse_json("[" * 64 + "]" * 64)


@pytest.mark.parametrize("dtype", ["bool", "int8", "uint16", "int64", "float16", "float32", ">f4", "complex64"])
@pytest.mark.parametrize("shape", [(), (3,), (0, 2), (2, 3, 4)])
def test_arrays_are_what_numpy_reads(dtype: str, shape: tuple[int, ...], tmp_path: Path) -> None:
    array = np.asfortranarray(np.random.default_rng(0).integers(0, 2, shape).astype(dtype))
    np.save(tmp_path / "a.npy", array)
    np.savez(tmp_path / "a.npz", a=array, b=array + array)
    np.savez_compressed(tmp_path / "c.npz", a=array)
    found = [read_npy(tmp_path / "a.npy"), read_npz(tmp_path / "a.npz")["a"], read_npz(tmp_path / "c.npz")["a"]]
    for one in found:
        np.testing.assert_array_equal(one, array)
        assert (one.dtype, one.flags.writeable) == (array.dtype, True)
    assert list(read_npz(tmp_path / "a.npz")) == ["a", "b"]


def test_what_is_read_ahead_is_read_once(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, a=np.zeros(3))
    first = read_npz(path, ahead=True)["a"]
    assert read_npz(path)["a"] is first and read_npz(path)["a"] is not first
    read_npz(path, ahead=True)
    np.savez(path, a=np.ones(4))
    np.testing.assert_array_equal(read_npz(path)["a"], np.ones(4))


def test_networks_larger_than_memory_are_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where every tensor fits, but not all together."""
    onnx.save(classifier(), tmp_path / "net.onnx")
    monkeypatch.setattr(memory, "_SMALL", 0)
    monkeypatch.setattr(memory, "available", lambda: 2000)
    assert cli.run(["compile", str(tmp_path / "net.onnx"), "--no-compare", "-o", str(tmp_path / "out")]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    said = r"error: net: running it takes 2\.\d+ KB of memory; 2 KB are left here; use smaller shapes"
    assert re.fullmatch(said, line)
    monkeypatch.setattr(memory, "available", lambda: 1100)
    assert cli.run(["compile", str(tmp_path / "net.onnx"), "--no-compare", "-o", str(tmp_path / "out")]) == 2
    assert "'conv' (Conv): a result would not fit: it takes 1.15 KB" in capsys.readouterr().err


def test_memory() -> None:
    assert 0 < memory.available() < 1 << 50
    assert memory.too_large(1) == "" and "TB" in memory.too_large(1 << 45)
    assert memory.readable(1) == "1 B" and memory.readable(1 << 70) == "more than 1000 TB"
    assert guard.OUT_OF_MEMORY.startswith("out of memory")
