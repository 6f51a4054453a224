"""What networks are tried on: what was given, else values made up within what the inputs' types allow."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from nnfuze_tvm.deploy.runner import Input, sample_batches
from nnfuze_tvm.jobs.data import Arrays, EvaluationData
from nnfuze_tvm.jobs.graphs import Graphs

MOST = 4


def samples(graphs: Graphs, inputs: Sequence[Input], data: EvaluationData) -> list[Arrays]:
    """Return a few inferences' inputs: of the evaluation data, else of the calibration's, else made up."""
    if data.batches:
        return list(data.batches[:MOST])
    if graphs.calibration is not None:
        return list(sample_batches(graphs.calibration, inputs, "calibration data")[:MOST])
    return made_up(inputs)


def made_up(inputs: Sequence[Input]) -> list[Arrays]:
    """Return made-up inputs, the same every time.

    Floats are around zero, then between 0 and 1. Integers of 8 bits are of any value. Wider ones are 0 or 1, then all
    1, then all 0: they may be indices, lengths or masks.
    """
    rng = np.random.default_rng(0)
    return [{i.name: _value(rng, i.shape, np.dtype(i.dtype), turn) for i in inputs} for turn in range(3)]


def _value(rng: np.random.Generator, shape: tuple[int, ...], dtype: np.dtype, turn: int) -> np.ndarray:
    if dtype == np.bool_:
        return rng.integers(0, 2, shape).astype(dtype) if turn == 0 else np.full(shape, turn == 1, dtype)
    if np.issubdtype(dtype, np.integer):
        if dtype.itemsize == 1:
            limits = np.iinfo(dtype)
            return rng.integers(limits.min, limits.max + 1, shape).astype(dtype)
        return rng.integers(0, 2, shape).astype(dtype) if turn == 0 else np.full(shape, turn % 2, dtype)
    return np.asarray(rng.uniform(0, 1, shape) if turn % 2 else rng.standard_normal(shape)).astype(dtype)
