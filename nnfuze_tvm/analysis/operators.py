"""What the operator registry declares, as one record per operator."""

from __future__ import annotations

from dataclasses import dataclass

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.ops.operator import Operator


@dataclass(frozen=True)
class OperatorRecord:
    """One Relax operator.

    Attributes
    ----------
    name, family, effect : str
        The operator, the file of `graph.ops` that describes it, and what it does to values.
    precisions : tuple of str
        In what it is computed: ``float32``, ``int8``, ``float16``. What has no form of its own in a precision is
        computed in float32 between conversions.
    prunes : str
        What pruning does with its channels: ``own`` can be removed, ``follow`` those of its operands, or stay ``whole``.
    merges : bool
        Whether calls in branches of several tasks become one call.
    rules : tuple of str
        The schedule rules that its kernels get.
    """

    name: str
    family: str
    effect: str
    precisions: tuple[str, ...]
    prunes: str
    merges: bool
    rules: tuple[str, ...]


def operators() -> list[OperatorRecord]:
    """Return a record per operator of the registry, layers first, family by family."""
    found = [_record(name, operator) for name, operator in ops.OPERATORS.items() if operator.kernels]
    return sorted(found, key=lambda record: (record.effect != "layer", record.family))


def _record(name: str, operator: Operator) -> OperatorRecord:
    integer = operator.quantizes if operator.effect == "layer" else operator.integer is not None
    declared = {"float32": True, "int8": integer, "float16": operator.half}
    return OperatorRecord(
        name=name,
        family=operator.family,
        effect=operator.effect,
        precisions=tuple(precision for precision, here in declared.items() if here),
        prunes="whole" if operator.couple is None else "own" if operator.effect == "layer" else "follow",
        merges=operator.batch is not None,
        rules=operator.kernels,
    )
