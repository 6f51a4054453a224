"""Layers that have states of their own, in 8 bits: the states are rounded inside, what they read and make is not."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import tvm
from tvm import relax
from tvm.ir import GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.graph.ops.operator import Recurs
from nnfuze_tvm.passes.compress.calibration import collect_ranges
from nnfuze_tvm.passes.compress.magnitudes import CalibrationMethod
from nnfuze_tvm.passes.compress.stored_weights import Stored


def quantize_states(
    mod: tvm.IRModule,
    func: relax.Function,
    asked: set[str],
    stored: Mapping[str, Stored],
    samples: Mapping[str, np.ndarray],
    method: CalibrationMethod,
    executor: Executor,
) -> tuple[relax.Function, set[str]]:
    """Return the function with the states of layers in 8 bits, and the names of the other layers.

    Parameters
    ----------
    mod : tvm.IRModule
        The module of the function.
    func : relax.Function
        A float function.
    asked : set of str
        The layers that get 8 bits.
    stored : mapping of str to Stored
        What a file has for the weights of layers that it stores in 8 bits.
    samples : mapping
        Checked samples.
    method : str
        How the range of the states follows from the samples.
    executor : callable
        Runs the float function.
    """
    layers = {var: recurs for var, recurs in _recurrent(func).items() if var.name in asked}
    if not layers:
        return func, asked
    limits = _limits(mod, func, layers, samples, method, executor)
    emitter, values = Emitter(), dict[Value, Value]()
    for binding in bindings(func):
        value = substitute(binding.value, values)
        if binding.var in layers:
            own = stored.get(binding.var.name)
            given = None if own is None else (own.codes, own.scale)
            value = layers[binding.var].in_8_bits(value, limits[binding.var], given, emitter.emit)
        values[binding.var] = emitter.emit(value, binding.var.name)
    outputs = [substitute(out, values) for out in output_fields(func)]
    return emitter.finish(func.params, outputs, func.attrs), asked - {var.name for var in layers}


def recurrent_layers(func: relax.Function) -> set[str]:
    """Return the names of the layers whose states can be in 8 bits."""
    return {var.name for var in _recurrent(func)}


def _recurrent(func: relax.Function) -> dict[Var, Recurs]:
    found: dict[Var, Recurs] = {}
    for binding in bindings(func):
        operator = ops.of(binding.value)
        if operator is not None and operator.recurs is not None and isinstance(binding.value.args[1], GenericConst):
            found[binding.var] = operator.recurs
    return found


def _limits(
    mod: tvm.IRModule,
    func: relax.Function,
    layers: Mapping[Var, Recurs],
    samples: Mapping[str, np.ndarray],
    method: CalibrationMethod,
    executor: Executor,
) -> dict[Var, float]:
    """Return the absolute value that becomes the largest code of each layer's states."""
    made_by = {b.var: b.value for b in bindings(func)}
    first = {var: recurs.states(made_by[var]) for var, recurs in layers.items()}
    inner = [value for value, _ in first.values() if isinstance(value, Var)]
    ranges = collect_ranges(mod, func, dict.fromkeys([*layers, *inner], 0), samples, executor)

    def limit(value: Value) -> float:
        if isinstance(value, GenericConst):
            return float(np.abs(array(value)).max(initial=0.0))
        return ranges[value].limit(method)

    return {var: max(limit(value), min(limit(var), bound)) for var, (value, bound) in first.items()}
