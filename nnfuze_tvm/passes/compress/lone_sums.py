"""Sums of two tensors that nothing reads as 8 bits: they are added as floats, and neither has to be rounded for it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from tvm.ir import Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.dataflow import Value, op_name, operands


def without_lone_sums(
    integer: set[Value], made_by: Mapping[Var, Value], readers: Mapping[Value, Sequence[Var]]
) -> set[Value]:
    """Return what is computed from 8-bit tensors without sums that lead to nothing that reads 8 bits.

    The gates of a recurrent layer whose steps are written out, for example, add the products of input and state, and
    are floats from then on.

    Parameters
    ----------
    integer : set of Var
        What is computed from 8-bit tensors.
    made_by : mapping
        What each Var is bound to, in order.
    readers : mapping
        The Vars that are computed from each tensor.
    """
    needed: set[Value] = set()
    lone: set[Value] = set()
    for var in reversed(made_by):
        known = [reader for reader in readers.get(var, ()) if reader in integer]
        if any(reader in needed or _reads_codes(made_by[reader]) for reader in known):
            needed.add(var)
        elif _is_of_two(made_by[var], "add"):
            lone.add(var)
    return integer - lone


def _is_of_two(value: Value, name: str) -> bool:
    return op_name(value) == name and sum(isinstance(leaf, Var) for leaf in operands(value)) == 2


def _reads_codes(value: Value) -> bool:
    """Tell whether an integer operator wants 8 bits, and does not only pass on what it gets."""
    return ops.effect_of(value) in ("layer", "joins", "averages") or _is_of_two(value, "multiply")
