"""Options, addresses, paths and names that can't be."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from tests.hostile.harness import Case
from tests.hostile.networks import network
from tests.tiny_networks import samples

# Half of a character, as Python has it where a path is no UTF-8.
BYTE = os.fsdecode(b"\xff")


def _numbers(bundle: Path, model: Path, sample: str) -> Iterator[Sequence[str | Path]]:
    build = ["compile", model, "-o", "out"]
    board = ["--tracker", "127.0.0.1:9", "--key", "pi"]
    for seconds in ("nan", "inf", "-inf", "1e300", "-1", "1_0", "²"):
        yield [*build, *board, "--wait", seconds]
        yield ["devices", "list", "--tracker", "127.0.0.1:9", "--wait", seconds]
        yield ["devices", "check", "rpi4", "--tracker", "127.0.0.1:9", "--wait", seconds]
        yield ["deploy", bundle, *board, "--wait", seconds]
    for count in ("0", "-1", "nan", "1e9", "99999999999999999999999999", "²", ""):
        yield [*build, "--threads", count]
        yield ["run", bundle, "--input", sample, "--threads", count]
        yield ["bench", bundle, "--repeats", count]
        if count != "0":
            yield [*build, "--trials", count]
        yield ["deploy", bundle, *board, "--wait", "0", "--repeat", count]
    for share in ("nan", "inf", "-inf", "1e-300", "1e300", "text"):
        if share != "1e-300":
            yield [*build, "--prune", share]
    for port in ("0", "-1", "65536", "nan", "²"):
        yield ["devices", "tracker", "--port", port]


def _addresses(bundle: Path, model: Path) -> Iterator[Sequence[str | Path]]:
    addresses = [
        "127.0.0.1:²", "127.0.0.1:９190", "127.0.0.1:+9", "127.0.0.1:0", "127.0.0.1:65536", "127.0.0.1:9", "127.0.0.1",
        ":9190", "", f"{'a' * 64}.example:9190", f"{'a.' * 200}b:9190", "a..b:9190", f"{BYTE}:9190", "\u202e.b:9190",
        "[::1]:9", "[::1:9", "::::::9", "a\0b:9190", "a b:9190", "[/red]:9190", "\x1b[31m:9190", "xn--\xff:9190",
        "127.0.0.1:" + "9" * 5000, "256.256.256.256:9190",
    ]  # fmt: skip
    for n, address in enumerate(addresses):
        verbs: list[list[str | Path]] = [
            ["devices", "list", "--tracker", address, "--wait", "0"],
            ["compile", model, "-o", "out", "--tracker", address, "--key", "pi", "--wait", "0"],
            ["deploy", bundle, "--tracker", address, "--key", "pi", "--wait", "0"],
            ["devices", "check", "rpi4", "--tracker", address, "--wait", "0"],
        ]
        yield verbs[n % 4]


def _targets(model: Path) -> Iterator[Sequence[str | Path]]:
    for text in (
        "toaster", "", "[/red]", "\x1b[31m", "a" * 100_000, "{", "{}", "[]", '{"kind": 1}',
        '{"kind": "llvm", "mtriple": 3}',
        '{"kind": "llvm", "mtriple": "bogus"}', '{"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "bogus"}',
        '{"kind": "llvm", "mattr": ["+bogus"]}', '{"kind": "llvm", "mattr": "avx2"}', '{"kind": "llvm", "mattr": [1]}',
        '{"kind": "llvm", "mtriple": "x86_64-linux-gnu\\u0000"}', '{"kind": "llvm", "num-cores": 1e300}',
        '{"kind": "llvm", "num-cores": NaN}', '{"kind": "llvm", "num-cores": true, "wobble": 1}',
        '{"kind": "llvm", "host": {"kind": "llvm", "host": {"kind": "bogus"}}}', '{"kind": "c"}', '{"kind": "cuda"}',
        '{"kind": "llvm", "mtriple": "wasm32-unknown-unknown"}', '{"kind": "llvm", "mtriple": "-"}',
        '{"kind": "llvm", "mtriple": "x86_64-\\ud800"}', '{"kind": "llvm", "jit": "bogus"}',
        '{"kind": "llvm", "mabi": "bogus"}', '{"kind": "llvm", "mfloat-abi": "bogus"}',
        '{"kind": "llvm", "cl-opt": ["--bogus"]}', '{"kind": "llvm", "cl-opt": ["-help"]}',
        '{"kind": "llvm", "vector-width": -1}', '{"kind": "llvm", "fast-math": "bogus"}',
        '{"kind": "llvm", "tag": "bogus"}', '{"kind": "llvm", "keys": 3}', '{"a":' * 5000 + "1" + "}" * 5000,
        '{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "haswell"}',
    ):  # fmt: skip
        yield ["compile", model, "-o", "out", "--no-compare", "--target", text]


def _shapes(folder: Path, model: Path) -> Iterator[Sequence[str | Path]]:
    graph = network([helper.make_node("Relu", ["x"], ["y"])], {"x": [None, None]})
    onnx.save(graph, folder / "open.onnx")
    for text in (
        "x=1000000000000,4", "x=" + "9" * 5000, "x=2147483648,1", "x=4,0", "x=" + ",".join("1" * 500), "x=²,1", "=1,2",
        "x=1.5,2", "x=1_0,٣", "\x1b[31m=1,2", "[/red]=1,2", "x" * 100_000 + "=1", "x=100000,100000",
    ):  # fmt: skip
        yield ["compile", folder / "open.onnx", "-o", "out", "--no-compare", "--shape", text]
    for option in ("--chain", "--state", "--share-input"):
        for text in (
            "",
            "=",
            "x=",
            "x=net:0[99999999999999]",
            "x=net:²",
            "\x1b[31m\n=net:0",
            "x=net:-1",
            "[/red]",
            "x" * 9999,
        ):
            if (option, text) != ("--share-input", ""):
                yield ["compile", model, "-o", "out", "--no-compare", option, text]
    for text in ("net.x*0", "net.x*[1,", "net.x-1e999,net.x", "[/red]", "," * 100_000, "net.x*" + "9" * 3000):
        yield ["compile", model, "-o", "out", "--no-compare", "--share-input", f"f={text}"]


def _paths(folder: Path, bundle: Path, model: Path, sample: str) -> Iterator[Sequence[str | Path]]:
    os.mkfifo(folder / "pipe")
    os.mkdir(folder / "folder")
    (folder / "private").write_bytes(b"")
    build = ["compile", model, "--no-compare", "-o", "out"]
    for path in (
        folder / "pipe", folder / "folder", "/dev/zero", "/dev/full", "/dev/tty", "/proc/self/mem", "a\0b", "\ud800",
        f"{BYTE}.onnx", "a" * 300, "a/" * 3000, "", "/", "\x1b[31m\n", "[/red]", "/dev/null",
    ):  # fmt: skip
        yield ["compile", path, "-o", "out"]
        yield [*build, "--policy", path]
        yield [*build, "--evaluation", path]
        yield ["run", bundle, "--input", f"x={path}"]
        yield ["inspect", path]
        yield ["tune", "--work-dir", path]
    for path in ("a\0b", "\ud800", "a" * 300, "/proc/out", "/dev/null/out", "/dev/full", folder / "pipe"):
        yield ["compile", model, "--no-compare", "-o", path]
        yield [*build, "--dump-ir", path]
        yield [*build, "--trials", "1", "--work-dir", path]
        yield ["run", bundle, "--input", sample, "-o", path]
    yield [*build, "--calibration", folder / "pipe", "--quantize", "int8"]
    yield ["compile", model, "--no-compare", "-o", f"out{BYTE}"]
    yield ["compile", f"{BYTE}={model}", "--no-compare", "-o", "out"]
    yield ["compile", f"a\x1b[31m\n={model}", "--no-compare", "-o", "out"]
    yield ["compile", f"{'a' * 250}={model}", "--no-compare", "-o", "out"]
    yield ["compile", *[model] * 3, "-o", "out"]


def _good(folder: Path, bundle: Path, model: Path, sample: str) -> Iterator[tuple[str, Sequence[str | Path]]]:
    """Give what looks odd, and works."""
    yield "task of markup", ["compile", f"[/red]={model}", "--no-compare", "-o", "out"]
    yield "output of markup", ["compile", model, "--no-compare", "-o", "[/red][bold]"]
    yield "output with control characters", ["compile", model, "--no-compare", "-o", "out\x1b[31m\n"]
    (folder / "[").mkdir()
    shutil.copy(model, folder / "[/red].onnx")
    yield "file of markup", ["analyze", folder / "[/red].onnx"]
    yield "many threads", ["run", bundle, "--input", sample, "--threads", "2"]
    constant = network(
        [helper.make_node("Relu", ["c"], ["y"])], {}, {"c": numpy_helper.to_array(numpy_helper.from_array(np.ones(3)))}
    )
    onnx.save(constant, folder / "constant.onnx")
    yield "nothing to compute", ["compile", folder / "constant.onnx", "--no-compare", "-o", "out"]


def cases(folder: Path, bundle: Path, model: Path) -> Iterator[Case]:
    """Give every option to a verb that takes it."""
    np.save(folder.parent / "x.npy", samples(1))
    sample = f"x={folder.parent / 'x.npy'}"
    groups = {
        "number": _numbers(bundle, model, sample),
        "address": _addresses(bundle, model),
        "target": _targets(model),
        "shape": _shapes(folder, model),
        "path": _paths(folder, bundle, model, sample),
    }
    for kind, group in groups.items():
        for arguments in group:
            words = " ".join(str(each) for each in arguments if each not in (bundle, model, sample))
            yield Case(f"{kind}: {words[:90]!r}", arguments, (0, 2) if _is_fine(arguments) else (2,))
    for name, arguments in _good(folder, bundle, model, sample):
        yield Case(f"good: {name}", arguments, (0, 2) if name == "nothing to compute" else (0,))


def _is_fine(arguments: Sequence[str | Path]) -> bool:
    """Whether a command may work: what LLVM ignores, options that say nothing, more than there is."""
    ignored = ("mabi", "cl-opt", '"tag"')
    if arguments[-1] == "" and arguments[-2] in ("--policy", "--evaluation"):
        return True
    huge = str(arguments[-1]).startswith("9999") and arguments[0] in ("run", "bench")
    return huge or any(word in str(arguments[-1]) for word in ignored)
