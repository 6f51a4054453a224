"""Files that should hold JSON: policies, manifests, and what tuning jobs keep."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from nnfuze_tvm.deploy import manifest as manifests
from tests.hostile.harness import Case

DEEP = "[" * 100_000 + "]" * 100_000


def texts() -> Iterator[tuple[str, bytes]]:
    """Give what is no JSON, or none that anybody can read."""
    yield "empty", b""
    yield "text", b"hello"
    yield "cut", b'{"default": {'
    yield "deep list", DEEP.encode()
    yield "deep object", b'{"a":' * 50_000 + b"1" + b"}" * 50_000
    yield "900 deep", b'{"default":' * 900 + b"1" + b"}" * 900
    yield "not UTF-8", b'{"default": "\xff\xfe"}'
    yield "UTF-16", '{"default": {}}'.encode("utf-16")
    yield "nul", b'{"default": {}}\0'
    yield "long number", b'{"default": ' + b"9" * 10_000 + b"}"
    yield "exponent", b'{"default": 1e999999999}'
    yield "NaN", b'{"default": NaN}'
    yield "half a character", b'{"\\ud800": {"bits": "\\udfff"}}'
    yield "null", b"null"
    yield "list", b"[]"
    yield "number", b"1"
    yield "string", b'"x"'
    yield "twice", b'{"default": {}, "default": {"bits": 8}}'


def policies() -> Iterator[tuple[str, Any]]:
    """Give policies that say what can't be."""
    yield "unknown field", {"wobble": 1}
    yield "control characters", {"\x1b[31m\n": 1}
    yield "markup", {"[/red]": 1}
    yield "long field", {"x" * 100_000: 1}
    yield "default as list", {"default": [1]}
    yield "layers as list", {"layers": ["conv"]}
    yield "layer as number", {"layers": {"net/conv": 3}}
    yield "no such layer", {"layers": {"\x1b]0;x\x07" * 1000: {"bits": 32}}}
    yield "slow pattern", {"layers": {"*a" * 30 + "b": {"bits": 32}}}
    yield "broken pattern", {"layers": {"[": {"bits": 32}}}
    yield "bits 7", {"default": {"bits": 7}}
    yield "bits true", {"default": {"bits": True}}
    yield "bits huge", {"default": {"bits": 10**4000}}
    yield "keep NaN", {"default": {"keep": float("nan")}}
    yield "keep infinite", {"default": {"keep": float("inf")}}
    yield "keep negative", {"default": {"keep": -1}}
    yield "keep text", {"default": {"keep": "much"}}
    yield "many layers", {"layers": {f"l{n}": {"bits": 32} for n in range(20_000)}}


