"""The pass that makes one kernel of several where their data then stay in the cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx
from tvm.ir.transform import PassContext, module_pass
from tvm.target import Target

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.dataflow import Emitter, Value, bindings, op_name, operands, output_fields, substitute, with_main
from nnfuze_tvm.graph.ir import nbytes, static_shape
from nnfuze_tvm.schedules.bands import model
from nnfuze_tvm.schedules.bands.progress import Bands
from nnfuze_tvm.schedules.bands.stages import Kernel, kernel
from nnfuze_tvm.schedules.bands.weave import Group, weave

Best = Callable[[Group, Hardware], tuple[float, Bands] | None]

# Kernels in a group at most: what is looked for takes time, and the buffers between more of them leave the cache.
MOST_KERNELS = 12


@dataclass(frozen=True)
class Call:
    """A binding of ``main``: its kernel, if that makes rows one after the other."""

    binding: Any
    kernel: Kernel | None


@module_pass(opt_level=0, name="FuseBands")
class FuseBands:
    """Fuse scheduled kernels that are called one after the other into one that computes them band by band.

    Whether that pays, and how high a band is, a model of the caches says (`bands.model`). The kernels stay as they were
    scheduled, or tuned, and so does every number that they compute.

    Parameters
    ----------
    target : tvm.target.Target
        The CPU.
    hw : Hardware, optional
        Its model; by default the target's.
    best : callable
        What a group saves on a machine, and its bands, or None if it should not be one.
    """

    def __init__(self, target: Target, hw: Hardware | None = None, best: Best = model.best) -> None:
        self.target = target
        self.hw = hw or Hardware.of(target)
        self.best = best

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Return the module with groups of kernels fused.

        The rule of such a kernel is ``bands``, its knobs are the bands' ``height``, the ``parts`` that run in parallel
        and the number of ``kernels``; ``nnfuze.parts`` are their names, ``nnfuze.near`` the bytes that L2 delivers in
        a call.
        """
        steps = bindings(mod["main"])
        used = uses(mod["main"])
        calls = calls_of(mod, self.target, lambda n: self._near_far(steps, n))
        chosen = self._choose(calls, used)
        return fused(mod, calls, chosen) if chosen else mod

    def _near_far(self, steps: Sequence[Any], number: int) -> bool:
        """Tell whether a binding's result or one of its operands is too large for the cache."""
        value = steps[number].value
        values = [steps[number].var, *(leaf for leaf in operands(value) if isinstance(leaf, relax.Var))]
        return any(_bytes(value) > self.hw.l2_bytes // 2 for value in values)

    def _choose(self, calls: Sequence[Call], used: dict[Any, int]) -> list[tuple[int, Group, Bands]]:
        """Return the groups that save most together: where each begins, and its bands."""
        best: list[tuple[float, list[tuple[int, Group, Bands]]]] = [(0.0, [])]
        for end in range(1, len(calls) + 1):
            gain, groups = best[end - 1]
            for begin in range(end - 2, max(-1, end - 1 - MOST_KERNELS), -1):
                part = calls[begin:end]
                if any(call.kernel is None for call in part):
                    break
                group = group_of(part, used)
                found = self.best(group, self.hw) if group is not None else None
                if group is not None and found is not None and best[begin][0] + found[0] > gain:
                    gain, groups = best[begin][0] + found[0], [*best[begin][1], (begin, group, found[1])]
            best.append((gain, groups))
        return best[-1][1]


def calls_of(mod: tvm.IRModule, target: Target, wanted: Callable[[int], bool] = lambda _: True) -> list[Call]:
    """Return the bindings of ``main`` as calls, those of ``wanted`` numbers with their kernels."""
    known: dict[str, Kernel | None] = {}
    found = []
    for n, binding in enumerate(bindings(mod["main"])):
        value = binding.value
        own = None
        if (
            op_name(value) == "call_tir"
            and isinstance(value.ty, relax.TensorType)
            and len(value.args) == 2
            and wanted(n)
        ):
            name = value.args[0].name_hint
            if name not in known:
                known[name] = kernel(mod[name], target)
            own = known[name]
        found.append(Call(binding, own))
    return found


def _bytes(value: Any) -> int:
    """Return the bytes of a tensor, 0 if a value is none."""
    if not isinstance(value.ty, relax.TensorType):
        return 0
    return nbytes(static_shape(value), str(value.ty.dtype))


def uses(main: relax.Function) -> dict[Any, int]:
    """Return how often each value is read; outputs of the network count, too."""
    found: dict[Any, int] = {}
    for value in (*(binding.value for binding in bindings(main)), *output_fields(main)):
        for leaf in operands(value):
            found[leaf] = found.get(leaf, 0) + 1
    return found


def group_of(calls: Sequence[Call], used: dict[Any, int]) -> Group | None:
    """Return calls as a group; None if one of their results but the last is needed elsewhere, or only one is given."""
    numbers: dict[Any, int] = {}
    arguments = []
    inside: dict[Any, int] = {}
    for call in calls:
        read = list(call.binding.value.args[1].fields)
        for leaf in operands(call.binding.value):
            inside[leaf] = inside.get(leaf, 0) + 1
        values = [*read, call.binding.var]
        arguments.append(tuple(numbers.setdefault(value, len(numbers)) for value in values))
    if any(inside.get(call.binding.var, 0) != used.get(call.binding.var, 0) for call in calls[:-1]):
        return None
    kernels = tuple(call.kernel for call in calls if call.kernel is not None)
    group = Group(kernels, tuple(arguments), arguments[-1][-1])
    # TVM asks of kernels of one operand whether they are reshapes, and can't read one of several stages.
    return group if len(group.given) > 1 else None


def fused(mod: tvm.IRModule, calls: Sequence[Call], chosen: Sequence[tuple[int, Group, Bands]]) -> tvm.IRModule:
    """Return the module with groups as kernels; equal ones share one.

    Parameters
    ----------
    mod : tvm.IRModule
        The module.
    calls : sequence of Call
        The bindings of its ``main``.
    chosen : sequence of (int, Group, Bands)
        Where each group begins, and its bands.
    """
    steps = [call.binding for call in calls]
    starts = {begin: (group, bands) for begin, group, bands in chosen}
    builder = relax.BlockBuilder(mod.clone())
    emitter = Emitter()
    values: dict[Value, Value] = {}
    made: dict[Any, Any] = {}
    n = 0
    while n < len(steps):
        if n not in starts:
            values[steps[n].var] = emitter.emit(substitute(steps[n].value, values), steps[n].var.name)
            n += 1
            continue
        group, bands = starts[n]
        part = steps[n : n + len(group.kernels)]
        names = tuple(step.value.args[0].name_hint for step in part)
        key = (names, group.arguments, bands)
        if key not in made:
            made[key] = builder.add_func(_kernel(group, bands, names), "bands_" + names[-1])
        leaves: dict[int, Any] = {}
        for step, numbers in zip(part, group.arguments, strict=True):
            leaves.update(dict(zip(numbers, [*step.value.args[1].fields, step.var], strict=True)))
        given = [substitute(leaves[value], values) for value in group.given]
        result = part[-1].var
        call = relax.call_tir(made[key], given, relax.TensorType(static_shape(result), str(result.ty.dtype)))
        layers = dict.fromkeys(layer for step in part for layer in ir.layers_of(step.var))
        values[result] = emitter.emit(call, ir.JOINED.join(layers) or result.name)
        n += len(part)
    main = mod["main"]
    outputs = [substitute(field, values) for field in output_fields(main)]
    rewritten = with_main(builder.get(), emitter.finish(main.params, outputs, main.attrs))
    return relax.transform.DeadCodeElimination()(rewritten)


def _kernel(group: Group, bands: Bands, names: Sequence[str]) -> tirx.PrimFunc:
    knobs = {"height": bands.height, "parts": bands.parts, "kernels": len(names)}
    return weave(group, bands).with_attr(
        {
            "nnfuze.rule": "bands",
            "nnfuze.knobs": knobs,
            "nnfuze.parts": list(names),
            "nnfuze.near": model.near(group, bands),
        }
    )
