"""From the name of a machine to a TVM target."""

from __future__ import annotations

import json
import os
import platform

from tvm.target import Target
from tvm.target.codegen import llvm_get_system_cpu

from nnfuze_tvm.devices import cpu
from nnfuze_tvm.devices.boards import CATALOGUE
from nnfuze_tvm.errors import DeviceError

NAMED: dict[str, dict] = {
    **{board.name: board.target for board in CATALOGUE},
    "x86-64-v3": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v3"},
    "x86-64-v4": {"kind": "llvm", "mtriple": "x86_64-linux-gnu", "mcpu": "x86-64-v4"},
}

# LLVM names a CPU by its family, but a hypervisor may hide features of that family.
_MASKABLE = ("avx2", "fma", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512vnni", "avxvnni")
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
            return Target(json.loads(name))
        except Exception as error:  # TVM raises many kinds here
            reason = str(error).strip().splitlines()[-1]
            raise DeviceError(f"target {name}: not a TVM target ({reason})") from None
    known = ", ".join(["host", *NAMED])
    raise DeviceError(f"target {name!r}: unknown; use one of {known}, or a TVM target as a JSON object")
