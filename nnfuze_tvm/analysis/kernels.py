"""Every kernel's time beside what the machine could do, and what holds it back.

The model is that of Klein, Gruber and Fröning, "Understanding Cache Boundness of ML Operators on ARM Processors". A
kernel has to do its operations at the core's peak rate, and each level of memory has to deliver the kernel's bytes at
its bandwidth (`roofline` knows both). Each of these alone is a lower bound of the kernel's time; the largest one is its
roofline, and names what it is bound by. The time itself is measured, the kernel alone, on warm caches; for a board that
is not at hand there is none, and the roofline says what the catalogue's figures allow.

Operations are exact: two for each multiply-accumulate of the layers, as the networks state them. A Winograd kernel
multiplies less, and its bound is by what it multiplies. The number of bytes in a kernel's arguments is exact, too.
What each level of memory delivers is an estimate; see `traffic`. Kernels without a layer are counted by TVM, each
scalar operation as one, as if the core did them at its peak rate.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.s_tir.analysis import estimate_tir_flops
from tvm.target import Target

from nnfuze_tvm.analysis import metrics, traffic
from nnfuze_tvm.analysis.roofline import Machine
from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph import ir
from nnfuze_tvm.schedules.blocks import extents

_NARROW = ("int8", "uint8")
_WINOGRAD = "winograd"


@dataclass(frozen=True)
class KernelUse:
    """One kernel of the network; figures are of one call.

    Attributes
    ----------
    name, layers, rule
        The kernel, the layers it computes (one after the other if it is called several times), who scheduled it.
    calls : int
        How often one inference calls it.
    convolution : bool
        Whether its layers are convolutions.
    integer : bool
        Whether its operations are counted against the machine's int8 rate.
    operations : float
        Two per multiply-accumulate.
    bytes : int
        Bytes of its arguments: what it reads and writes, each byte once.
    seconds : float, optional
        Measured time; None for a board that is not at hand.
    bounds : dict of str to float
        Least time in seconds by ``compute`` and by each level of memory.
    """

    name: str
    layers: tuple[str, ...]
    rule: str
    calls: int
    convolution: bool
    integer: bool
    operations: float
    bytes: int
    seconds: float | None
    bounds: dict[str, float]

    @property
    def bound(self) -> str:
        """What takes longest of all that the kernel cannot do without."""
        return max(self.bounds, key=lambda name: self.bounds[name])

    @property
    def least(self) -> float:
        """The least time in seconds, by that bound."""
        return self.bounds[self.bound]

    @property
    def of_roofline(self) -> float | None:
        """The least time relative to the measured one."""
        return _ratio(self.least, self.seconds)

    @property
    def of_peak(self) -> float | None:
        """The time that the kernel's multiply-adds take at the machine's peak, relative to the measured one."""
        return _ratio(self.bounds["compute"], self.seconds)

    @property
    def winograd(self) -> bool:
        """Whether it multiplies less than its layers state."""
        return self.rule == _WINOGRAD

    @property
    def rate(self) -> float | None:
        """Operations per second."""
        return _ratio(self.operations, self.seconds)

    @property
    def intensity(self) -> float:
        """Operations per byte of the arguments."""
        return self.operations / self.bytes if self.bytes else 0.0


@dataclass(frozen=True)
class Analysis:
    """All kernels of a network, in the order in which it first calls them, and the machine's figures.

    Attributes
    ----------
    kernels : tuple of KernelUse
        All of them with a measured time, or none.
    machine : Machine
        What the bounds were computed with: measured like the kernels, or the catalogue's.
    catalogue : Machine, optional
        What the catalogue expects of a board that was measured, where it has figures.
    """

    kernels: tuple[KernelUse, ...]
    machine: Machine
    catalogue: Machine | None = None

    @property
    def seconds(self) -> float | None:
        """The time of all calls of all kernels; None if it wasn't measured."""
        return _measured_seconds(self.kernels)

    @property
    def least(self) -> float:
        """The time if every kernel took the least time by its bound."""
        return sum(k.least * k.calls for k in self.kernels)

    @property
    def operations(self) -> float:
        """The operations of one inference."""
        return sum(k.operations * k.calls for k in self.kernels)

    @property
    def of_peak(self) -> float | None:
        """The time that the operations would take at the machine's peak, relative to the measured time."""
        return _ratio(self.bounds["compute"], self.seconds)

    @property
    def of_roofline(self) -> float | None:
        """The least time relative to the measured one."""
        return _ratio(self.least, self.seconds)

    @property
    def bounds(self) -> dict[str, float]:
        """The time of all calls by each limit alone."""
        names = ["compute", *(level.name for level in self.machine.caches), "DRAM"]
        return {name: sum(k.bounds[name] * k.calls for k in self.kernels) for name in names}

    @property
    def convolutions(self) -> float | None:
        """The rate of all convolutions together, relative to the peak; None without a (measured) convolution."""
        found = [k for k in self.kernels if k.convolution]
        return _ratio(sum(k.bounds["compute"] * k.calls for k in found), _measured_seconds(found))

    def to_dict(self) -> dict[str, Any]:
        """Return everything, what is derived from it included, for JSON."""
        kernels = [
            {
                **asdict(k),
                "rate": k.rate,
                "intensity": k.intensity,
                "bound": k.bound,
                "least": k.least,
                "of_roofline": k.of_roofline,
                "of_peak": k.of_peak,
            }
            for k in self.kernels
        ]
        return {
            "machine": asdict(self.machine),
            "catalogue": asdict(self.catalogue) if self.catalogue else None,
            "kernels": kernels,
            "seconds": self.seconds,
            "least": self.least,
            "bounds": self.bounds,
            "operations": self.operations,
            "of_peak": self.of_peak,
            "of_roofline": self.of_roofline,
            "convolutions_of_peak": self.convolutions,
        }


