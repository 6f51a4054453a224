"""What a CPU is and has: this one, or a board's. Needs nothing but Python, so that a board can tell, too."""

from __future__ import annotations

import ctypes
import json
import os
import platform
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tvm import rpc

# The function by which the server of a board says what its CPU is.
DESCRIBE = "nnfuze.describe_cpu"

# Bits of the words that Linux gives every process on AArch64 (asm/hwcap.h). /proc/cpuinfo has the same names, but an
# emulator like QEMU's may show the machine's own file there.
_HWCAP = {1: "asimd", 8: "atomics", 10: "asimdhp", 12: "asimdrdm", 20: "asimddp", 22: "sve"}
_HWCAP2 = {1: "sve2", 13: "i8mm", 14: "bf16", 23: "sme"}
_AT_HWCAP, _AT_HWCAP2 = 16, 26


@dataclass(frozen=True)
class Cpu:
    """A CPU, by the operating system's names.

    Attributes
    ----------
    machine : str
        The architecture: ``aarch64``, ``x86_64``, ``armv7l``, …
    flags : frozenset of str
        The features, as far as kernels may depend on them; empty where the system doesn't say.
    """

    machine: str
    flags: frozenset[str]


def this() -> Cpu:
    """Return the CPU that this runs on."""
    machine = {"arm64": "aarch64", "AMD64": "x86_64"}.get(platform.machine(), platform.machine())
    return Cpu(machine, _hwcap_flags() if machine == "aarch64" else _cpuinfo_flags())


def name() -> str:
    """Return what the system calls this CPU, and how many there are."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            key, _, value = line.partition(":")
            if key.strip() == "model name":
                return f"{value.strip()}, {os.cpu_count()} CPUs"
    except OSError:
        pass
    return f"{platform.machine()}, {os.cpu_count()} CPUs"


def describe() -> str:
    """Return this CPU as text for `of`."""
    cpu = this()
    return json.dumps({"machine": cpu.machine, "flags": sorted(cpu.flags)})


def of(remote: rpc.RPCSession) -> Cpu | None:
    """Return the CPU of a board, None if its server is TVM's own, which doesn't say."""
    try:
        text = remote.get_function(DESCRIBE)()
    except AttributeError:
        return None
    fields = json.loads(text)
    return Cpu(fields["machine"], frozenset(fields["flags"]))


def _hwcap_flags() -> frozenset[str]:
    try:
        getauxval = ctypes.CDLL(None).getauxval
    except (AttributeError, OSError):
        return frozenset()
    getauxval.argtypes, getauxval.restype = [ctypes.c_ulong], ctypes.c_ulong
    words = ((_HWCAP, getauxval(_AT_HWCAP)), (_HWCAP2, getauxval(_AT_HWCAP2)))
    return frozenset(name for names, word in words for bit, name in names.items() if word >> bit & 1)


def _cpuinfo_flags() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()
