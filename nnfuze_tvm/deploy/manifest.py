"""The manifest of a bundle: what is in it, for which machine, and that it is intact."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from tvm.target import Target
from typing_extensions import TypedDict

from nnfuze_tvm.deploy import signing
from nnfuze_tvm.deploy.runner import Input, Output, Signature
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.devices.targets import llvm_features
from nnfuze_tvm.errors import BundleError, first_line
from nnfuze_tvm.reading.files import parse_json, read_file
from nnfuze_tvm.reading.limits import MOST_THREADS

FORMAT = 4
MANIFEST = "manifest.json"

# The function of a library that returns its `interface`.
INTERFACE = "nnfuze_interface"

# LLVM's name of a feature that kernels are chosen by → the operating system's name of it. What LLVM adds for a CPU
# family beyond these is either older than all of them or never emitted for kernels.
CPU_FLAGS = {
    "x86_64": {
        "sse4.1": "sse4_1", "sse4.2": "sse4_2", "avx": "avx", "avx2": "avx2", "fma": "fma", "f16c": "f16c",
        "bmi": "bmi1", "bmi2": "bmi2", "avx512f": "avx512f", "avx512bw": "avx512bw", "avx512dq": "avx512dq",
        "avx512vl": "avx512vl", "avx512cd": "avx512cd", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni",
        "avx512bf16": "avx512_bf16", "avx512vbmi": "avx512vbmi", "amx-int8": "amx_int8",
    },
    "aarch64": {
        "neon": "asimd", "dotprod": "asimddp", "i8mm": "i8mm", "fullfp16": "asimdhp", "rdm": "asimdrdm",
        "lse": "atomics", "sve": "sve", "sve2": "sve2", "bf16": "bf16", "sme": "sme",
    },
}  # fmt: skip


class _Record(BaseModel):
    model_config = ConfigDict(extra="forbid")


# What TVM's arrays can be.
Shape = Annotated[list[Annotated[int, Field(ge=0, lt=2**31)]], Field(max_length=26)]
Dtype = Annotated[str, Field(pattern=r"^(bool|(u?int|float)(8|16|32|64))$")]


class InputRecord(_Record):
    """An input, or a state: name, shape, dtype."""

    name: str
    shape: Shape
    dtype: Dtype


class OutputRecord(_Record):
    """An output: its task, name, shape, dtype, and the number of classes of a classifier."""

    task: str
    name: str
    shape: Shape
    dtype: Dtype
    classes: int | None = None


class TargetRecord(_Record):
    """The machine the code is for; ``features`` are those the kernels may use, by LLVM's names."""

    string: str
    triple: str
    arch: str
    cpu: str
    features: list[str]


class KernelRecord(_Record):
    """A kernel: calls per inference, its arguments as (shape, dtype), and what `metrics.LoweredKernel` says."""

    name: str
    calls: int
    arguments: list[tuple[list[int], str]]
    tasks: list[str] = Field(default_factory=list)
    layers: list[str] = Field(default_factory=list)
    rule: str = ""
    knobs: dict[str, int | str] = Field(default_factory=dict)
    parallel: bool = False


class HardwareRecord(_Record):
    """The model of the machine that chose the kernels and set their knobs; see `devices.hardware.Hardware`."""

    isa: str
    vector_bytes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    far_macs: float
    cores: int
    features: list[str]


class FileRecord(_Record):
    """A file of the bundle: its checksum and its size in bytes."""

    sha256: str
    bytes: int


class WeightsRecord(_Record):
    """What is in the file of weights, one behind the other: shape and dtype of each array.

    Attributes
    ----------
    kept : list
        What kernels read as it is.
    spread : list
        What the library makes larger weights of when it is loaded.
    """

    kept: list[tuple[Shape, Dtype]] = Field(default_factory=list)
    spread: list[tuple[Shape, Dtype]] = Field(default_factory=list)


class QuantizationRecord(TypedDict, total=False):
    """How many layers are integers, which are not, and how ranges were found."""

    integer_layers: int
    float_layers: list[str]
    method: str | None


class QualityRecord(TypedDict, total=False):
    """How well a task's answers fit; see `report.TaskQuality`."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]
    accuracy: float | None
    labelled: int
    agreement: float | None
    error: float | None


class Metrics(TypedDict, total=False):
    """The figures of the last stage; see `report.Stage`."""

    __pydantic_config__ = ConfigDict(extra="allow")  # type: ignore[misc]
    macs: float
    parameters: float
    weight_memory: float
    peak_memory: float
    latency: float
    tasks: dict[str, QualityRecord]


class Manifest(_Record):
    """Everything a bundle says about itself; ``mapped``: its weights are used where they lie, in their file."""

    format: int = FORMAT
    tasks: list[str]
    inputs: list[InputRecord]
    outputs: list[OutputRecord]
    states: list[InputRecord] = Field(default_factory=list)
    target: TargetRecord
    threads: Annotated[int, Field(ge=1, le=MOST_THREADS)] = 1
    quantization: QuantizationRecord = Field(default_factory=QuantizationRecord)
    kernels: list[KernelRecord] = Field(default_factory=list)
    weights: WeightsRecord = Field(default_factory=WeightsRecord)
    mapped: bool = False
    hardware: HardwareRecord | None = None
    metrics: Metrics = Field(default_factory=Metrics)
    versions: dict[str, str] = Field(default_factory=dict)
    files: dict[str, FileRecord] = Field(default_factory=dict)

    def to_json(self) -> str:
        """Return the manifest as JSON text that ends with its own checksum."""
        fields = self.model_dump(mode="json")
        return json.dumps({**fields, "sha256": _digest(fields)}, separators=(",", ":")) + "\n"


def describe_target(target: Target) -> TargetRecord:
    """Return the manifest's record of a TVM target."""
    attrs = target.attrs
    triple = str(attrs.get("mtriple", ""))
    arch = architecture(triple)
    known = CPU_FLAGS.get(arch, {})
    features = sorted(llvm_features(target) & known.keys())
    return TargetRecord(
        string=target_text(target), triple=triple, arch=arch, cpu=str(attrs.get("mcpu", "")), features=features
    )


