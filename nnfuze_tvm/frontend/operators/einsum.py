"""Einstein sums as transposes and matrix products."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
from tvm.relax import op

from nnfuze_tvm.frontend.operators.node import Converter, Node, Operands
from nnfuze_tvm.frontend.operators.values import dtype_of, permuted, reshaped, rows
from nnfuze_tvm.graph import ir
from nnfuze_tvm.graph.constants import constant
from nnfuze_tvm.graph.dataflow import Value


@dataclass
class _Term:
    """A tensor, and the label of each of its axes."""

    value: Value
    labels: list[str]

    @property
    def sizes(self) -> dict[str, int]:
        return dict(zip(self.labels, ir.static_shape(self.value), strict=True))


def _einsum(node: Node, inputs: Operands) -> Any:
    shapes = [ir.static_shape(each) for each in inputs]
    parts, result = _parsed(node.text("equation"), [len(shape) for shape in shapes])
    terms = [_diagonals(node, _Term(value, labels)) for value, labels in zip(inputs, parts, strict=True)]
    total = _summed(node, terms[0], set(result).union(*(term.labels for term in terms[1:])))
    for n, term in enumerate(terms[1:], 2):
        total = _contracted(node, total, term, set(result).union(*(later.labels for later in terms[n:])))
    if set(result) != set(total.labels):
        raise ValueError(f"equation {node.text('equation')!r} asks for axes that no operand has")
    return permuted(total.value, [total.labels.index(label) for label in result])


def _parsed(equation: str, ranks: Sequence[int]) -> tuple[list[list[str]], list[str]]:
    """Return the labels of the operands and of the result; axes of an ellipsis are called ``.0`` and so on."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    texts = left.split(",")
    if len(texts) != len(ranks):
        raise ValueError(f"equation {equation!r} is of {len(texts)} operands, not {len(ranks)}")
    named = [len(text.replace("...", "")) for text in texts]
    hidden = max(
        (rank - count for rank, count, text in zip(ranks, named, texts, strict=True) if "..." in text), default=0
    )

    def labels(text: str, behind: int) -> list[str]:
        first, dots, last = text.partition("...")
        middle = [f".{n}" for n in range(hidden - behind, hidden)] if dots else []
        return [*first, *middle, *last]

    parts = [labels(text, rank - count) for text, rank, count in zip(texts, ranks, named, strict=True)]
    if any(len(part) != rank for part, rank in zip(parts, ranks, strict=True)):
        raise ValueError(f"equation {equation!r} does not fit operands of {', '.join(map(str, ranks))} dimensions")
    if arrow:
        return parts, labels(right, hidden)
    counts = Counter(label for part in parts for label in part if not label.startswith("."))
    return parts, labels("..." if hidden else "", hidden) + sorted(label for label, n in counts.items() if n == 1)


def _diagonals(node: Node, term: _Term) -> _Term:
    """Keep the diagonal of axes that have the same label."""
    labels = list(dict.fromkeys(term.labels))
    if len(labels) == len(term.labels):
        return term
    shape = ir.static_shape(term.value)
    if any(term.sizes[label] != size for label, size in zip(term.labels, shape, strict=True)):
        raise ValueError("axes of one label have different sizes")
    sizes = [term.sizes[label] for label in labels]
    places = np.indices(sizes)
    index = np.ravel_multi_index([places[labels.index(label)] for label in term.labels], shape)
    return _Term(node.emit(rows(node.emit(reshaped(term.value, (prod(shape),))), constant(index))), labels)


def _summed(node: Node, term: _Term, wanted: set[str]) -> _Term:
    """Sum over the axes that nothing else has."""
    axes = [axis for axis, label in enumerate(term.labels) if label not in wanted]
    if not axes:
        return term
    return _Term(node.emit(op.sum(term.value, axes)), [label for label in term.labels if label in wanted])


def _contracted(node: Node, left: _Term, right: _Term, wanted: set[str]) -> _Term:
    left, right = _without_units(node, left, right), _without_units(node, right, left)
    left = _summed(node, left, wanted | set(right.labels))
    right = _summed(node, right, wanted | set(left.labels))
    shared = [label for label in left.labels if label in right.labels]
    if any(left.sizes[label] != right.sizes[label] for label in shared):
        raise ValueError("axes of one label have different sizes")
    batch = [label for label in shared if label in wanted]
    inner = [label for label in shared if label not in wanted]
    rest, columns = ([label for label in term.labels if label not in shared] for term in (left, right))
    sizes = {**left.sizes, **right.sizes}
    labels = [*batch, *rest, *columns]
    lone = not rest and not columns
    if not inner or lone or not dtype_of(left.value).startswith("float"):
        return _summed(node, _multiplied(node, left, right, [*labels, *inner], sizes), set(labels))

    def count(group: list[str]) -> int:
        return prod(sizes[label] for label in group)

    front = [count(batch)] if batch else []
    rows_of = _ordered(node, left, [*batch, *rest, *inner], [*front, count(rest), count(inner)])
    columns_of = _ordered(node, right, [*batch, *inner, *columns], [*front, count(inner), count(columns)])
    product = node.emit(op.matmul(rows_of, columns_of))
    return _Term(node.emit(reshaped(product, [sizes[label] for label in labels])), labels)


def _without_units(node: Node, term: _Term, other: _Term) -> _Term:
    """Drop axes of an ellipsis that are repeated along those of the other operand."""
    sizes = other.sizes
    axes = [n for n, label in enumerate(term.labels) if term.sizes[label] == 1 and sizes.get(label, 1) != 1]
    if not axes:
        return term
    kept = [label for n, label in enumerate(term.labels) if n not in axes]
    return _Term(node.emit(op.squeeze(term.value, axes)), kept)


def _ordered(node: Node, term: _Term, labels: list[str], shape: list[int]) -> Value:
    moved = node.emit(permuted(term.value, [term.labels.index(label) for label in labels]))
    return node.emit(reshaped(moved, shape))


def _multiplied(node: Node, left: _Term, right: _Term, labels: list[str], sizes: dict[str, int]) -> _Term:
    """Multiply element by element, axes that one operand lacks repeated."""

    def placed(term: _Term) -> Value:
        own = [label for label in labels if label in term.labels]
        return _ordered(node, term, own, [sizes[label] if label in own else 1 for label in labels])

    return _Term(node.emit(op.multiply(placed(left), placed(right))), labels)


CONVERTERS: dict[str, Converter] = {
    "Einsum": _einsum,
}
