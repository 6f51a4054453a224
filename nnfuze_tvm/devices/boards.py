"""The boards that targets are named after: what their CPUs have, and what to expect of them at most.

Figures are per core where not said otherwise, from the manufacturers' manuals and software optimization guides.
Several boards of one CPU differ in caches and cores, so a target carries its board's name (TVM's ``model``).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Board:
    """A kind of board, or a class of CPUs where no single board is meant.

    Attributes
    ----------
    name : str
        What ``--target`` calls it.
    title : str
        What people call it.
    arch : str
        ``aarch64`` or ``arm`` (32 bits).
    mcpu : str
        LLVM's name of the CPU. For a class of CPUs, the one whose pipeline is scheduled for.
    features : tuple of str
        LLVM's names of the features that kernels are chosen by.
    cores : int
        Cores of the fastest kind.
    l1, l2, l3 : int
        KiB of cache: L1 data, the L2 that one core may fill, and the L3 of all cores; 0 where there is none.
    registers : int
        Vector registers, of 16 bytes each.
    fp32, int8 : float, optional
        Multiply-adds per cycle: float32, and int8 with int32 sums by the best instructions of the CPU. Without
        dot products, that is two products summed in int16 before they are added to int32 sums.
    loads : float
        Vectors of 16 bytes that a core loads from L1 per cycle.
    clock : float, optional
        GHz as sold; None for a class of CPUs.
    memory : float, optional
        GB/s that one core reads from memory, about: boards of one kind differ, and what runs beside it takes its share.
    emulated : str, optional
        The CPU model of QEMU 7.2 that runs code made for it; ``max`` has every feature.
    """

    name: str
    title: str
    arch: str
    mcpu: str
    features: tuple[str, ...]
    cores: int
    l1: int
    l2: int
    l3: int
    registers: int
    fp32: float | None
    int8: float | None
    loads: float
    clock: float | None
    memory: float | None
    emulated: str | None

    @property
    def triple(self) -> str:
        """LLVM's target triple."""
        return {"aarch64": "aarch64-linux-gnu", "arm": "armv7a-linux-gnueabihf"}[self.arch]

    @property
    def target(self) -> dict[str, Any]:
        """The TVM target, as a dict that ``tvm.target.Target`` takes."""
        return {
            "kind": "llvm",
            "mtriple": self.triple,
            "mcpu": self.mcpu,
            "mattr": [f"+{feature}" for feature in self.features],
            "num-cores": self.cores,
            "model": self.name,
        }


_NEON = ("neon",)
_V82 = ("neon", "dotprod", "fullfp16")
_V86 = (*_V82, "i8mm", "bf16")

# fmt: off
CATALOGUE = (
    #      name                title                              arch       mcpu           features
    #      cores, L1, L2, L3, registers, fp32, int8, loads, clock, memory, emulated
    Board("rpi3",             "Raspberry Pi 3, Cortex-A53",       "aarch64", "cortex-a53",  _NEON,
          4, 32, 512, 0, 32, 4, 16 / 3, 0.5, 1.2, 2.0, "cortex-a53"),
    Board("rpi4",             "Raspberry Pi 4, Cortex-A72",       "aarch64", "cortex-a72",  _NEON,
          4, 32, 1024, 0, 32, 4, 8, 1, 1.5, 4.5, "cortex-a72"),
    Board("rpi5",             "Raspberry Pi 5, Cortex-A76",       "aarch64", "cortex-a76",  _V82,
          4, 64, 512, 2048, 32, 8, 32, 2, 2.4, 11, "cortex-a76"),
    Board("jetson-orin",      "Jetson Orin Nano, Cortex-A78AE",   "aarch64", "cortex-a78ae", _V82,
          6, 64, 256, 4096, 32, 8, 32, 3, 1.5, 15, "cortex-a76"),
    Board("apple-m1",         "Apple M1 under Linux, fast cores", "aarch64", "apple-m1",    _V82,
          4, 128, 12288, 0, 32, 16, 64, 3, 3.2, 58, "max"),
    Board("neoverse-n1",      "AWS Graviton2, Neoverse N1",       "aarch64", "neoverse-n1", _V82,
          64, 64, 1024, 32768, 32, 8, 32, 2, 2.5, 20, "neoverse-n1"),
    Board("neoverse-v1",      "AWS Graviton3, Neoverse V1",       "aarch64", "neoverse-v1", (*_V86, "sve"),
          64, 64, 1024, 32768, 32, 16, 128, 3, 2.6, 25, "max"),
    Board("neoverse-v2",      "AWS Graviton4, Neoverse V2",       "aarch64", "neoverse-v2", (*_V86, "sve", "sve2"),
          96, 64, 2048, 36864, 32, 16, 128, 3, 2.8, 30, "max"),
    Board("aarch64",          "any 64-bit ARM CPU",               "aarch64", "cortex-a72",  _NEON,
          4, 32, 512, 0, 32, 4, 8, 1, None, None, "cortex-a72"),
    Board("aarch64+dotprod",  "any with dot products (ARMv8.2)",  "aarch64", "cortex-a76",  _V82,
          4, 64, 512, 2048, 32, 8, 32, 2, None, None, "cortex-a76"),
    Board("aarch64+i8mm",     "any with int8 matrix products (ARMv8.6)", "aarch64", "cortex-a76", _V86,
          4, 64, 512, 2048, 32, 8, 64, 2, None, None, "max"),
    Board("armv7",            "32-bit with NEON, Cortex-A7",      "arm",     "cortex-a7",   _NEON,
          4, 32, 512, 0, 16, None, None, 0.5, None, None, None),
)
# fmt: on

BOARDS = {board.name: board for board in CATALOGUE}


def find(model: str, mcpu: str) -> Board | None:
    """Return the board that a target was made for, by its ``model``, else the first one with its CPU."""
    return BOARDS.get(model) or next((board for board in CATALOGUE if board.mcpu == mcpu), None)
