"""The conventions every IRModule of this package keeps: task outputs, layer names, where layers come from."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import tvm
from tvm import relax

OUTPUTS_ATTR = "nnfuze.outputs"
ALIASES_ATTR = "nnfuze.aliases"
ORIGINS_ATTR = "nnfuze.origins"
SHARED_INPUTS_ATTR = "nnfuze.shared_inputs"
FLOAT_LAYERS_ATTR = "nnfuze.float_layers"
STATES_ATTR = "nnfuze.states"
OWN_STATES_ATTR = "nnfuze.own_states"
SOURCES_ATTR = "nnfuze.sources"
SMALL_WEIGHTS_ATTR = "nnfuze.small_weights"

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


def states(mod: tvm.IRModule) -> list[str]:
    """Return the last inputs of ``main``, which are what its last outputs were at the call before, in order."""
    attrs = mod.attrs
    return [] if attrs is None else [str(name) for name in attrs.get(STATES_ATTR, [])]


def own_states(mod: tvm.IRModule) -> list[str]:
    """Return the states that networks have by themselves, as `links.wire` takes them."""
    attrs = mod.attrs
    return [] if attrs is None else [str(link) for link in attrs.get(OWN_STATES_ATTR, [])]


def aliases(mod: tvm.IRModule) -> dict[str, str]:
    """Return layer names that a merge dropped, each with the name of the layer that now does its work."""
    return _names(mod, ALIASES_ATTR)


def with_aliases(mod: tvm.IRModule, mapping: Mapping[str, str]) -> tvm.IRModule:
    """Return ``mod`` with further aliases; chains are resolved."""
    merged = {**aliases(mod), **mapping}
    return mod.with_attr(ALIASES_ATTR, {old: mapping.get(new, new) for old, new in merged.items()})


def float_layers(mod: tvm.IRModule) -> dict[str, str]:
    """Return the layers that can't be integer ones, each with the reason."""
    noted = mod.attrs.get(FLOAT_LAYERS_ATTR, []) if mod.attrs is not None else []
    return {name: reason for name, _, reason in (str(note).rpartition(": ") for note in noted)}


def with_float_layers(mod: tvm.IRModule, reasons: Mapping[str, str]) -> tvm.IRModule:
    """Return ``mod`` with a note of the layers that can't be integer ones, and why."""
    return mod.with_attr(FLOAT_LAYERS_ATTR, [f"{name}: {reason}" for name, reason in reasons.items()])


def small_weights(mod: tvm.IRModule) -> bool:
    """Return whether no pass shall make weights larger than they are, however fast that would be."""
    return mod.attrs is not None and SMALL_WEIGHTS_ATTR in mod.attrs


def with_small_weights(mod: tvm.IRModule) -> tvm.IRModule:
    """Return ``mod`` with a note that its weights shall stay as small as they are."""
    return mod.with_attr(SMALL_WEIGHTS_ATTR, True)


def sources(mod: tvm.IRModule) -> dict[int, tvm.runtime.Tensor]:
    """Return what is stored of constants that are computed from smaller ones: by the address of their values.

    All axes but the first are those of the constant, and every number of it is computed from those of the source that
    have the same place on them: what brings the one into another order does so with the other.
    """
    attrs = mod.attrs
    pairs = attrs.get(SOURCES_ATTR, []) if attrs is not None else []
    return {address(made): source for made, source in pairs}


def with_sources(mod: tvm.IRModule, pairs: Iterable[tuple[tvm.runtime.Tensor, tvm.runtime.Tensor]]) -> tvm.IRModule:
    """Return ``mod`` with a note of further constants and what they are computed from; see `sources`."""
    known = mod.attrs.get(SOURCES_ATTR, []) if mod.attrs is not None else []
    return mod.with_attr(SOURCES_ATTR, [*known, *([made, source] for made, source in pairs)])


def address(tensor: tvm.runtime.Tensor) -> int:
    """Return where the numbers of a tensor are."""
    return int(tensor.data_ptr())


def derive(mod: tvm.IRModule, new: str, origin: str) -> tvm.IRModule:
    """Return ``mod`` with a note that a pass made the layer ``new`` out of the layer ``origin``.

    What a policy says of ``origin`` then holds for ``new``. ``origin`` may be a derived layer itself, may have aliases,
    and need not be there any more.

    Parameters
    ----------
    new
        The name of the new layer's Var (`dataflow.Emitter` may have made it unique).
    origin
        The name of the layer that it comes from.
    """
    if new == origin:
        return mod
    return mod.with_attr(ORIGINS_ATTR, {**_names(mod, ORIGINS_ATTR), new: origin})


@dataclass(frozen=True)
class Lineage:
    """Where the layers of a module come from.

    Attributes
    ----------
    aliases
        Names that a merge dropped → the layer that does their work now.
    origins
        Layers that a pass made → the layer that they were made out of.
    """

    aliases: Mapping[str, str] = field(default_factory=dict)
    origins: Mapping[str, str] = field(default_factory=dict)

    def names(self, layer: str) -> list[str]:
        """Return the names of the networks' own layers that ``layer`` does the work of, or a part of it."""
        found: dict[str, None] = {}
        self._collect(layer, found, set())
        return list(found)

    def _collect(self, layer: str, found: dict[str, None], seen: set[str]) -> None:
        if layer in seen:
            return
        seen.add(layer)
        if layer in self.origins:
            self._collect(self.origins[layer], found, seen)
        else:
            found[layer] = None
        for old, heir in self.aliases.items():
            if heir == layer:
                self._collect(old, found, seen)


def lineage(mod: tvm.IRModule) -> Lineage:
    """Return where the layers of a module come from."""
    return Lineage(aliases(mod), _names(mod, ORIGINS_ATTR))


def _names(mod: tvm.IRModule, attribute: str) -> dict[str, str]:
    attrs = mod.attrs
    if attrs is None or attribute not in attrs:
        return {}
    return {str(k): str(v) for k, v in attrs[attribute].items()}


def clean_name(text: str) -> str:
    """Return ``text`` with characters outside ``[A-Za-z0-9_./-]`` replaced by ``_``."""
    return re.sub(r"[^A-Za-z0-9_./-]", "_", text)


def layers_of(var: relax.Var) -> list[str]:
    """Return the names of the layers whose result a Var holds, several where a kernel computes several."""
    return [name for name in var.name.split(JOINED) if "/" in name]


def nbytes(shape: Sequence[int], dtype: str) -> int:
    """Return the bytes of a tensor; numbers of a few bits take a byte each at most."""
    return math.prod(shape) * max(1, tvm.DataType(dtype).itemsize)


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
