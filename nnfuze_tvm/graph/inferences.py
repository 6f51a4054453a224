"""Several inferences of one function side by side, binding by binding."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Var

from nnfuze_tvm.graph.dataflow import Value, bindings, operands, output_fields
from nnfuze_tvm.graph.evaluate import value_of


class Inferences:
    """The values of a function's Vars in several inferences, each for as long as something reads it.

    Parameters
    ----------
    func : relax.Function
        A straight-line function.
    inputs : sequence of mapping
        The arrays of one inference each, by parameter.
    library : tvm.runtime.Module, optional
        The PrimFuncs that it calls, by name.

    Attributes
    ----------
    known : list of dict
        What is known in each inference.
    readers : Counter
        How often each value is still read.
    """

    def __init__(
        self, func: relax.Function, inputs: Sequence[Mapping[str, np.ndarray]], library: tvm.runtime.Module | None
    ) -> None:
        self.library = library
        self.readers = Counter(leaf for b in bindings(func) for leaf in operands(b.value))
        self.known: list[dict[Value, Any]] = [{p: np.asarray(arrays[p.name]) for p in func.params} for arrays in inputs]
        self.outputs = output_fields(func)
        self.readers.update(leaf for out in self.outputs for leaf in operands(out))

    def compute(self, var: Var, value: Value) -> None:
        """Compute what is bound to a Var; what is made of constants alone, once for all."""
        if any(isinstance(leaf, Var) for leaf in operands(value)):
            for known in self.known:
                known[var] = value_of(value, known, self.library)
        else:
            common = value_of(value, {}, self.library)
            for known in self.known:
                known[var] = common
        for leaf in operands(value):
            self.release(leaf)

    def release(self, value: Value) -> None:
        """Forget a value that has one reader less, if that was the last one."""
        self.readers[value] -= 1
        if not self.readers[value]:
            for known in self.known:
                known.pop(value, None)

    def results(self, chosen: slice) -> list[list[np.ndarray]]:
        """Return each output's arrays in some of the inferences."""
        known = self.known[chosen]
        return [[np.asarray(value_of(out, values, None)) for values in known] for out in self.outputs]
