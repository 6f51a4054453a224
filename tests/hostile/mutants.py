"""Files that were good, with something changed at random, and what reads them: nothing but this package's errors."""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import struct
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import tvm
from onnx import numpy_helper
from tvm import relax
from tvm.s_tir import meta_schedule as ms

from nnfuze_tvm.cli import guard
from nnfuze_tvm.deploy import manifest as manifests
from nnfuze_tvm.errors import NNFuzeError
from nnfuze_tvm.frontend import load
from nnfuze_tvm.frontend.exported_program import check_archive
from nnfuze_tvm.jobs import data, tune, tuning
from nnfuze_tvm.jobs.tuning.directory import Final, Trial, load_database
from nnfuze_tvm.jobs.tuning.kernels import _plain
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.schedules import families  # noqa: F401
from tests.frontend.tflite_files import File
from tests.hostile.arrays import archive, saved
from tests.hostile.networks import network, node
from tests.tiny_networks import classifier, samples

SECONDS = 10
NASTY: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, -(2**63), 10**30, 1e308, float("nan"), float("inf"), "", "x" * 5000,
    "\x1b[31m\n", "\0", "\ud800", "../..", [], [[]], {}, {"x": {"x": {}}}, [0] * 1000,
    json.loads("[" * 200 + "]" * 200),
]  # fmt: skip
NUMBERS = [
    struct.pack(kind, number)
    for kind, number in (
        ("<B", 0), ("<B", 255), ("<B", 128), ("<H", 65535), ("<i", -1), ("<i", 2**31 - 1), ("<I", 2**31), ("<q", -1),
        ("<q", 2**63 - 1), ("<I", 8), ("<f", float("nan")), ("<f", 1e38),
    )
]  # fmt: skip


def changed_bytes(good: bytes, rng: random.Random) -> bytes:
    """Return bytes with up to four changes."""
    found = bytearray(good)
    for _ in range(rng.choice([1, 1, 1, 2, 5])):
        at = rng.randrange(len(found) or 1)
        size = min(rng.choice([1, 1, 2, 4, 8, 32, 256]), len(found) - at)
        other = rng.randrange(len(found) or 1)
        # Most files are lost where bytes move.
        how = rng.choice([0, 0, 0, 1, 1, 4, 4, 5, 2, 3, 6])
        if how == 0 and found:
            found[at] ^= 1 << rng.randrange(8)
        elif how == 1:
            number = rng.choice(NUMBERS)
            found[at : at + len(number)] = number
        elif how == 2:
            del found[at : at + size]
        elif how == 3:
            found[at:at] = found[other : other + size]
        elif how == 4:
            found[at : at + size] = rng.randbytes(size)
        elif how == 5:
            found[at : at + size] = found[other : other + size]
        elif rng.random() < 0.3:
            del found[at:]
    return bytes(found)


def changed_network(good: onnx.ModelProto, rng: random.Random) -> bytes:
    """Return a network with a number, a name or a node changed."""
    model = onnx.ModelProto()
    model.CopyFrom(good)
    graph = model.graph
    number = rng.choice([-(2**63), -(10**9), -7, -1, 0, 1, 2, 3, 5, 64, 70_000, 10**9, 2**31, 2**62])
    where = rng.choice(graph.node)
    names = [name for each in graph.node for name in (*each.input, *each.output)]
    how = rng.randrange(8)
    if how == 0 and where.attribute:
        attribute = rng.choice(where.attribute)
        values = attribute.ints
        if values:
            values[rng.randrange(len(values))] = number
        else:
            attribute.i = number
    elif how == 1:
        weight = rng.choice(graph.initializer)
        values = numpy_helper.to_array(weight).copy()
        if values.size:
            values.flat[rng.randrange(values.size)] = number if values.dtype == np.int64 else rng.choice([np.nan, 1e38])
        weight.CopyFrom(numpy_helper.from_array(values, weight.name))
    elif how == 2:
        dims = rng.choice(graph.initializer).dims
        dims[rng.randrange(len(dims)) :] = [number] * rng.randint(0, 2)
    elif how == 3:
        dims = graph.input[0].type.tensor_type.shape.dim
        dims[rng.randrange(len(dims))].dim_value = number
    elif how == 4 and where.input:
        where.input[rng.randrange(len(where.input))] = rng.choice([*names, "", "nowhere"])
    elif how == 5:
        where.op_type = rng.choice(
            [each.op_type for each in graph.node] + ["Conv", "Loop", "Split", "OneHot", "Einsum"]
        )
    elif how == 6:
        graph.node.remove(where)
    else:
        model.opset_import[0].version = rng.choice([1, 5, 7, 9, 11, 13, 20])
    return model.SerializeToString()


