"""Biases that make up for what quantization does to the means of a layer's sums."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Var
from tvm.relax import op

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute
from nnfuze_tvm.graph.evaluate import evaluate
from nnfuze_tvm.graph.inferences import Inferences
from nnfuze_tvm.graph.ir import static_shape
from nnfuze_tvm.passes.compress.calibration import spread

# Means are taken over so many inferences, over fewer where those would be more multiply-accumulates in all.
_SAMPLES, _LEAST, _MACS = 32, 4, 1e11


@dataclass(frozen=True)
class Sums:
    """What is known of a quantized layer.

    Attributes
    ----------
    axis : int
        Where its result has its channels.
    unit : numpy.ndarray
        What one step of its int32 sums stands for, ``[channels]``: biases are multiples of it.
    bias : str or None
        What the quantized function calls the sum with its bias, a constant of one number per channel; None if it has
        none.
    """

    axis: int
    unit: np.ndarray
    bias: str | None


def correct_biases(
    exact: relax.Function,
    quantized: relax.Function,
    layers: Mapping[str, Sums],
    inferences: Sequence[Mapping[str, np.ndarray]],
    library: tvm.runtime.Module | None = None,
) -> relax.Function:
    """Return a quantized function whose layers' sums have the means that they have in the float one.

    Layer by layer, each behind those before it with their biases corrected already (Nagel et al., "Data-Free
    Quantization Through Weight Equalization and Bias Correction", 2019, appendix D). What the means are off by is taken
    back as far as it stands out from what so few inferences have by chance (James and Stein).

    Parameters
    ----------
    exact, quantized : tvm.relax.Function
        The float function, and what became of it; layers have the same names.
    layers : mapping of str to Sums
        The layers that are corrected.
    inferences : sequence of mapping
        Inputs by parameter.
    library : tvm.runtime.Module, optional
        The PrimFuncs that both call, by name.
    """
    taken = _evenly(exact, inferences)
    wanted: dict[str, list[np.ndarray]] = {name: [] for name in layers}
    names = {b.value: b.var.name for b in bindings(exact) if b.var.name in layers}

    def note(value: Value, found: Any) -> Any:
        if value in names:
            wanted[names[value]].append(_means(found, layers[names[value]].axis))
        return found

    for inputs in taken:
        evaluate(exact, inputs, library, note)
    return _Corrected(quantized, layers, wanted, Inferences(quantized, taken, library)).function()


def _evenly(func: relax.Function, inferences: Sequence[Mapping[str, np.ndarray]]) -> list[Mapping[str, np.ndarray]]:
    macs = sum(ops.macs(binding.value) for binding in bindings(func))
    return spread(inferences, min(_SAMPLES, max(_LEAST, int(_MACS / max(macs, 1)))))


def _means(values: np.ndarray, axis: int) -> np.ndarray:
    return values.mean(tuple(k for k in range(values.ndim) if k != axis), dtype="float64")


@dataclass
class _Corrected:
    func: relax.Function
    layers: Mapping[str, Sums]
    wanted: Mapping[str, list[np.ndarray]]
    runs: Inferences
    shifts: dict[str, tuple[Sums, np.ndarray]] = field(default_factory=dict)

    def function(self) -> relax.Function:
        emitter = Emitter()
        new: dict[Value, Value] = {}
        for binding in bindings(self.func):
            value = binding.value
            if binding.var.name in self.shifts:
                value = _shifted(value, *self.shifts[binding.var.name])
            self.runs.compute(binding.var, value)
            new[binding.var] = emitter.emit(substitute(value, new), binding.var.name)
            sums = self.layers.get(binding.var.name)
            if sums is not None:
                means = np.stack([_means(known[binding.var], sums.axis) for known in self.runs.known])
                shift = _surely(np.stack(self.wanted[binding.var.name]) - means)
                if sums.bias is not None:
                    self.shifts[sums.bias] = sums, shift
                elif (shift := np.rint(shift / sums.unit) * sums.unit).any():
                    shape = [len(shift) if k == sums.axis else 1 for k in range(len(static_shape(binding.var)))]
                    bias = shift.astype("float32").reshape(shape)
                    for known in self.runs.known:
                        known[binding.var] = known[binding.var] + bias
                    new[binding.var] = emitter.emit(op.add(new[binding.var], relax.const(bias)))
        outputs = [substitute(out, new) for out in output_fields(self.func)]
        return emitter.finish(self.func.params, outputs, self.func.attrs)


def _shifted(add: Value, sums: Sums, shift: np.ndarray) -> Value:
    """Return the add of a bias with another one."""
    (old,) = (arg for arg in add.args if not isinstance(arg, Var))
    values = array(old)
    bias = np.rint((values.astype("float64").ravel() + shift) / sums.unit) * sums.unit
    return substitute(add, {old: relax.const(bias.astype("float32").reshape(values.shape))})


def _surely(differences: np.ndarray) -> np.ndarray:
    """Return the mean of ``[samples, channels]``, smaller the more of it may be chance."""
    mean = differences.mean(0)
    if len(differences) == 1:
        return np.zeros_like(mean)
    chance = float((differences.var(0, ddof=1) / len(differences)).sum())
    size = float(np.square(mean).sum())
    return mean * max(1 - chance / size, 0.0) if size > 0 else mean
