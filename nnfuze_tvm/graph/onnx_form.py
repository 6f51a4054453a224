"""How operators say what they are in ONNX: nodes by name, as plain records; the package ``onnx`` is not needed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import numpy as np
from tvm.ir import Call

from nnfuze_tvm.graph.dataflow import Value
from nnfuze_tvm.graph.ir import static_shape

Form = Callable[..., Any]
"""``(write, call, *operands) -> name``, or a list of names for a tuple: what `Writer` is told for one call. Operands
are names, lists of names for tuples, and None for what is no tensor."""


class Unwritable(ValueError):
    """A call that ONNX has no form for; the message is the reason, and goes on from "it"."""


@dataclass(frozen=True)
class Node:
    """An ONNX node.

    Attributes
    ----------
    operator : str
        Of ONNX's own domain.
    inputs, outputs : tuple of str
        Names of values; an input that is left out is "".
    attributes : mapping
        Numbers, texts, and lists of them.
    name : str
        Its own name.
    """

    operator: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    name: str = ""


class Names:
    """Names that are taken."""

    def __init__(self) -> None:
        self._next: dict[str, int] = {}

    def unique(self, name: str) -> str:
        """Reserve ``name``, with a numeric suffix when it is taken."""
        found = name
        while found in self._next:
            self._next[name] += 1
            found = f"{name}_{self._next[name]}"
        self._next[found] = 0
        return found


class Writer:
    """Collects nodes and constants.

    Attributes
    ----------
    nodes : list of Node
        In order.
    constants : dict of str to numpy.ndarray
        Equal ones once.
    opset : int
        The version of ONNX's operators that is needed. From 21 on, ONNX Runtime's optimizer (1.31 and before) may spoil
        what is quantized to int8, so it is that only where there is no other way.
    """

    def __init__(self) -> None:
        self.nodes: list[Node] = []
        self.constants: dict[str, np.ndarray] = {}
        self.opset = 20
        self._known: dict[tuple[Any, ...], str] = {}
        self._values, self._names = Names(), Names()

    def unique(self, name: str) -> str:
        """Reserve a name for a value, with a suffix when it is taken."""
        return self._values.unique(name)

    def __call__(self, operator: str, *inputs: str, **attributes: Any) -> str:
        """Add a node with one output and return that one's name."""
        return self.several(operator, inputs, 1, **attributes)[0]

    def several(self, operator: str, inputs: Sequence[str], count: int, **attributes: Any) -> list[str]:
        """Add a node with several outputs."""
        outputs = tuple(self.unique(operator) for _ in range(count))
        self.nodes.append(Node(operator, tuple(inputs), outputs, attributes))
        return list(outputs)

    def constant(self, values: Any, dtype: Any = None) -> str:
        """Return the name of a constant."""
        array = np.asarray(values, dtype, order="C")
        key = (array.shape, str(array.dtype), sha256(array.tobytes()).digest())
        if key not in self._known:
            self._known[key] = self.unique("constant")
            self.constants[self._known[key]] = array
        return self._known[key]

    def integers(self, values: Sequence[int]) -> str:
        """Return the name of a constant vector of whole numbers, such as a shape."""
        return self.constant([int(value) for value in values], "int64")

    def like(self, operand: Value, number: float) -> str:
        """Return the name of a constant of an operand's type, the nearest that this has."""
        kind = np.dtype(dtype_of(operand))
        if kind.kind in "iu":
            number = int(min(max(number, np.iinfo(kind).min), np.iinfo(kind).max))
        return self.constant(number, kind)

    def reshaped(self, value: str, shape: Sequence[int]) -> str:
        """Reshape a value; a size of 0 means 0."""
        return self("Reshape", value, self.integers(shape), **({"allowzero": 1} if 0 in shape else {}))

    def cast(self, value: str, before: str, after: str) -> str:
        """Return the value in another type."""
        return value if before == after else self("Cast", value, to=after)

    def maker(self, value: str, operator: str) -> Node | None:
        """Return the node that makes a value, if it is one of an operator."""
        found = next((node for node in reversed(self.nodes) if value in node.outputs), None)
        return found if found is not None and found.operator == operator else None

    def shape(self, value: str) -> tuple[int, ...]:
        """Return the shape of a constant, () for what is none."""
        return self.constants[value].shape if value in self.constants else ()

    def keep(self, outputs: Sequence[str]) -> None:
        """Drop nodes and constants that nothing needs."""
        live, kept = set(outputs), []
        for node in reversed(self.nodes):
            if live & set(node.outputs):
                live |= set(node.inputs)
                kept.append(node)
        self.nodes = kept[::-1]
        self.constants = {name: value for name, value in self.constants.items() if name in live}

    def rename(self, start: int, results: Mapping[str, str], layer: str) -> None:
        """Name the nodes from ``start`` on after a layer, and those of their outputs that are results."""
        for n, node in enumerate(self.nodes[start:], start):
            outputs = tuple(results.get(name, name) for name in node.outputs)
            inputs = tuple(results.get(name, name) for name in node.inputs)
            own = layer if outputs != node.outputs else f"{layer}/{node.operator}"
            self.nodes[n] = replace(node, inputs=inputs, outputs=outputs, name=self._names.unique(own))


def dtype_of(operand: Value) -> str:
    """Return the type of an operand's numbers."""
    return str(operand.ty.dtype)


def named(operator: str, **attributes: Any) -> Form:
    """Return the form of what is one ONNX operator with the same operands."""
    return lambda write, _, *operands: write(operator, *[name for name in operands if name is not None], **attributes)


def require(holds: bool, reason: str) -> None:
    """Refuse a call unless a condition holds."""
    if not holds:
        raise Unwritable(reason)


def rank_of(call: Call, operand: int = 0) -> int:
    """Return the number of an operand's axes."""
    return len(static_shape(call.args[operand]))
