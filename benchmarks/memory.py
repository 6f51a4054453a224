"""Memory of one inference beside its bound, TVM's own plan, and what ONNX Runtime allocates.

    python -m benchmarks.memory [--target host] [networks: resnet8, mobilenet_v2, speech-shared, …]

The bound is the least peak of tensors that live at the same time, over all orders of the kernels one after the other,
with a buffer of its own for every result and without scratch; inputs and constants don't count. A plan may stay below
it, where kernels write over what they read, or are computed band by band. One thread. ONNX Runtime: what its
allocations have grown by after two runs of the float32 networks, which its arena keeps, with an arena that grows by
what is asked for (the default one grows by a megabyte or more).
"""

from __future__ import annotations

import argparse
import ctypes
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import tvm
from rich.console import Console
from rich.table import Table
from tvm import relax
from tvm.target import Target

from benchmarks import networks
from benchmarks.speech_pairs import SPEECH, TASKS
from benchmarks.workloads import workload
from nnfuze_tvm import load
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.deploy.memory import kernels
from nnfuze_tvm.deploy.memory.arena import nbytes
from nnfuze_tvm.deploy.memory.graph import Graph
from nnfuze_tvm.deploy.memory.order import Order, best_order
from nnfuze_tvm.deploy.memory.usage import usage
from nnfuze_tvm.deploy.memory.work import Work
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import bindings, op_name
from nnfuze_tvm.passes import InsertQDQ, pipeline
from nnfuze_tvm.passes.compress.policy import Policy
from nnfuze_tvm.schedules.schedule_kernels import ScheduleKernels

_PAIRS = {f"speech-{pair}": [SPEECH / pair / f"{task}.onnx" for task in TASKS] for pair in ("shared", "independent")}


def graphs(name: str, directory: Path) -> Iterator[tuple[str, tvm.IRModule, Sequence[Path]]]:
    """Yield a network, or a merged pair, in float32 and in int8, with its files."""
    if name in _PAIRS:
        models, samples = list(_PAIRS[name]), dict(np.load(SPEECH / "calibration.npz"))
    else:
        found = workload(name, directory)
        models, samples = found.models, found.calibration[0]
    merged = tvm.transform.Sequential(pipeline.merge_phases())(load([str(path) for path in models]))
    yield "fp32", merged, models
    yield "int8", InsertQDQ(samples, Policy.uniform(bits=8), executor=host_executor)(merged), models


def kernel_by_kernel(mod: tvm.IRModule, target: Target) -> tvm.IRModule:
    """Return a lowered module whose kernels are computed one after the other."""
    with target:
        passes = [ScheduleKernels(target), *build.packing_passes()]
        return tvm.transform.Sequential(passes)(build.fuse(mod, target))


def planned(lowered: tvm.IRModule, target: Target) -> int:
    """Return the bytes that a lowered module takes beside its inputs and constants."""
    return usage(build.finished(lowered, target), target).total()


def bound(lowered: tvm.IRModule, target: Target) -> Order:
    """Return the best order of a lowered module's kernels where only their tensors count."""
    mod = tvm.transform.Sequential(pipeline.last_passes())(lowered)
    work = Graph(mod["main"], kernels.as_loops(mod, target)).work
    return best_order(Work(work.sizes, [replace(step, scratch=0, over=()) for step in work.steps], work.kept))


def by_tvm(lowered: tvm.IRModule) -> int:
    """Return the bytes of tensors that TVM's own memory plan allocates, without scratch."""
    transform = relax.transform
    passes = [transform.ToNonDataflow(), transform.RemovePurityChecking(), transform.CallTIRRewrite()]
    planned = tvm.transform.Sequential([*passes, transform.StaticPlanBlockMemory()])(lowered)
    total = 0
    for binding in bindings(planned["main"]):
        name, args = op_name(binding.value), getattr(binding.value, "args", ())
        if name == "memory.alloc_storage":
            total += int(args[0].values[0])
        elif name == "builtin.alloc_tensor":
            total += nbytes([int(dim) for dim in args[0].values], str(binding.var.ty.dtype))
    return total


def by_onnx_runtime(models: Sequence[Path]) -> int:
    """Return what sessions of networks have allocated after two runs, each in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.memory", "--onnxruntime"]
    found = [subprocess.run([*command, str(path)], check=True, capture_output=True, text=True) for path in models]
    return sum(int(each.stdout) for each in found)


def _onnx_runtime_here(path: str) -> int:
    arena = onnxruntime.OrtArenaCfg({"arena_extend_strategy": 1, "initial_chunk_size_bytes": 256})
    kind = onnxruntime.OrtMemoryInfo(
        "Cpu", onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, onnxruntime.OrtMemType.DEFAULT
    )
    onnxruntime.create_and_register_allocator(kind, arena)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    options.add_session_config_entry("session.use_env_allocators", "1")
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    shapes = {each.name: [dim if isinstance(dim, int) else 1 for dim in each.shape] for each in session.get_inputs()}
    feeds = {name: np.zeros(shape, "float32") for name, shape in shapes.items()}
    before = _allocated()
    for _ in range(2):
        session.run(None, feeds)
    return _allocated() - before


def _allocated() -> int:
    """Return the bytes that the C library has given to this process and not got back."""
    fields = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost".split()
    info = type("Mallinfo2", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
    ask = ctypes.CDLL(None).mallinfo2
    ask.restype = info
    found = ask()
    return int(found.uordblks + found.hblkhd)


def main() -> None:
    """Print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("networks", nargs="*", default=[*networks.NAMES, *_PAIRS])
    parser.add_argument("--target", default="host")
    parser.add_argument("--onnxruntime", metavar="FILE", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.onnxruntime:
        print(_onnx_runtime_here(arguments.onnxruntime))
        return
    columns = ("network", "bound", "kernel by kernel", "of the bound", "as compiled", "--optimize memory", "TVM")
    table = Table(*columns, "ONNX Runtime", title=f"KB, {arguments.target}, one thread")
    given = {key: value for key, value in resolve(arguments.target).export().items() if key != "tag"}
    target = Target({**given, "num-cores": 1})
    with tempfile.TemporaryDirectory() as directory:
        for name in arguments.networks:
            for precision, mod, models in graphs(name, Path(directory)):
                alone = kernel_by_kernel(mod, target)
                least = bound(alone, target)
                plans = [planned(each, target) for each in (alone, build.lower(mod, target))]
                plans.append(planned(build.lower(ir.with_small_weights(mod), target), target))
                ratio = f"{plans[0] / least.peak:.2f}{'' if least.exact else ' (bound not proven)'}"
                own, *others = (f"{size / 1024:.1f}" for size in (*plans, by_tvm(alone)))
                peer = f"{by_onnx_runtime(models) / 1024:.1f}" if precision == "fp32" else ""
                table.add_row(f"{name} {precision}", f"{least.peak / 1024:.1f}", own, ratio, *others, peer)
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
