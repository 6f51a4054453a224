"""The kernels of a module: what is tuned, under an identity that holds from one process to the next."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tvm
import tvm_ffi
from tvm.s_tir import meta_schedule as ms


@dataclass(frozen=True)
class TunableKernel:
    """One unique PrimFunc of a module.

    Attributes
    ----------
    id : str
        A digest of ``workload``.
    name : str
        The name of one of its uses.
    mod : tvm.IRModule
        The PrimFunc as ``main``, as MetaSchedule normalizes it.
    weight : int
        How often the network calls it.
    workload : str
        The line that stands for it in MetaSchedule's database.
    """

    id: str
    name: str
    mod: tvm.IRModule
    weight: int
    workload: str


def extract(mod: tvm.IRModule, target: tvm.target.Target, workloads: Iterable[str] = ()) -> list[TunableKernel]:
    """Return the unique kernels of a fused module, the most used ones first.

    Parameters
    ----------
    mod
        A module whose Relax functions call PrimFuncs.
    target
        What they will be compiled for.
    workloads
        Lines of an existing database. A kernel that is structurally equal to one of them takes its identity,
        also where names have changed.
    """
    stored = {kernel_id(line): line for line in workloads}
    modules: dict[str, tvm.IRModule] = {}
    kernels = []
    for task in ms.relax_integration.extract_tasks(mod, target):
        func = task.dispatched[0]
        line = json.dumps(_plain(ms.database.Workload(func).as_json()))
        if kernel_id(line) not in stored:
            modules = modules or {id_: _module(old) for id_, old in stored.items()}
            same = next(
                (id_ for id_, old in modules.items() if tvm_ffi.structural_equal(old, func, map_free_vars=True)), None
            )
            if same:
                # Traces name blocks, so they must be made for the very module that the database holds.
                line, func = stored[same], modules[same]
        kernels.append(TunableKernel(kernel_id(line), str(task.task_name), func, int(task.weight), line))
    return sorted(kernels, key=lambda kernel: -kernel.weight)


def kernel_id(workload: str) -> str:
    """Return the id of the kernel that a line of MetaSchedule's workload table stands for."""
    return hashlib.sha256(json.loads(workload)[1].encode()).hexdigest()[:12]


def _module(workload: str) -> tvm.IRModule:
    return ms.database.Workload.from_json(json.loads(workload)).mod


def _plain(value: Any) -> Any:
    """Return TVM's containers as Python's."""
    return [_plain(item) for item in value] if isinstance(value, list | tuple) else str(value)
