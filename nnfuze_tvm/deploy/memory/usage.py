"""How much memory a planned network takes."""

from __future__ import annotations

from typing import NamedTuple

import tvm
from tvm.target import Target

from nnfuze_tvm.deploy.memory.arena import ATTRIBUTE, allocating_passes, size
from nnfuze_tvm.deploy.memory.plan import PER_THREAD
from nnfuze_tvm.graph.dataflow import bindings, op_name


class Usage(NamedTuple):
    """Bytes that a call takes beside its inputs and constants.

    Attributes
    ----------
    arena : int
        What kernels hand to each other, and what they use beside it while they run.
    outputs : int
        What the call returns.
    scratch : int
        What kernels allocate on every thread for that thread alone.
    """

    arena: int
    outputs: int
    scratch: int

    def total(self, threads: int = 1) -> int:
        """Return all of it where kernels run on so many threads."""
        return self.arena + self.outputs + threads * self.scratch


def usage(finished: tvm.IRModule, target: Target) -> Usage:
    """Return how much memory a call of a finished module takes that was finished for a target."""
    with target:
        main = tvm.transform.Sequential(allocating_passes())(finished)["main"]
    alone = [binding.var for binding in bindings(main) if op_name(binding.value) == "builtin.alloc_tensor"]
    return Usage(int(main.attrs.get(ATTRIBUTE, 0)), sum(map(size, alone)), int(finished["main"].attrs[PER_THREAD]))
