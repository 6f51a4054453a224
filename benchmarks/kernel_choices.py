"""Which kernels the reference networks get: before a change and after it.

    python -m benchmarks.kernel_choices record before.json            # in the old tree
    python -m benchmarks.kernel_choices record after.json             # in the new one
    python -m benchmarks.kernel_choices compare before.json after.json

A record holds, per network, precision and target, every kernel's rule, knobs and a hash of its loops, and of what runs
on this machine a digest of the outputs: of int8 networks these are the same bits everywhere. `compare` prints what
differs and ends with 1 if anything does.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm
import tvm_ffi
from tvm import relax

from benchmarks import networks
from benchmarks.workloads import workload
from nnfuze_tvm import load
from nnfuze_tvm.analysis import metrics
from nnfuze_tvm.deploy import build
from nnfuze_tvm.deploy.executor import host_executor
from nnfuze_tvm.devices.targets import resolve
from nnfuze_tvm.passes import InsertQDQ, pipeline
from nnfuze_tvm.passes.compress.policy import Policy

TARGETS = ("host", "x86-64-v3", "x86-64-v4", "rpi3", "rpi4", "rpi5")
_SAMPLES = 2


def graphs(names: Sequence[str], directory: Path) -> Iterator[tuple[str, tvm.IRModule, Mapping[str, np.ndarray]]]:
    """Yield each network in float32 and in int8, with its calibration data."""
    for name in names:
        found = workload(name, directory)
        merged = tvm.transform.Sequential(pipeline.merge_phases())(load([str(path) for path in found.models]))
        samples = found.calibration[0]
        yield f"{name} fp32", merged, samples
        quantize = InsertQDQ(samples, Policy.uniform(bits=8), executor=host_executor)
        yield f"{name} int8", tvm.transform.Sequential([quantize])(merged), samples


def describe(mod: tvm.IRModule, target: str, samples: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """Return what the kernels of a graph are on a target."""
    cpu = resolve(target)
    lowered = build.lower(mod, cpu)
    found: dict[str, Any] = {
        kernel.name: {
            "rule": kernel.rule,
            "knobs": kernel.knobs,
            "calls": kernel.calls,
            "layers": list(kernel.layers),
            "hash": str(tvm_ffi.structural_hash(lowered[kernel.name].without_attr("nnfuze.knobs"))),
        }
        for kernel in metrics.kernels(lowered)
    }
    if target == "host":
        machine = relax.VirtualMachine(build.generate(lowered, cpu), tvm.cpu())
        digest = hashlib.sha256()
        for n in range(_SAMPLES):
            inputs = [samples[param.name][n : n + 1] for param in mod["main"].params]
            for output in machine["main"](*(tvm.runtime.tensor(np.ascontiguousarray(each)) for each in inputs)):
                digest.update(output.numpy().tobytes())
        found["outputs"] = digest.hexdigest()
    return found


def record(names: Sequence[str], targets: Sequence[str]) -> dict[str, Any]:
    """Return the kernels of networks, by network, precision and target."""
    with tempfile.TemporaryDirectory() as directory:
        found = {}
        for name, mod, samples in graphs(names, Path(directory)):
            for target in targets:
                print(f"{name} {target}", file=sys.stderr)
                found[f"{name} {target}"] = describe(mod, target, samples)
        return found


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Return a line for each kernel of a network in both records that is not the same."""
    lines = []
    for network in sorted(old.keys() & new.keys()):
        before, after = old[network], new[network]
        for kernel in sorted(before.keys() | after.keys()):
            if kernel not in after or kernel not in before:
                lines.append(f"{network}: {kernel}: only {'before' if kernel in before else 'after'}")
            elif before[kernel] != after[kernel]:
                lines.append(f"{network}: {kernel}: {before[kernel]} became {after[kernel]}")
    return lines


def main(arguments: Sequence[str] | None = None) -> int:
    """Record or compare."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    verbs = parser.add_subparsers(dest="verb", required=True)
    one = verbs.add_parser("record")
    one.add_argument("file")
    one.add_argument("--networks", default=",".join([*networks.NAMES, "resnet8+resnet8"]))
    one.add_argument("--targets", default=",".join(TARGETS))
    both = verbs.add_parser("compare")
    both.add_argument("old")
    both.add_argument("new")
    given = parser.parse_args(arguments)
    if given.verb == "record":
        found = record(given.networks.split(","), given.targets.split(","))
        Path(given.file).write_text(json.dumps(found, indent=1, sort_keys=True) + "\n", encoding="utf-8")
        return 0
    old, new = (json.loads(Path(path).read_text(encoding="utf-8")) for path in (given.old, given.new))
    lines = differences(old, new)
    print("\n".join(lines) or f"all kernels of {len(old.keys() & new.keys())} networks and targets are the same")
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
