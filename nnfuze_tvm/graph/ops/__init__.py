"""What is known of operators: one file per family, each with its ``OPERATORS``. No other file lists any.

A file in this folder is a family: a mapping from the names of Relax operators, without ``relax.``, to what
`operator.Operator` wants to know of each, and another, ``ONNX``, to what they are there. Everything that treats
operators asks here.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from importlib import import_module
from types import MappingProxyType

from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.dataflow import Value, op_name, operands
from nnfuze_tvm.graph.ops.operator import Layer, Operator

_PROPORTIONAL = ("layer", "moves", "joins", "averages")


def _read() -> dict[str, Operator]:
    found: dict[str, Operator] = {}
    for module in sorted(info.name for info in pkgutil.iter_modules(__path__)):
        file = import_module(f"{__name__}.{module}")
        family, forms = getattr(file, "OPERATORS", {}), getattr(file, "ONNX", {})
        twice = found.keys() & family.keys()
        assert not twice, f"two families have {', '.join(sorted(twice))}"
        assert forms.keys() <= family.keys(), f"{module} has no {', '.join(sorted(forms.keys() - family.keys()))}"
        for name, operator in family.items():
            found[name] = replace(operator, family=module, export=forms.get(name))
    return found


OPERATORS: Mapping[str, Operator] = MappingProxyType(_read())
"""All operators by name, family by family."""


def of(value: Value) -> Operator | None:
    """Return what is known of the operator that a bound value calls, if anything is."""
    return OPERATORS.get(op_name(value))


def effect_of(value: Value) -> str:
    """Return what a bound value's call does to values, see `operator.Effect`; nothing for what is not known."""
    operator = of(value)
    if operator is None:
        return ""
    return "moves" if operator.moves is not None and operator.moves(value) else operator.effect


def degrees(value: Value) -> Sequence[float | None]:
    """Return the power of each of its operands that a bound value grows with near zero, see `Operator.degrees`."""
    operator, leaves = of(value), operands(value)
    if operator is None:
        return [None if isinstance(value, Call) else 1.0] * len(leaves)
    if operator.degrees is not None:
        return operator.degrees(value)
    return [1.0 if operator.bounds or effect_of(value) in _PROPORTIONAL else None] * len(leaves)


def proportional(value: Value) -> Sequence[int]:
    """Return the operands out of which a positive factor can be drawn together, see `Operator.proportional`."""
    operator = of(value)
    if operator is None:
        return ()
    if operator.proportional is not None:
        return operator.proportional(value)
    return (0,) if effect_of(value) in ("moves", "joins", "averages") else ()


def macs(value: Value) -> int:
    """Return the multiply-accumulates of a bound value; zero for what is no layer."""
    operator = of(value)
    return operator.macs(value) if operator is not None and operator.macs is not None else 0


def is_layer(value: Value) -> bool:
    """Tell whether a bound value is a call of an operator with weights: what carries a layer's name."""
    operator = of(value)
    return operator is not None and operator.effect == "layer"


def layer(value: Value) -> Layer | None:
    """Return where a layer with constant weights has its channels; None for whatever is no such layer."""
    operator = of(value)
    if operator is None or operator.layer is None:
        return None
    data, weights = value.args[:2]
    if isinstance(data, GenericConst) or not isinstance(weights, GenericConst):
        return None
    return operator.layer(value)
