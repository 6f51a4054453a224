"""What a schedule needs to know about the CPU: registers, vectors, caches, cores."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache

from tvm.target import Target

from nnfuze_tvm.devices import boards
from nnfuze_tvm.devices.targets import llvm_features

# Bytes of a cache line, on every CPU that this package has kernels for.
LINE_BYTES = 64


@dataclass(frozen=True)
class Hardware:
    """The hardware model that sets the default knobs of every schedule.

    Attributes
    ----------
    isa : str
        ``x86``, ``arm`` or ``generic``.
    vector_bytes : int
        Bytes of one vector register that arithmetic should use.
    registers : int
        Number of vector registers.
    l1_bytes, l2_bytes : int
        Data cache per core, in bytes.
    far_macs : float
        Float32 multiply-adds that a core does in the time in which a byte comes from memory.
    cores : int
        Cores that a parallel loop may use.
    features : frozenset[str]
        LLVM's feature names (``avx2``, ``avx512vnni``, ``dotprod``, …).
    """

    isa: str
    vector_bytes: int
    registers: int
    l1_bytes: int
    l2_bytes: int
    far_macs: float
    cores: int
    features: frozenset[str]

    def lanes(self, dtype: str) -> int:
        """Return how many elements of ``dtype`` one vector register holds."""
        bits = 8 if dtype == "bool" else int("".join(c for c in dtype if c.isdigit()))
        return self.vector_bytes * 8 // bits

    @staticmethod
    def of(target: Target) -> Hardware:
        """Return the model of a target's CPU."""
        return _read(str(target))


# Of CPUs whose memory's bandwidth is not known. Measured on layers of ResNet18 and ResNet50 on a server with AVX2,
# where the weights of a whole network come from beyond the last cache: any value from 1.5 to 2.5 decides alike there.
_FAR_MACS = 2.0


@lru_cache
def _read(name: str) -> Hardware:
    target = Target(json.loads(name))
    features = llvm_features(target)
    cores = int(target.attrs.get("num-cores", 0) or 0) or 4
    if "avx512f" in features:
        return Hardware("x86", 64, 32, 32 << 10, 1 << 20, _FAR_MACS, cores, features)
    if "avx2" in features and "fma" in features:
        return Hardware("x86", 32, 16, 32 << 10, 512 << 10, _FAR_MACS, cores, features)
    if "sse2" in features:
        return Hardware("x86", 16, 16, 32 << 10, 256 << 10, _FAR_MACS, cores, features)
    if "neon" in features:
        board = boards.find(str(target.attrs.get("model", "")), str(target.attrs.get("mcpu", "")))
        board = board or boards.BOARDS["aarch64"]
        if board.arch == "arm":
            # LLVM's NEON intrinsics have other names there, so no kernel may take one.
            features -= {"neon"}
        isa = "arm" if board.arch == "aarch64" else "generic"
        far_macs = _FAR_MACS
        if board.fp32 and board.clock and board.memory:
            far_macs = board.fp32 * board.clock / board.memory
        return Hardware(isa, 16, board.registers, board.l1 << 10, board.l2 << 10, far_macs, cores, features)
    return Hardware("generic", 16, 16, 32 << 10, 256 << 10, _FAR_MACS, cores, features)