def _ratio(part: float, whole: float | None) -> float | None:
    return part / whole if whole else None


def _measured_seconds(kernels: Sequence[KernelUse]) -> float | None:
    """Return the time of all calls, None where a kernel has none or there is no kernel."""
    times = [k.seconds * k.calls for k in kernels if k.seconds is not None]
    return sum(times) if times and len(times) == len(kernels) else None


def bounds(machine: Machine, operations: float, integer: bool, delivered: Mapping[str, int]) -> dict[str, float]:
    """Return the least time in seconds that a kernel needs, by each of the machine's limits.

    Parameters
    ----------
    machine : Machine
        The machine's figures.
    operations : float
        The kernel's operations.
    integer : bool
        Whether they are int8.
    delivered : dict of str to int
        Bytes that each cache, by name, and ``DRAM`` have to deliver.
    """
    found = {"compute": operations / (machine.int8 if integer else machine.fp32)}
    for level in machine.caches:
        found[level.name] = delivered[level.name] / level.bandwidth
    found["DRAM"] = delivered["DRAM"] / machine.dram
    return found


def delivered_bytes(func: tirx.PrimFunc, target: Target, machine: Machine, moving: int = 0) -> dict[str, int]:
    """Return an estimate of the bytes that each level of memory delivers for one call of a scheduled kernel.

    Where bands move through the kernel's arguments, these are ``moving`` bytes: its loops do not say how far they get,
    but it was made for what it keeps to stay in L2.
    """
    root = traffic.loop_tree(func, target)
    found = {machine.caches[0].name: traffic.l1_bytes(root, Hardware.of(target))}
    behind = [*(level.name for level in machine.caches[1:]), "DRAM"]
    for cache, name in zip(machine.caches, behind, strict=True):
        found[name] = traffic.missed_bytes(root, cache.bytes) if not moving else max(0, moving - cache.bytes)
    if moving and len(machine.caches) > 1:
        found[machine.caches[1].name] += int(func.attrs["nnfuze.near"])
    return found


def kernel_uses(
    graph: tvm.IRModule,
    fused: tvm.IRModule,
    lowered: tvm.IRModule,
    target: Target,
    machine: Machine,
    times: Mapping[str, float],
) -> tuple[KernelUse, ...]:
    """Return what each kernel of a network does, takes and is bound by, in the order of their first calls.

    Parameters
    ----------
    graph, fused, lowered : tvm.IRModule
        The network before lowering, with fused kernels, and with scheduled ones.
    target : tvm.target.Target
        What the kernels were scheduled for.
    machine : Machine
        The machine's figures.
    times : dict of str to float
        Seconds of one call of each kernel; empty where nothing was measured.
    """
    layers = {layer.name: layer for layer in metrics.layers(graph)}
    aliases = ir.aliases(fused)
    found = []
    for kernel in metrics.kernels(lowered):
        own = [layers[name] for name in _with_aliases(kernel.layers, aliases) if name in layers]
        size = sum(prod(shape) * np.dtype(dtype).itemsize for shape, dtype in kernel.arguments)
        parts = [str(name) for name in lowered[kernel.name].attrs.get("nnfuze.parts", [kernel.name])]
        plain = [tvm.IRModule({"main": fused[name.removesuffix("_prepacked")]}) for name in parts]
        operations = 2 * sum(layer.macs for layer in own) / kernel.calls if own else sum(map(estimate_tir_flops, plain))
        multiplied = _winograd_operations(plain[0]["main"]) if kernel.rule == _WINOGRAD else operations
        operands = [dtype for _, dtype in kernel.arguments[:2]]
        integer = bool(own) and any(map(_NARROW.__contains__, operands)) and not operands[0].startswith("float")
        delivered = delivered_bytes(lowered[kernel.name], target, machine, size if len(parts) > 1 else 0)
        found.append(
            KernelUse(
                name=kernel.name,
                layers=kernel.layers,
                rule=kernel.rule,
                calls=kernel.calls,
                convolution=any("conv" in layer.op for layer in own),
                integer=integer,
                operations=operations,
                bytes=size,
                seconds=times[kernel.name] if times else None,
                bounds=bounds(machine, multiplied, integer, delivered),
            )
        )
    return tuple(found)


def _winograd_operations(func: tirx.PrimFunc) -> float:
    """Return two per multiply-add of a Winograd kernel's product of matrices; the transforms only add."""
    sch = tvm.s_tir.Schedule(func)
    return 2.0 * prod(extents(sch, sch.get_sblock("winograd_product")))


def _with_aliases(names: Sequence[str], aliases: Mapping[str, str]) -> list[str]:
    """Return layers with those that were batched into them."""
    return [*names, *(old for old, new in aliases.items() if new in names)]