def describe_hardware(target: Target) -> HardwareRecord:
    """Return the manifest's record of the hardware model of a target; of its features those that `CPU_FLAGS` names."""
    hardware = Hardware.of(target)
    features = sorted(hardware.features.intersection(describe_target(target).features))
    return HardwareRecord(**{**asdict(hardware), "features": features})


def target_text(target: Target) -> str:
    """Return a target as JSON text that ``devices.targets.resolve`` takes."""
    return json.dumps(_plain(target.export()), sort_keys=True)


def _plain(value: Any) -> Any:
    if hasattr(value, "items"):
        # TVM derives these from the rest.
        return {str(k): _plain(v) for k, v in value.items() if str(k) not in ("keys", "tag")}
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool | int | float):
        return value
    if hasattr(value, "__iter__"):
        return [_plain(v) for v in value]
    return str(value)


def architecture(triple: str) -> str:
    """Return the architecture of an LLVM triple by the name the operating system has for it."""
    arch = triple.partition("-")[0]
    return {"arm64": "aarch64", "amd64": "x86_64"}.get(arch, arch)


def package_versions() -> dict[str, str]:
    """Return the versions of the packages whose code is in, or runs, a bundle."""
    versions = {}
    for package in ("nnfuze-tvm", "apache-tvm", "apache-tvm-ffi", "numpy"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = "unknown"
    return versions


def read_manifest(directory: Path, trust: str | os.PathLike[str] | None = None) -> Manifest:
    """Return the manifest of a bundle after checking that it is whole.

    Parameters
    ----------
    directory : Path
        The bundle.
    trust : path, optional
        A public key that must have signed it; see `signing`.

    Raises
    ------
    BundleError
        If there is none, it is damaged, its format is not this version's, or it is not signed with that key.
    """
    return read_signed(directory, trust)[0]


def read_signed(directory: Path, trust: str | os.PathLike[str] | None = None) -> tuple[Manifest, bytes]:
    """Return the manifest of a bundle and the bytes that it was read from; see `read_manifest`."""
    if directory.is_file():
        raise BundleError(f"{directory}: a file, not a bundle; make one with `nnfuze compile`")
    path = directory / MANIFEST
    try:
        data = read_file(path)
        if trust is not None:
            signing.verify(directory, data, trust)
        fields = parse_json(data)
    except FileNotFoundError:
        reason = f"no {MANIFEST} in it" if directory.is_dir() else "no such directory"
        raise BundleError(f"{directory}: not a bundle, {reason}; make one with `nnfuze compile`") from None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path}: can't be read ({first_line(error)}); copy or compile the bundle again") from None
    if not isinstance(fields, dict) or not isinstance(fields.get("format"), int):
        raise BundleError(f"{path}: not a bundle's manifest; compile the bundle again")
    if fields["format"] != FORMAT:
        raise BundleError(f"{path}: format {fields['format']}, this version reads {FORMAT}; compile the bundle again")
    digest = fields.pop("sha256", None)
    if digest != _digest(fields):
        raise BundleError(f"{path}: damaged, its checksum doesn't match; copy or compile the bundle again")
    try:
        return Manifest.model_validate(fields), data
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise BundleError(f"{path}: {where}: {first['msg']}; compile the bundle again") from None


def signature_records(inputs: list[Input], outputs: list[Output], states: list[Input]) -> dict[str, Any]:
    """Return the manifest fields that state a network's signature."""
    taken, kept = (
        [InputRecord(name=i.name, shape=list(i.shape), dtype=i.dtype) for i in group] for group in (inputs, states)
    )
    return {
        "tasks": list(dict.fromkeys(o.task for o in outputs)),
        "inputs": taken,
        "outputs": [
            OutputRecord(task=o.task, name=o.name, shape=list(o.shape), dtype=o.dtype, classes=o.classes)
            for o in outputs
        ],
        "states": kept,
    }


def recorded_signature(manifest: Manifest) -> Signature:
    """Return the signature that a manifest states."""
    inputs, states = (
        [Input(i.name, tuple(i.shape), i.dtype) for i in group] for group in (manifest.inputs, manifest.states)
    )
    outputs = [Output(o.task, o.name, tuple(o.shape), o.dtype, o.classes) for o in manifest.outputs]
    return Signature(inputs, outputs, states)


def interface(
    taken: Signature,
    kernels: Iterable[tuple[str, Sequence[tuple[Sequence[int], str]]]],
    weights: WeightsRecord | None = None,
) -> str:
    """Return a checksum of what a network and its kernels take and give, which its library holds, too.

    Parameters
    ----------
    taken : Signature
        The network's.
    kernels : iterable of (str, sequence of (shape, dtype))
        Name and arguments of each kernel.
    weights : WeightsRecord, optional
        What is in the network's file of weights, if it has one.
    """
    records = signature_records(*taken)
    states, outputs, inputs = ([r.model_dump() for r in records[name]] for name in ("states", "outputs", "inputs"))
    found = [[name, [[list(shape), dtype] for shape, dtype in arguments]] for name, arguments in kernels]
    own = (weights or WeightsRecord()).model_dump(mode="json")
    return _digest({"inputs": inputs, "outputs": outputs, "states": states, "kernels": found, "weights": own})


def _digest(fields: dict) -> str:
    canonical = json.dumps(fields, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(canonical.encode()).hexdigest()
