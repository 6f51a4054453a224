"""Which tensors 8 bits on a linear scale can't hold, because of what is computed from them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace

from tvm import relax
from tvm.ir import GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields
from nnfuze_tvm.graph.ir import static_shape


@dataclass(frozen=True)
class _Use:
    """What the network's result does with a tensor, on one way or on all.

    Attributes
    ----------
    degree : float
        The power of it that the result grows with near zero.
    cause : str
        The last operator that made the degree less than 1.
    behind_layer : bool
        Whether a layer is on the way.
    """

    degree: float = 1.0
    cause: str = ""
    behind_layer: bool = False


_PLAIN = _Use()


@dataclass
class Delicate:
    """What is delicate in a function: a step of 8 bits near zero changes the result by more than a step.

    That is so where a logarithm, a root or a quotient follows, perhaps behind squares, sums and products, as in a
    spectrogram: of a network's result as a power of a tensor near zero, the degree is less than 1. Degrees multiply
    along the way, so the root of a sum of squares is as harmless as its operands. What normalizes a tensor by itself
    reads it as a denominator, too, and is none of this as long as something else reads the tensor. Behind a
    layer, the search ends at what has a bias: transforms have none, and learned layers make up for their input.

    Attributes
    ----------
    causes : dict of Var to str
        The delicate tensors, each with the operator that makes it so.
    exact : set of (Var, Var)
        Pairs of a Var and an operand whose 8 bits are not enough to compute it from.
    """

    func: relax.Function
    causes: dict[Var, str] = field(default_factory=dict)
    exact: set[tuple[Var, Value]] = field(default_factory=set)

    def __post_init__(self) -> None:
        uses: dict[Value, list[_Use]] = {}
        for out in output_fields(self.func):
            for leaf in operands(out):
                uses.setdefault(leaf, []).append(_PLAIN)
        for binding in reversed(bindings(self.func)):
            own = _together(uses.get(binding.var, []))
            if own.degree < 1:
                self.causes[binding.var] = own.cause
            for leaf, use in _passed_on(binding.value, own):
                uses.setdefault(leaf, []).append(use)
                if use.degree < 1:
                    self.exact.add((binding.var, leaf))


def _together(uses: Iterable[_Use]) -> _Use:
    """Return what several uses are together: roots and logarithms count always, denominators if there is no other."""
    uses = list(uses)
    steep = [use for use in uses if 0 <= use.degree < 1]
    if steep:
        return min(steep, key=lambda use: use.degree)
    return max(uses, key=lambda use: use.degree, default=_PLAIN)


def _passed_on(value: Value, own: _Use) -> Iterable[tuple[Value, _Use]]:
    """Return what a use of a bound value's result is for each of its operands."""
    if own.behind_layer and _has_bias(value):
        own = _PLAIN
    if ops.is_layer(value):
        own = replace(own, behind_layer=True) if own.degree < 1 else _PLAIN
    for leaf, degree in zip(operands(value), ops.degrees(value), strict=True):
        if degree is None:
            yield leaf, _PLAIN
        else:
            cause = own.cause if own.degree < 1 else op_name(value)
            yield leaf, replace(own, degree=degree * own.degree, cause=cause)


def _has_bias(value: Value) -> bool:
    """Tell whether a value is a sum with a constant other than one number."""
    return op_name(value) in ("add", "subtract") and any(
        isinstance(arg, GenericConst) and any(size > 1 for size in static_shape(arg)) for arg in value.args
    )
