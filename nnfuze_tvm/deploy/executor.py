"""Running a graph on this machine, compiled: the executor of calibration where networks are large."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax

from nnfuze_tvm.devices import targets
from nnfuze_tvm.graph.evaluate import Run


def host_executor(mod: tvm.IRModule) -> Run:
    """Build ``mod`` for this machine with the package's own schedules; see `graph.evaluate.Executor`."""
    from nnfuze_tvm.deploy import build  # with all schedules: most calibrations do without

    machine = relax.VirtualMachine(build.build(mod, targets.resolve("host")), tvm.cpu())
    names = [param.name for param in mod["main"].params]

    def run(inputs: Mapping[str, np.ndarray]) -> list[np.ndarray]:
        outputs = machine["main"](*(tvm.runtime.tensor(np.asarray(inputs[name], order="C")) for name in names))
        return [output.numpy() for output in outputs]

    return run