def manifest_changes() -> Iterator[tuple[str, Callable[[dict[str, Any]], object]]]:
    """Give changes of a manifest that its checksum is made for anew."""
    yield "format 10^9", lambda m: m.update(format=10**9)
    yield "format true", lambda m: m.update(format=True)
    yield "format text", lambda m: m.update(format="3")
    yield "field missing", lambda m: m.pop("inputs")
    yield "field too many", lambda m: m.update(wobble=1)
    yield "inputs as text", lambda m: m.update(inputs="x")
    yield "no inputs", lambda m: m.update(inputs=[])
    yield "shape negative", lambda m: m["inputs"][0].update(shape=[-1, 2])
    yield "shape huge", lambda m: m["inputs"][0].update(shape=[10**12, 10**12])
    yield "shape beyond", lambda m: m["inputs"][0].update(shape=[10**30])
    yield "rank 1000", lambda m: m["inputs"][0].update(shape=[1] * 1000)
    yield "dtype unknown", lambda m: m["inputs"][0].update(dtype="float7")
    yield "dtype object", lambda m: m["inputs"][0].update(dtype="object")
    yield "dtype structure", lambda m: m["inputs"][0].update(dtype="i4,f4")
    yield "output dtype", lambda m: m["outputs"][0].update(dtype="O")
    yield "threads 0", lambda m: m.update(threads=0)
    yield "threads 10^9", lambda m: m.update(threads=10**9)
    yield "threads negative", lambda m: m.update(threads=-4)
    yield "file above", lambda m: m["files"].update({"../../etc/passwd": {"sha256": "0", "bytes": 1}})
    yield "file absolute", lambda m: m["files"].update({"/etc/passwd": {"sha256": "0", "bytes": 1}})
    yield "file nul", lambda m: m["files"].update({"a\0b": {"sha256": "0", "bytes": 1}})
    yield "file half a character", lambda m: m["files"].update({"\udcff\ud800": {"sha256": "0", "bytes": 1}})
    yield "no library", lambda m: m["files"].pop("lib.so")
    yield "many files", lambda m: m["files"].update({f"f{n}": {"sha256": "0", "bytes": 1} for n in range(50_000)})
    yield "other machine", lambda m: m["target"].update(arch="\x1b[31mriscv\n")
    yield "features", lambda m: m["target"].update(features=["\x07" * 10_000])
    yield "quantization deep", lambda m: m.update(quantization={"a": json.loads("[" * 800 + "]" * 800)})
    yield "metrics of text", lambda m: m.update(metrics={"latency": "fast", "tasks": 3})
    yield "metrics negative", lambda m: m.update(metrics={"latency": -1.0, "bytes": -5})
    yield "metrics NaN", lambda m: m.update(metrics={"latency": float("nan"), "peak_memory": float("inf")})
    yield "metrics huge", lambda m: m.update(metrics={"latency": 10**400, "bytes": 10**4000})
    yield "versions", lambda m: m.update(versions={"\x1b[2J[/red]": "\n" * 1000})
    yield "tasks", lambda m: m.update(tasks=["[/red]\x1b[31m\r\n" * 50])
    yield "quantization", lambda m: m.update(quantization={"method": {"x": []}, "integer_layers": "many"})
    yield "bytes negative", lambda m: m["files"]["lib.so"].update(bytes=-(10**30))


def _bundles(folder: Path, bundle: Path) -> Iterator[Case]:
    sample = folder.parent / "x.npy"
    fields = json.loads((bundle / "manifest.json").read_text())
    fields.pop("sha256")
    # What a bundle says of itself can be anything as long as it is shown only.
    shown = {"metrics negative",
             "metrics NaN", "versions", "tasks", "bytes negative", "other machine", "features", "file above",
             "file absolute", "file half a character", "file nul", "many files", "no library", "no inputs"}  # fmt: skip
    runs = {"dtype unknown", "dtype object", "dtype structure", "threads 0", "threads negative",
            "file above", "file absolute", "no library", "other machine",
            "features", "shape huge", "shape beyond", "rank 1000", "shape negative"}  # fmt: skip
    for name, change in manifest_changes():
        changed = copy.deepcopy(fields)
        change(changed)
        try:
            changed["sha256"] = manifests._digest(changed)
            text = json.dumps(changed)
        except RecursionError:
            continue
        place = folder / f"bundle {name}"
        shutil.copytree(bundle, place)
        (place / "manifest.json").write_text(text)
        yield Case(f"manifest: {name}, shown", ["inspect", place], (0, 2) if name in shown else (2,))
        if name in runs:
            yield Case(f"manifest: {name}, run", ["run", place, "--input", f"x={sample}"])
            yield Case(f"manifest: {name}, bench", ["bench", place, "--repeats", "1"])
    for name, data in texts():
        place = folder / f"bundle of {name}"
        place.mkdir()
        shutil.copy(bundle / "lib.so", place)
        (place / "manifest.json").write_bytes(data)
        yield Case(f"manifest: {name}", ["inspect", place])
    for name, data in {"empty": b"", "text": b"hello", "zeros": bytes(5000)}.items():
        place = folder / f"library {name}"
        shutil.copytree(bundle, place)
        (place / "lib.so").write_bytes(data)
        changed = copy.deepcopy(fields)
        changed["files"]["lib.so"]["sha256"] = manifests.hashlib.sha256(data).hexdigest()
        (place / "manifest.json").write_text(json.dumps({**changed, "sha256": manifests._digest(changed)}))
        yield Case(f"library: {name}", ["bench", place])
    for name, make in {"pipe": os.mkfifo, "folder": os.mkdir, "device": lambda p: os.symlink("/dev/zero", p)}.items():
        for file in ("manifest.json", "lib.so"):
            place = folder / f"{file} {name}"
            shutil.copytree(bundle, place)
            (place / file).unlink()
            make(place / file)
            yield Case(f"bundle: {file} is a {name}", ["run", place, "--input", f"x={sample}"])


