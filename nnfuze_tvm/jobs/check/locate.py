"""Where a network first goes wrong: at which node of its file, in which pass at which layer, or in which kernel."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import tvm
from tvm import relax
from tvm.ir.instrument import pass_instrument
from tvm.target import Target

from nnfuze_tvm.deploy import build
from nnfuze_tvm.frontend import load
from nnfuze_tvm.frontend.onnx_file import Source
from nnfuze_tvm.graph import evaluate, ir
from nnfuze_tvm.graph.dataflow import (
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    returning,
    with_main,
)
from nnfuze_tvm.jobs.check.differences import Rounding, difference
from nnfuze_tvm.jobs.check.originals import traced, with_all_tensors
from nnfuze_tvm.jobs.data import Arrays
from nnfuze_tvm.passes import pipeline

# Of what lies between two layers nobody asks for more than this.
_CLEAR = 1e-3


def first_node(source: Source, what: str, loaded: relax.Function, sample: Arrays, tolerance: float) -> str:
    """Return the first node whose value differs from what another evaluator makes of it, as it was imported.

    Parameters
    ----------
    source : Source
        The network, its nodes named.
    what : str
        The other evaluator.
    loaded : tvm.relax.Function
        What was made of it: its parameters tell the shapes.
    sample : dict
        Its inputs, by its own names.
    tolerance : float
        Differences that are allowed, relative to the range of a value.
    """
    wide, nodes = with_all_tensors(source)
    shapes = {param.name: ir.static_shape(param) for param in loaded.params}
    mod = load([wide.model], tasks=[source.task], shapes=shapes)
    alone = tvm.IRModule({var.name_hint: f for var, f in mod.functions_items() if var.name_hint != source.task})
    alone["main"] = mod[source.task].with_attr("global_symbol", "main")
    run = evaluate.hooked_executor(alone)
    answers = run(sample, None)
    references = traced(wide, what)(sample)
    disturbed = [run(sample, Rounding(seed, 0.0)) for seed in range(2)]
    for n, (name, operator) in enumerate(nodes):
        noise = max(_apart(other[n], answers[n]) for other in disturbed)
        if _apart(answers[n], references[n]) > max(tolerance, 8 * noise):
            return f"{operator} {name!r}, as it was imported"
    return ""


def first_step(
    start: tvm.IRModule, phases: Sequence[tvm.transform.Pass], sample: Arrays, output: int, tolerance: float
) -> str:
    """Return the first pass after which an output differs, and the first layer that it differs at.

    Parameters
    ----------
    start : tvm.IRModule
        A graph.
    phases : sequence of tvm.transform.Pass
        What is done to it, one after another.
    sample : dict
        Its inputs.
    output : int
        Which output.
    tolerance : float
        Differences that are allowed.
    """
    current = start
    (wanted,) = _values(current, sample, [output])
    for phase in phases:
        steps = _Steps()
        with tvm.transform.PassContext(instruments=[steps.instrument]):
            after = phase(current)
        if _apart(_values(after, sample, [output])[0], wanted) > tolerance:
            name = next((n for n, mod in steps.found if _wrong(mod, sample, output, wanted, tolerance)), "")
            layer = _first_layer(current, phase, sample, output, tolerance)
            return f"{layer or 'no layer alone'}, in the pass {name or phase.info.name}"
        current = after
    return ""


def first_kernel(fused: tvm.IRModule, lowered: tvm.IRModule, target: Target, sample: Arrays, output: int) -> str:
    """Return the first kernel on the way to an output that differs from what its function means, unscheduled.

    Parameters
    ----------
    fused : tvm.IRModule
        One PrimFunc per kernel, not scheduled.
    lowered : tvm.IRModule
        The same with schedules and packed weights, for this machine.
    target : tvm.target.Target
        This machine.
    sample : dict
        Inputs.
    output : int
        Which output.
    """
    needed = _upstream(bindings(lowered["main"]), output_fields(lowered["main"])[output])
    meant = {b.var.name: b.var for b in bindings(fused["main"]) if _is_tensor(b.var)}
    calls = {}
    pairs = []
    for binding in bindings(lowered["main"]):
        twin = meant[binding.var.name] if binding.var.name in meant else _last_of(binding.var.name, meant)
        calls[binding.var] = binding.value
        if twin is not None and binding.var in needed and _is_tensor(binding.var) and _type(twin) == _type(binding.var):
            pairs.append((binding.var, twin))
    references = _with_outputs(fused, [twin for _, twin in pairs])
    wide = _with_outputs(lowered, [var for var, _ in pairs])
    machine = relax.VirtualMachine(build.generate(wide, target), tvm.cpu())
    given = [tvm.runtime.tensor(np.asarray(sample[param.name], order="C")) for param in wide["main"].params]
    answers = [field.numpy() for field in machine["main"](*given)]
    apart = list(map(_apart, answers, evaluate.executor(references)(sample)))
    # Integers that come from floats may be a step off; what is wrong is further off, or is all integers.
    for limit in (_CLEAR, 0.0):
        for (var, _), distance in zip(pairs, apart, strict=True):
            if distance > limit and (limit or not str(var.ty.dtype).startswith("float")):
                return _kernel_text(lowered, calls[var], var)
    return ""


def _last_of(name: str, meant: Mapping[str, Value]) -> Value | None:
    """Return what a kernel of several calls ends with, by the names of its layers."""
    return next((var for own, var in meant.items() if name.endswith(ir.JOINED + own)), None)


def _kernel_text(lowered: tvm.IRModule, call: Value, var: Value) -> str:
    layers = ", ".join(map(repr, ir.layers_of(var)))
    kernel = call.args[0].name_hint if op_name(call) == "call_tir" else var.name
    rule = lowered[kernel].attrs.get("nnfuze.rule", "") if op_name(call) == "call_tir" else ""
    what = f"{layers or kernel}, in its kernel"
    return f"{what} (schedule rule {rule})" if rule else what


class _Steps:
    """Keeps the module after every pass that a phase consists of."""

    def __init__(self) -> None:
        self.found: list[tuple[str, tvm.IRModule]] = []
        depth: list[str] = []
        steps = self

        @pass_instrument
        class Instrument:
            def run_before_pass(self, _: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
                depth.append(str(info.name))

            def run_after_pass(self, mod: tvm.IRModule, info: tvm.ir.transform.PassInfo) -> None:
                depth.pop()
                if len(depth) == 1:
                    steps.found.append((str(info.name), mod))

        self.instrument = Instrument()


def _wrong(mod: tvm.IRModule, sample: Arrays, output: int, wanted: np.ndarray, tolerance: float) -> bool:
    try:
        return _apart(_values(mod, sample, [output])[0], wanted) > tolerance
    except Exception:  # in the middle of a phase a module may be nothing that can be computed
        return False


def _first_layer(before: tvm.IRModule, phase: tvm.transform.Pass, sample: Arrays, output: int, tolerance: float) -> str:
    """Bisect: the graph is cut off behind one value, goes through the phase, and is compared with what it was."""
    name, owner = _owner(before, output)
    func = before[name]
    found = bindings(func)
    tensors = [b.var for b in found if _is_tensor(b.var)]
    fields = output_fields(func)
    last = fields[owner]
    needed = _upstream(found, last)
    tensors = [var for var in tensors if var in needed]

    def differs(var: Value) -> bool:
        cut = _cut(before, name, var)
        (want,) = _values(cut, sample, [0])
        (got,) = _values(phase(cut), sample, [0])
        return _apart(got, want) > tolerance

    low, high = 0, len(tensors) - 1
    if high < 0 or not differs(tensors[high]):
        return ""
    while low < high:
        middle = (low + high) // 2
        if differs(tensors[middle]):
            high = middle
        else:
            low = middle + 1
    return _layer_of(found, tensors[low])


def _layer_of(found: Sequence[relax.VarBinding], var: Value) -> str:
    """Return the name of the layer that a value is of, or comes from."""
    values = {b.var: b.value for b in found}
    pending, seen = [var], set()
    while pending:
        one = pending.pop(0)
        if layers := ir.layers_of(one):
            return ", ".join(map(repr, layers))
        if one not in seen and one in values:
            seen.add(one)
            pending += [leaf for leaf in operands(values[one]) if isinstance(leaf, tvm.ir.Var)]
    return f"{op_name(values[var])} {var.name!r}" if var in values else ""


def _upstream(found: Sequence[relax.VarBinding], last: Value) -> set[Value]:
    needed = {last}
    for binding in reversed(found):
        if binding.var in needed:
            needed.update(leaf for leaf in operands(binding.value) if isinstance(leaf, tvm.ir.Var))
    return needed


def _owner(mod: tvm.IRModule, output: int) -> tuple[str, int]:
    """Return the function that computes an output, and which of its fields that is."""
    if any(var.name_hint == "main" for var in mod.functions):
        return "main", output
    owners = ir.task_outputs(mod)
    task = owners[output].task
    return task, sum(one.task == task for one in owners[:output])


def _cut(mod: tvm.IRModule, name: str, var: Value) -> tvm.IRModule:
    """Return the module with one Relax function, which returns one of its values."""
    kernels = {v: f for v, f in mod.functions.items() if not isinstance(f, relax.Function)}
    cut = tvm.IRModule({**kernels, name: returning(mod[name], [var])}).with_attrs(dict(mod.attrs.items()))
    return ir.with_task_outputs(cut, [ir.TaskOutput(name, var.name)])


def _with_outputs(mod: tvm.IRModule, values: Sequence[Value]) -> tvm.IRModule:
    return with_main(mod, returning(mod["main"], values))


def _values(mod: tvm.IRModule, sample: Arrays, wanted: Sequence[int]) -> list[np.ndarray]:
    """Compute outputs with NumPy, also of a module that has a function per task."""
    results = []
    for output in wanted:
        name, field = _owner(mod, output)
        functions: dict[Any, Any] = {v.name_hint: f for v, f in mod.functions_items()}
        main = mod[name]
        alone = tvm.IRModule({**{n: f for n, f in functions.items() if n != name}, "main": main})
        given: Mapping[str, np.ndarray] = {
            p.name: sample[p.name] if p.name in sample else sample[f"{name}.{p.name}"] for p in main.params
        }
        results.append(evaluate.executor(alone)(given)[field])
    return results


def _apart(answer: np.ndarray, reference: np.ndarray) -> float:
    return difference([answer], [reference])


def _is_tensor(var: Value) -> bool:
    return isinstance(var.ty, relax.TensorType)


def _type(var: Value) -> tuple[tuple[int, ...], str]:
    return ir.static_shape(var), str(var.ty.dtype)


def phases_to_kernels(target: Target) -> list[tvm.transform.Pass]:
    """Return phases 5 to 9 for a target."""
    return pipeline.lowering_phases(build.machine(target))
