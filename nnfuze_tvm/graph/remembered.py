"""Functions that compute much of what another one computes, without computing that again."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var

from nnfuze_tvm.graph.dataflow import Value, bindings
from nnfuze_tvm.graph.evaluate import evaluate, kernels_of


class Remembered:
    """All values of a module's ``main`` on some inputs.

    Parameters
    ----------
    mod : tvm.IRModule
        One straight-line Relax function ``main``, and the PrimFuncs that it calls.
    inputs : sequence of mapping
        The arrays of one inference each, by parameter.

    Attributes
    ----------
    outputs : list of list of numpy.ndarray
        What it returns, inference by inference.
    """

    def __init__(self, mod: tvm.IRModule, inputs: Sequence[Mapping[str, np.ndarray]]) -> None:
        self._library = kernels_of(mod)
        self._inputs, self._main = list(inputs), mod["main"]
        self._known: list[dict[Value, Any]] = [{} for _ in self._inputs]
        self._places = {_place(b.value, {}): b.var for b in bindings(self._main)}
        self.outputs = [
            evaluate(self._main, arrays, self._library, known=known)
            for arrays, known in zip(self._inputs, self._known, strict=True)
        ]

    def run(self, func: relax.Function) -> list[list[np.ndarray]]:
        """Return what another function of the same parameters returns, inference by inference.

        What it computes with the very operators, attributes and constants of the first one, from the same values, is
        taken from there. It may call the first one's PrimFuncs.
        """
        same: dict[Value, Value] = dict(zip(func.params, self._main.params, strict=True))
        for binding in bindings(func):
            var = self._places.get(_place(binding.value, same))
            if var is not None:
                same[binding.var] = var
        results = []
        for arrays, known in zip(self._inputs, self._known, strict=True):
            taken = {own: known[var] for own, var in same.items() if var in known}
            results.append(evaluate(func, arrays, self._library, known=taken))
        return results


def _place(value: Value, same: Mapping[Value, Value]) -> Any:
    """Return what a bound value is computed by and from; two that are equal have equal values."""
    if isinstance(value, Var):
        return same.get(value, value)
    if isinstance(value, Call):
        return value.op, value.attrs, tuple(_place(arg, same) for arg in value.args)
    if isinstance(value, relax.Tuple):
        return tuple(_place(field, same) for field in value.fields)
    if isinstance(value, relax.TupleGetItem):
        return _place(value.tuple_value, same), value.index
    return value
