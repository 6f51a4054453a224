"""How channels of tensors go together on samples."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Var

from nnfuze_tvm.graph.dataflow import returning
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.passes.compress.calibration import observed

# So many inferences are looked at, at most.
_MOST_BATCHES = 256


def moments(
    mod: tvm.IRModule,
    func: relax.Function,
    axes: Mapping[Var, int],
    samples: Mapping[str, np.ndarray],
    executor: Executor,
) -> dict[Var, tuple[np.ndarray, int]]:
    """Return the sums of products of the channels of tensors, ``[channels, channels]`` float64, and of how many rows.

    Parameters
    ----------
    mod : tvm.IRModule
        The module of the function.
    func : relax.Function
        A straight-line function.
    axes : mapping of Var to int
        The tensors, each with the axis of its channels; everything else of a tensor is rows.
    samples : mapping
        Checked samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    executor : callable
        Runs the network.
    """
    if not axes:
        return {}
    found: dict[Var, tuple[np.ndarray, int]] = {}
    for values in observed(mod, returning(func, list(axes)), samples, executor, _MOST_BATCHES):
        for (var, axis), value in zip(axes.items(), values, strict=True):
            rows = np.moveaxis(value, axis, -1).reshape(-1, value.shape[axis]).astype("float64")
            total, count = found.get(var, (0, 0))
            found[var] = (total + rows.T @ rows, count + len(rows))
    return found
