"""One layer becomes two that are less work, which samples then fit to what it gave before."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir import Call, Var

from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, output_fields, substitute, with_functions
from nnfuze_tvm.graph.evaluate import Executor
from nnfuze_tvm.passes.compress.calibration import load_calibration
from nnfuze_tvm.passes.compress.repair import Compressed, repaired
from nnfuze_tvm.passes.compress.sites import has_one_matrix

if TYPE_CHECKING:
    from nnfuze_tvm.passes.compress.policy import LayerPolicy, Policy

Look = Callable[[tvm.IRModule, relax.Function, list[Var], Mapping[str, np.ndarray], Executor], Mapping[Var, np.ndarray]]
"""From a module, one of its functions, layers of that, samples, and what runs networks, to what those say of each."""

Halve = Callable[["Call", "LayerPolicy", Any, Emitter, str], "tuple[Value, list[str]] | None"]
"""From a layer, what is asked of it, what samples say of it (or None), where to emit the first half, and the layer's
name, to what gives its result and the names of the layers that are new; None to leave it."""


def in_two(
    mod: tvm.IRModule,
    policy: Policy,
    calibration: str | os.PathLike[str] | Mapping[str, np.ndarray] | None,
    executor: Executor,
    announce: Callable[[str], None],
    *,
    is_asked: Callable[[LayerPolicy], bool],
    look: Look,
    halve: Halve,
) -> tvm.IRModule:
    """Return a module whose layers with one matrix of weights are halved where a policy asks; else ``mod`` itself.

    Parameters
    ----------
    mod : tvm.IRModule
        A float network.
    policy : Policy
        What is asked of each layer.
    calibration : path or mapping, optional
        Samples, see :func:`nnfuze_tvm.passes.compress.calibration.load_calibration`.
    executor : callable
        Runs the float network.
    announce : callable
        Is told how far the repair is.
    is_asked, look, halve : callable
        Whether anything is asked of a layer, what samples say of layers, and how a layer is halved.
    """
    samples = None if calibration is None else load_calibration(calibration, mod)
    lineage, made, changed = ir.lineage(mod), dict[str, str](), {}
    for gvar, func in mod.functions_items():
        if not isinstance(func, relax.Function):
            continue
        asked = {b.var: policy.for_layer(b.var.name, lineage) for b in bindings(func) if has_one_matrix(b.value)}
        asked = {var: layer for var, layer in asked.items() if is_asked(layer)}
        known = {} if samples is None or not asked else look(mod, func, list(asked), samples, executor)
        new, own, same = _halved(func, asked, known, halve)
        if own:
            made |= own
            changed[gvar] = new
            if samples is not None:
                changed[gvar] = repaired(mod, Compressed(func, new, same, lambda _, v: v), samples, announce)
    if not made:
        return mod
    result = with_functions(mod, {**mod.functions, **changed})
    for name, origin in made.items():
        result = ir.derive(result, name, origin)
    return result


def _halved(
    func: relax.Function, asked: Mapping[Var, LayerPolicy], known: Mapping[Var, Any], halve: Halve
) -> tuple[relax.Function, dict[str, str], dict[str, Var]]:
    """Return the function with halved layers, the new ones' origins by name, and by name what held the same before."""
    emitter, done, made = Emitter(), dict[Value, Value](), dict[str, str]()
    for param in func.params:
        emitter.unique(param.name)
    for binding in bindings(func):
        value, name = substitute(binding.value, done), binding.var.name
        layer = asked.get(binding.var)
        found = None if layer is None else halve(value, layer, known.get(binding.var), emitter, name)
        if found is not None:
            value, names = found
            made |= dict.fromkeys(names, name)
        done[binding.var] = emitter.emit(value, name)
    outputs = [substitute(out, done) for out in output_fields(func)]
    same = {new.name: old for old, new in done.items() if isinstance(old, Var) and isinstance(new, Var)}
    return (emitter.finish(func.params, outputs, func.attrs) if made else func), made, same
