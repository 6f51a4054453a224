"""Sequences of tensors, and what may be missing: they are gone when a network is imported, so all that is asked of them
must be known then.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from tvm import relax

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands, Tensors, known, part_of
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


def _construct(node: Node, inputs: Operands) -> Any:
    return Tensors(inputs)


def _empty(node: Node, inputs: Operands) -> Any:
    return Tensors()


def _position(value: Value | None, default: int, length: int, most: int) -> int:
    """Return a place in a sequence, negative ones counted from its end."""
    place = known(value)
    if value is not None and place is None:
        raise ValueError("a computed position in a sequence is not supported")
    at = default if place is None else int(place.item())
    if not -length <= at <= most:
        raise ValueError(f"position {at} is outside of a sequence of {length}")
    return at + length if at < 0 else at


def _at(node: Node, inputs: Operands) -> Any:
    return inputs[0][_position(inputs[1], 0, len(inputs[0]), len(inputs[0]) - 1)]


def _insert(node: Node, inputs: Operands) -> Any:
    length = len(inputs[0])
    result = Tensors(inputs[0])
    result.insert(_position(inputs[2], length, length, length), inputs[1])
    return result


def _erase(node: Node, inputs: Operands) -> Any:
    result = Tensors(inputs[0])
    del result[_position(inputs[1], len(result) - 1, len(result), len(result) - 1)]
    return result


def _length(node: Node, inputs: Operands) -> Any:
    return constant(np.array(len(inputs[0]), "int64"))


def _split(node: Node, inputs: Operands) -> Any:
    """Cut a tensor into pieces of given lengths, of one length (the last may be shorter), or into single slices."""
    shape = ir.static_shape(inputs[0])
    axis, lengths = int(node.attributes.get("axis", 0)), known(inputs[1])
    if not -len(shape) <= axis < len(shape):
        raise ValueError(f"axis {axis} is not one of {len(shape)}")
    axis %= len(shape)
    if inputs[1] is not None and lengths is None:
        raise ValueError("computed lengths of pieces are not supported")
    keep = lengths is not None or bool(node.attributes.get("keepdims", 1))
    if lengths is not None and lengths.ndim:
        ends = np.cumsum(lengths).tolist()
        if (lengths < 0).any() or (ends or [0])[-1] != shape[axis]:
            raise ValueError(f"the pieces are {sum(lengths)} long, the axis is {shape[axis]}")
    else:
        length = 1 if lengths is None else int(lengths.item())
        if length < 1:
            raise ValueError(f"pieces can't be {length} long")
        ends = [min(begin + length, shape[axis]) for begin in range(0, shape[axis], length)]
    return Tensors(part_of(inputs[0], axis, begin, end, keep) for begin, end in zip([0, *ends[:-1]], ends, strict=True))


def _join(node: Node, inputs: Operands) -> Any:
    """Join tensors along an axis, which may be a new one."""
    if not inputs[0]:
        raise ValueError("an empty sequence can't be joined")
    parts, axis = list(inputs[0]), int(node.attributes["axis"])
    if node.attributes.get("new_axis", 0):
        rank = len(ir.static_shape(parts[0])) + 1
        parts = [node.emit(relax.op.expand_dims(part, axis % rank)) for part in parts]
    return relax.op.concat(parts, axis) if len(parts) > 1 else parts[0]


def _map(node: Node, inputs: Operands) -> Any:
    """Import the body once for each element."""
    body = node.attributes["body"]
    results = []
    for index, element in enumerate(inputs[0]):
        others = [each[index] if isinstance(each, Tensors) else each for each in list(inputs)[1:]]
        results.append(node.body(body, [element, *others]))
    return [Tensors(each) for each in zip(*results, strict=True)] if results else [Tensors() for _ in body.output]


def _optional(node: Node, inputs: Operands) -> Any:
    if inputs[0] is None:
        raise ValueError("an optional value that is not there is not supported")
    return inputs[0]


def _has_element(node: Node, inputs: Operands) -> Any:
    return constant(np.array(inputs[0] is not None))


CONVERTERS: dict[str, Converter] = {
    "SequenceConstruct": _construct,
    "SequenceEmpty": _empty,
    "SequenceAt": _at,
    "SequenceInsert": _insert,
    "SequenceErase": _erase,
    "SequenceLength": _length,
    "SequenceMap": _map,
    "SplitToSequence": _split,
    "ConcatFromSequence": _join,
    "Optional": _optional,
    "OptionalHasElement": _has_element,
    "OptionalGetElement": _optional,
}

TAKING = frozenset({"SequenceAt", "SequenceInsert", "SequenceErase", "SequenceLength", "SequenceMap",
                    "ConcatFromSequence", "Loop", "Optional", "OptionalHasElement", "OptionalGetElement"})  # fmt: skip
"""Operators whose inputs may be sequences."""
