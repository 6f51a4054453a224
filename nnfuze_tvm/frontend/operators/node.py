"""A node as its converter sees it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.ir import Call, GenericConst

from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value


class Tensors(list):
    """A sequence of tensors: it exists while a network is imported, and its length is known then."""


class FailedInside(Exception):
    """A subgraph has nodes that failed; their errors are noted."""


class Impossible(ValueError):
    """What a file asks for has no meaning with these shapes: nobody can compute it."""


Operands = list[Any]
"""A node's inputs, None for one that is left out; an index behind the last one gives None, too."""


@dataclass
class Node:
    """One node, and what its conversion needs of the import.

    Attributes
    ----------
    proto : onnx.NodeProto
        The node as the file has it.
    attributes : dict
        Its attributes by name: numbers, bytes, tuples of them, ``TensorProto``, ``GraphProto``. A converter that leaves
        the node to TVM's importer may change them first.
    opset : int
        Version of the operator set that the node is of.
    builder : tvm.relax.BlockBuilder
        Where calls are bound.
    body : callable
        ``(graph, operands) -> results``: imports a subgraph in place, its inputs bound to operands. It sees the names
        around it. Raises `FailedInside`.
    branch : callable
        The same for a subgraph without inputs that may never be computed. Raises `Impossible`, and nothing is noted, if
        nobody can compute it with these shapes.
    names : mapping
        What is computed so far, by name: None where that failed.
    """

    proto: onnx.NodeProto
    attributes: dict[str, Any]
    opset: int
    builder: relax.BlockBuilder
    body: Callable[[onnx.GraphProto, Sequence[Value]], list[Value]]
    branch: Callable[[onnx.GraphProto], list[Value]]
    names: Mapping[str, Value | None]

    @property
    def outputs(self) -> int:
        """Number of outputs, those without a name in between included."""
        return len(self.proto.output)

    def emit(self, value: Value) -> Value:
        """Bind a call to a variable, so that it can be used several times; leave what is a value already."""
        return self.builder.emit(value) if isinstance(value, Call | relax.TupleGetItem) else value

    def text(self, name: str, default: str = "") -> str:
        """Return an attribute that is a string."""
        value = self.attributes.get(name, default)
        return value.decode() if isinstance(value, bytes) else value


Converter = Callable[[Node, Operands], Any]
"""``(node, operands) ->`` an expression, a tuple or list of expressions (one per output), or ``NotImplemented``, which
leaves the node to TVM's converter. What can't be converted raises ValueError with the reason in one line."""


def known(value: Value | None) -> np.ndarray | None:
    """Return the value of a constant; None for what is computed or left out."""
    return array(value) if isinstance(value, GenericConst) else None


def tensors_of(values: Iterable[Value | None]) -> Iterator[Value]:
    """Give the tensors among values, those of sequences one by one."""
    for value in values:
        if isinstance(value, Tensors):
            yield from tensors_of(value)
        elif value is not None:
            yield value


def part_of(value: Value, axis: int, begin: int, end: int, keep: bool = True) -> Value:
    """Return ``value[begin:end]`` along an axis (not negative), without that axis if it shall not be kept."""
    if isinstance(value, GenericConst):
        cut = array(value)[(slice(None),) * axis + (slice(begin, end),)]
        return constant(cut if keep else cut.squeeze(axis))
    cut = relax.op.strided_slice(value, [axis], [begin], [end])
    return cut if keep else relax.op.squeeze(cut, [axis])


def refused(reason: str) -> Converter:
    """Return the converter of what only the import itself can compute, of constants, and nothing else can."""

    def convert(_node: Node, _inputs: Operands) -> Any:
        raise ValueError(reason)

    return convert
