"""The conventions every IRModule of this package keeps: task outputs, layer names, aliases."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import tvm
from tvm import relax

OUTPUTS_ATTR = "nnfuze.outputs"
ALIASES_ATTR = "nnfuze.aliases"
SHARED_INPUTS_ATTR = "nnfuze.shared_inputs"

# What stands between the layers' names in the name of a Var that holds the result of several of them.
JOINED = "+"


@dataclass(frozen=True)
class TaskOutput:
    """One output of one task: a field of the tuple that ``main`` returns."""

    task: str
    name: str


def task_outputs(mod: tvm.IRModule) -> list[TaskOutput]:
    """Return which task owns each output field, in tuple order (before the merge: function by function)."""
    attrs = mod.attrs
    if attrs is None or OUTPUTS_ATTR not in attrs:
        raise ValueError(f"module has no {OUTPUTS_ATTR!r} attribute: was it made by nnfuze_tvm.load?")
    return [TaskOutput(*str(entry).split(":", 1)) for entry in attrs[OUTPUTS_ATTR]]


def with_task_outputs(mod: tvm.IRModule, outputs: Iterable[TaskOutput]) -> tvm.IRModule:
    """Return ``mod`` with its output-to-task mapping replaced."""
    return mod.with_attr(OUTPUTS_ATTR, [f"{o.task}:{o.name}" for o in outputs])


def tasks(mod: tvm.IRModule) -> list[str]:
    """Return the task names in the order of their first output."""
    return list(dict.fromkeys(o.task for o in task_outputs(mod)))


def aliases(mod: tvm.IRModule) -> dict[str, str]:
    """Return layer names that a merge dropped, each with the name of the layer that now does its work."""
    attrs = mod.attrs
    if attrs is None or ALIASES_ATTR not in attrs:
        return {}
    return {str(k): str(v) for k, v in attrs[ALIASES_ATTR].items()}


def with_aliases(mod: tvm.IRModule, mapping: Mapping[str, str]) -> tvm.IRModule:
    """Return ``mod`` with further aliases; chains are resolved."""
    merged = {**aliases(mod), **mapping}
    return mod.with_attr(ALIASES_ATTR, {old: mapping.get(new, new) for old, new in merged.items()})


def clean_name(text: str) -> str:
    """Return ``text`` with characters outside ``[A-Za-z0-9_./-]`` replaced by ``_``."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", text)


def layers_of(var: relax.Var) -> list[str]:
    """Return the names of the layers whose result a Var holds, several where a kernel computes several."""
    return [name for name in var.name.split(JOINED) if "/" in name]


def static_shape(expr: relax.Expr) -> tuple[int, ...]:
    """Return the static shape of a tensor expression.

    Raises
    ------
    ValueError
        If the expression is no tensor or has a symbolic dimension.
    """
    shape = getattr(expr.ty, "shape", None)
    if shape is None or not hasattr(shape, "values"):
        raise ValueError(f"no static tensor shape: {expr}")
    return tuple(int(dim) for dim in shape.values)
