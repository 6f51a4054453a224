"""From the name of a machine to a TVM target."""

from __future__ import annotations

import os
import platform
import re

from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu
from tvm_ffi import get_global_func

from nnfuze_tvm.devices import cpu
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.errors import DeviceError
from nnfuze_tvm.reading.files import parse_json

NAMED: dict[str, dict] = {
    **{board.name: board.target for board in CATALOGUE},
    "x86-64-v3": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "x86-64-v4": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
}

# LLVM names a CPU by its family, but a hypervisor may hide features of that family.
_MASKABLE = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avxvnni")
# Names of architectures that LLVM takes for others.
_ARCHITECTURES = re.compile(r"armv\w+|thumb\w*|arm64|amd64|i[3-6]86")
_CPUINFO_NAMES = {"avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni"}


def host_target() -> Target:
    """Return the target of the machine this runs on, without features that a hypervisor hides."""
    machine = platform.machine()
    config: dict = {
        "kind": "llvm",
        "mtriple": f"{machine}-linux-gnu",
        "mcpu": str(llvm_get_system_cpu()),
        "num-cores": os.cpu_count() or 1,
    }
    flags = cpu.this().flags
    if machine == "x86_64" and flags:
        with Target(config) as target:
            known = llvm_features(target)
        hidden = [f for f in _MASKABLE if f in known and _CPUINFO_NAMES.get(f, f) not in flags]
        if hidden:
            config["mattr"] = [f"-{feature}" for feature in hidden]
    return Target(config)


def llvm_features(target: Target) -> frozenset[str]:
    """Return LLVM's feature names for a target, as its mcpu and mattr give them."""
    from tvm.target.codegen import llvm_get_cpu_features

    with target:
        return frozenset(str(feature) for feature in llvm_get_cpu_features())


def resolve(name: str) -> Target:
    """Return the TVM target for a name.

    Parameters
    ----------
    name : str
        ``host``, one of ``NAMED``, or a TVM target: a JSON object such as
        ``{"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mcpu": "cortex-a72"}``.

    Raises
    ------
    DeviceError
        If the name is unknown or TVM refuses the JSON object.
    """
    if name == "host":
        return host_target()
    if name in NAMED:
        return Target(NAMED[name])
    if name.lstrip().startswith("{"):
        try:
            config = parse_json(name)
            _check_config(config)
            target = Target(config)
            _check_processor(name, target)
        except DeviceError:
            raise
        except Exception as error:  # TVM raises many kinds here
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise DeviceError(f"target {name}: not a TVM target ({reason})") from None
        return target
    known = ", ".join(["host", *NAMED])
    raise DeviceError(f"target {name!r}: unknown; use one of {known}, or a TVM target as a JSON object")


def _check_config(config: dict) -> None:
    """Complain about what LLVM ends the process for, or computes something else for."""
    if config.get("kind") != "llvm":
        raise ValueError(f"its kind is {config.get('kind')!r}; use llvm")
    triple = config.get("mtriple", "")
    if not isinstance(triple, str) or not triple.isprintable() or not triple.isascii():
        raise ValueError("mtriple is text, such as aarch64-linux-gnu")
    architecture = triple.partition("-")[0]
    known = {str(target) for target in get_global_func("target.llvm_get_targets")()}
    if triple and architecture not in known and not _ARCHITECTURES.fullmatch(architecture):
        raise ValueError(f"mtriple {triple!r}: LLVM has no architecture {architecture!r}")
    for option, low, high in (("num-cores", 1, 4096), ("opt-level", 0, 3)):
        value = config.get(option, low)
        if not isinstance(value, int) or not low <= value <= high:
            raise ValueError(f"{option} is {value!r}; use {low} to {high}")


def _check_processor(name: str, target: Target) -> None:
    """Complain about a CPU or a feature that LLVM doesn't know, and would ignore."""
    model = str(target.attrs.get("mcpu", ""))
    triple = str(target.attrs.get("mtriple", ""))
    with target:
        valid = not model or bool(get_global_func("target.llvm_is_valid_cpu")(model, triple))
    if not valid:
        raise DeviceError(f"target {name}: LLVM knows no mcpu {model!r} of that architecture")
    features = llvm_features(target)
    for attribute in map(str, target.attrs.get("mattr", ())):
        if attribute.startswith("+") and attribute[1:] not in features:
            raise DeviceError(f"target {name}: LLVM knows no feature {attribute[1:]!r} of that architecture")