def _work_dirs(folder: Path, model: Path) -> Iterator[Case]:
    good = {"models": [str(model)], "trials": 1, "target": "host"}
    options: dict[str, Any] = {
        "models as text": {"models": "net.onnx"},
        "models as numbers": {"models": [1, 2]},
        "no models": {"models": []},
        "model with nul": {"models": ["a\0b.onnx"]},
        "model of half characters": {"models": ["\ud800.onnx"]},
        "unknown": {"\x1b[31m[/red]": 1},
        "threads": {"threads": 10**30},
        "trials": {"trials": -1},
        "many trials": {"trials": "many"},
        "target": {"target": {"kind": "llvm"}},
        "target nul": {"target": "ho\0st"},
        "shapes": {"shapes": {"x": [10**30]}},
        "shapes deep": {"shapes": {"x": [[[1]]]}},
        "chains": {"chains": ["\x1b[31m" * 100]},
        "calibration nul": {"calibration": "a\0b"},
        "policy nul": {"policy": "a\0b"},
        "tracker": {"tracker": "127.0.0.1:²", "key": "pi"},
    }
    for name, changes in options.items():
        place = folder / f"job {name}"
        place.mkdir()
        (place / "options.json").write_text(json.dumps({**good, **changes}))
        yield Case(f"options: {name}", ["tune", "--work-dir", place])
    for name, data in texts():
        for file, verb in {
            "options.json": ["tune"],
            "database_workload.json": ["compile", model, "-o", "out", "--no-compare"],
            "database_tuning_record.json": ["analyze", model],
        }.items():
            if name in ("empty", "UTF-16") and file != "options.json":
                continue
            place = folder / f"job {file} {name}"
            place.mkdir()
            for each in ("options.json", "database_workload.json", "database_tuning_record.json"):
                (place / each).write_bytes(data if each == file else b"")
            yield Case(f"{file}: {name}", [*verb, "--work-dir", place])
    for file in ("options.json", "journal.jsonl", "database_workload.json", "database_tuning_record.json", "job.json"):
        place = folder / f"job pipe {file}"
        place.mkdir()
        (place / "options.json").write_text(json.dumps(good))
        (place / file).unlink(missing_ok=True)
        os.mkfifo(place / file)
        verb = ["tune"] if file in ("options.json", "journal.jsonl", "job.json") else ["analyze", model]
        if "workload" in file:
            (place / "database_tuning_record.json").write_text("")
        yield Case(f"work directory: {file} is a pipe", [*verb, "--work-dir", place])
    for name, data in [*texts(), ("wrong types", b'{"kernel": 1, "decisions": "ab", "seconds": {"a": 1}}')]:
        if name not in ("deep list", "not UTF-8", "number", "wrong types", "long number"):
            continue
        place = folder / f"job journal {name}"
        place.mkdir()
        (place / "options.json").write_text(json.dumps(good))
        (place / "journal.jsonl").write_bytes(data + b"\n")
        yield Case(f"journal: {name}", ["tune", "--work-dir", place])


def cases(folder: Path, bundle: Path, model: Path) -> Iterator[Case]:
    """Give every file to the verbs that read it."""
    for name, data in texts():
        path = folder / f"{name}.json"
        path.write_bytes(data)
        yield Case(f"policy: {name}", ["compile", model, "-o", "out", "--policy", path])
    for name, document in policies():
        path = folder / f"policy {name}.json"
        path.write_text(json.dumps(document))
        codes = (0, 2) if name in ("slow pattern",) else (2,)
        yield Case(f"policy: {name}", ["compile", model, "-o", "out", "--policy", path], codes)
    yield from _bundles(folder, bundle)
    yield from _work_dirs(folder, model)