def changed_json(good: Any, rng: random.Random) -> Any:
    """Return a document with one value or key exchanged, left out or added."""
    document = json.loads(json.dumps(good))
    places: list[tuple[Any, Any]] = []
    pending = [document]
    while pending:
        value = pending.pop()
        keys = list(value) if isinstance(value, dict) else list(range(len(value))) if isinstance(value, list) else []
        places += [(value, key) for key in keys]
        pending += [value[key] for key in keys]
    if not places:
        return rng.choice(NASTY)
    inside, key = rng.choice(places)
    how = rng.randrange(4)
    if how == 0:
        del inside[key]
    elif how == 1 and isinstance(inside, dict):
        inside[rng.choice(["", "x", "\ud800", "../x", "nnfuze"])] = rng.choice(NASTY)
    else:
        inside[key] = rng.choice(NASTY)
    return document


Reader = Callable[[Path], object]


def kinds(folder: Path) -> dict[str, tuple[Callable[[random.Random], bytes], str, Reader]]:
    """Return by kind what makes a mutant, its file's name, and what reads it."""
    networks = [classifier(), _shapes()]
    tflite_seed = _tflite()
    npz_seeds = [archive({"x.npy": saved(samples(2)), "y.npy": saved(np.arange(3))}, how) for how in (0, 8)]
    program = archive({"p/version": b"0", "p/models/model.json": b"{}", "p/data/weights/weight_0": bytes(100)})
    manifest = _manifest()
    workload = _workload()
    policy = {"default": {"keep": 1.0, "bits": 32, "rank": 0.5, "rank_error": 0.1},
              "layers": {"net/conv": {"bits": 32, "keep": 0.5}, "net/*": {"sparsity": 0.5},
                         "net/d?": {"weights": 4, "activations": 8, "format": "int"}}}  # fmt: skip
    options = {"models": ["a.onnx"], "trials": 3, "target": "host", "threads": 1, "shapes": {"x": [1, 2]}, "wait": 1.0,
               "chains": ["x=a:y[2]"], "states": ["h=g"], "quantize": "auto", "max_error": 0.1, "sparsity": 0.5,
               "finetune": "a.npz", "epochs": 3, "calibration": "a.npz"}  # fmt: skip
    trial = {"kernel": "k", "decisions": [1, 2], "seconds": [1e-3, 2e-3], "error": None, "device": "a:1", "rule": "r",
             "code": "c", "started": 1.0, "finished": 2.0, "trace": [[], []], "lost": []}  # fmt: skip
    assert Trial(**trial) and Final("k", ((1,),), ([1.0],), 1, "d")

    def text(document: Any, rng: random.Random) -> bytes:
        new = json.dumps(changed_json(document, rng)).encode()
        return changed_bytes(new, rng) if rng.random() < 0.3 else new

    def signed(rng: random.Random) -> bytes:
        fields = changed_json(manifest, rng)
        if isinstance(fields, dict):
            fields["sha256"] = manifests._digest(fields)
        return json.dumps(fields).encode()

    return {
        "network": (lambda rng: changed_network(rng.choice(networks), rng), "m.onnx", lambda p: load([p], ["m"])),
        "onnx": (
            lambda rng: changed_bytes(rng.choice(networks).SerializeToString(), rng),
            "m.onnx",
            lambda path: load([path], ["m"]),
        ),
        "tflite": (lambda rng: changed_bytes(tflite_seed, rng), "m.tflite", lambda path: load([path], ["m"])),
        "npz": (lambda rng: changed_bytes(rng.choice(npz_seeds), rng), "m.npz", lambda p: data.read_arrays(str(p), "")),
        "npy": (lambda rng: changed_bytes(saved(samples(1)), rng), "m.npy", lambda p: data.read_inputs([f"x={p}"])),
        "program": (lambda rng: changed_bytes(program, rng), "m.pt2", check_archive),
        "policy": (lambda rng: text(policy, rng), "policy.json", Policy.load),
        "options": (lambda rng: text(options, rng), "options.json", lambda p: tune._saved_request(str(p.parent), {})),
        "manifest": (signed, "manifest.json", lambda path: manifests.read_manifest(path.parent)),
        "journal": (
            lambda rng: b"\n".join([json.dumps(trial).encode(), text(trial, rng), b""]),
            "journal.jsonl",
            lambda path: tuning.read_journal(path.parent),
        ),
        "records": (lambda rng: text([0, [[[], []], [1.0], {"kind": "llvm"}, None]], rng) + b"\n",
                    "database_tuning_record.json", lambda path: _records(path, json.dumps(workload))),
        "kernels": (lambda rng: text(workload, rng) + b"\n", "database_workload.json", _workloads),
    }  # fmt: skip


def _workload() -> Any:
    """Return a kernel as MetaSchedule writes it."""
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((2, 3), "float32"))
    with builder.function("main", [x]):
        builder.emit_func_output(builder.emit(relax.op.nn.relu(x)))
    lowered = relax.transform.LegalizeOps()(builder.get())
    kernel = next(func for func in lowered.functions.values() if not isinstance(func, relax.Function))
    return json.loads(json.dumps(_plain(ms.database.Workload(tvm.IRModule({"main": kernel})).as_json())))


def _records(path: Path, kernels: str) -> object:
    (path.parent / "database_workload.json").write_text(kernels + "\n")
    return load_database(path.parent)


def _workloads(path: Path) -> object:
    (path.parent / "database_tuning_record.json").write_text("")
    return load_database(path.parent)


def _shapes() -> Any:
    """Return a network of operators that shapes and axes are given."""
    nodes = [
        node("Reshape", "x s", "a", allowzero=0),
        node("Transpose", "a", "b", perm=[1, 0, 2]),
        node("Gather", "b i", "c", axis=0),
        node("Slice", "c f t", "d"),
        node("Pad", "d p", "e", mode="constant"),
        node("Tile", "e n", "g"),
        node("ReduceSum", "g", "h", keepdims=1),
        node("Resize", "x none scales", "k", mode="nearest"),
        node("MaxPool", "k", "y", kernel_shape=[2, 2], strides=[2, 2]),
    ]
    whole = {"s": [4, 8, 8], "i": [0, 3, 1], "f": [1], "t": [4], "p": [0, 0, 1, 0, 0, 1], "n": [1, 2, 1]}
    weights = {name: np.array(value) for name, value in whole.items()}
    weights |= {"none": np.zeros(0, "float32"), "scales": np.array([1, 1, 2, 2], "float32")}
    return network(nodes, weights=weights, outputs=("y", "h"))


def _tflite() -> bytes:
    file, rng = File(), np.random.default_rng(0)
    x = file.input("x", (1, 6, 6, 2), "int8", scale=0.05, zero=3)
    kernel = file.constant(rng.integers(-9, 9, (4, 3, 3, 2)), "int8", scale=[0.1] * 4, axis=0)
    bias = file.constant(np.arange(4), "int32", scale=[0.005] * 4)
    conv = file.tensor("conv", (1, 4, 4, 4), "int8", scale=0.2)
    file.add("CONV_2D", [x, kernel, bias], [conv], "Conv2DOptions", padding=1, strideW=1, strideH=1)
    flat, shape = file.tensor("flat", (1, 64), "int8", scale=0.2), file.constant([1, 64])
    file.add("RESHAPE", [conv, shape], [flat])
    y = file.tensor("y", (1, 64), "int8", scale=1 / 256, zero=-128)
    file.add("SOFTMAX", [flat], [y], beta=1.0)
    file.output(y)
    return file.bytes()


def _manifest() -> Any:
    record = {"name": "x", "shape": [1, 2], "dtype": "float32"}
    target = manifests.TargetRecord(string="{}", triple="x86_64-linux-gnu", arch="x86_64", cpu="", features=["avx2"])
    kernel = manifests.KernelRecord(name="k", calls=1, arguments=[([1, 2], "float32")])
    made = manifests.Manifest(
        tasks=["t"],
        inputs=[manifests.InputRecord(**record)],
        outputs=[manifests.OutputRecord(task="t", **record)],
        target=target,
        kernels=[kernel],
        metrics={"latency": 1.0, "tasks": {"t": {"accuracy": 0.5, "labelled": 3}}},
        files={"lib.so": manifests.FileRecord(sha256="0", bytes=1)},
    )
    fields = json.loads(made.to_json())
    fields.pop("sha256")
    return fields


def run(count: int, folder: Path, seed: int = 0, batch: int = 25) -> Iterator[str]:
    """Make mutants of all kinds, read each, and give what is wrong with how that ended."""
    found = kinds(folder)
    names = list(found)
    jobs = [(names[n % len(names)], seed + n) for n in range(count)]
    for start in range(0, count, batch):
        part = jobs[start : start + batch]
        said = _fork(part, found, folder)
        if said is None and batch > 1:
            # One of them ended all.
            for job in part:
                said = _fork([job], found, folder)
                yield from [f"{job}: crashed or took too long"] if said is None else said
        else:
            yield from said or []


def _fork(jobs: list[tuple[str, int]], found: dict[str, Any], folder: Path) -> list[str] | None:
    """Read some mutants in a process of its own; return what is wrong, None if it crashed."""
    end, begin = os.pipe()
    if not (pid := os.fork()):
        os.close(end)
        limit = SECONDS + len(jobs)
        resource.setrlimit(resource.RLIMIT_CPU, (limit, limit))
        signal.alarm(10 * limit)
        guard.limit_memory()
        os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
        wrong = [said for job in jobs if (said := _read(*job, found, folder / str(os.getpid())))]
        with os.fdopen(begin, "w") as out:
            json.dump(wrong, out)
        os._exit(0)
    os.close(begin)
    with os.fdopen(end) as channel:
        text = channel.read()
    os.waitpid(pid, 0)
    return json.loads(text) if text else None


def _read(kind: str, seed: int, found: dict[str, Any], folder: Path) -> str:
    make, name, read = found[kind]
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_bytes(make(random.Random(f"{kind} {seed}")))
    try:
        read(path)
    except NNFuzeError as error:
        return "" if "\n" not in str(error) else f"({kind!r}, {seed}): several lines: {error}"
    except MemoryError:
        return f"({kind!r}, {seed}): out of memory"
    except Exception as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        return f"({kind!r}, {seed}): {type(error).__name__}: {str(error)[-150:]} ({where.filename}:{where.lineno})"
    return ""
