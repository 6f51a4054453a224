"""Branches and loops: what follows from constants is imported in place, branches on data become a choice of values."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
from tvm import relax
from tvm.ir import GenericConst

from nnfuze_tvm.frontend.operators.node import (
    Converter,
    FailedInside,
    Impossible,
    Node,
    Operands,
    Tensors,
    known,
    part_of,
    tensors_of,
)
from nnfuze_tvm.graph import dataflow, ir
from nnfuze_tvm.graph.constants import array, constant
from nnfuze_tvm.graph.dataflow import Value

_DIVISIONS = frozenset({"divide", "floor_divide", "mod", "floor_mod"})
_PICKS = frozenset({"take", "gather_elements", "gather_nd", "scatter_elements", "scatter_nd"})


def _if(node: Node, inputs: Operands) -> Any:
    """Return the branch that a known condition chooses; else compute both, and choose by the condition.

    A branch that nobody can compute with the given shapes gives NaN where it is chosen.
    """
    branches = [node.attributes["then_branch"], node.attributes["else_branch"]]
    condition = known(inputs[0])
    if condition is not None:
        return node.body(branches[0] if condition.item() else branches[1], [])
    outside = set(tensors_of(node.names.values()))
    both: list[list[Value]] = []
    failed, reasons = False, []
    for branch in branches:
        # What can't be converted is named for both.
        try:
            both.append(node.branch(branch))
        except FailedInside:
            failed = True
        except Impossible as error:
            reasons.append(str(error))
            both.append([])
    if failed:
        raise FailedInside
    if len(reasons) == len(both):
        raise Impossible(f"no branch can be computed with these shapes: {'; '.join(reasons)}")
    if reasons:
        both = [results or _nothing(other, reasons[0]) for results, other in (both, both[::-1])]
    for results in both:
        _check_harmless(node, results, outside)
    chosen = node.emit(relax.op.reshape(inputs[0], [])) if ir.static_shape(inputs[0]) else inputs[0]
    return [_choice(chosen, then, other, name) for then, other, name in zip(*both, node.proto.output, strict=True)]


def _nothing(results: Sequence[Value], reason: str) -> list[Value]:
    """Return NaN in the place of results: what a branch gives that ends in an error wherever it is taken."""
    if any(isinstance(each, Tensors) or not str(each.ty.dtype).startswith("float") for each in results):
        raise ValueError(f"its condition is computed, and a branch can't be computed with these shapes: {reason}")
    return [constant(np.full(ir.static_shape(each), np.nan, str(each.ty.dtype))) for each in results]


def _choice(condition: Value, then: Value, other: Value, name: str) -> Value:
    if isinstance(then, Tensors) or isinstance(other, Tensors):
        if not isinstance(then, Tensors) or not isinstance(other, Tensors) or len(then) != len(other):
            raise ValueError(f"its condition is computed, and its branches make {name!r} in different lengths")
        return Tensors(_choice(condition, *pair, name) for pair in zip(then, other, strict=True))
    if then.same_as(other) or _equal(then, other):
        return then
    kinds = [f"{each.ty.dtype} {list(ir.static_shape(each))}" for each in (then, other)]
    if kinds[0] != kinds[1]:
        raise ValueError(
            f"its condition is computed, and its branches make {name!r} as {kinds[0]} and as {kinds[1]}, which is not "
            "supported"
        )
    return relax.op.where(condition, then, other)


def _equal(one: Value, other: Value) -> bool:
    left, right = known(one), known(other)
    if left is None or right is None:
        return False
    return left.dtype == right.dtype and left.shape == right.shape and left.tobytes() == right.tobytes()


def _check_harmless(node: Node, results: Sequence[Value], outside: set[Value]) -> None:
    """Refuse what must not be computed in vain: it would end the program, or read memory that is not its own."""
    pending, seen = list(results), set()
    while pending:
        value = pending.pop()
        if isinstance(value, Tensors):
            pending.extend(value)
            continue
        if value in outside or value in seen or isinstance(value, GenericConst):
            continue
        seen.add(value)
        bound = node.builder.lookup_binding(value)
        if bound is None:
            continue
        name = dataflow.op_name(bound)
        if name in _DIVISIONS and not str(bound.args[1].ty.dtype).startswith("float"):
            divisor = known(bound.args[1])
            if divisor is None or not divisor.all():
                raise ValueError("its condition is computed, and a branch divides by computed integers")
        bounded = name == "take" and str(bound.attrs.mode) in ("clip", "wrap")
        if name in _PICKS and not bounded and _is_computed(node, bound.args[1]):
            raise ValueError("its condition is computed, and a branch reads or writes at computed places")
        pending.extend(dataflow.operands(bound))


def _is_computed(node: Node, value: Value) -> bool:
    """Return whether a tensor depends on data, and not on constants and shapes only."""
    pending, seen = [value], set()
    while pending:
        one = pending.pop()
        if isinstance(one, GenericConst) or one in seen:
            continue
        seen.add(one)
        bound = node.builder.lookup_binding(one)
        if bound is None:
            return True
        if dataflow.op_name(bound) not in ("shape_of", "shape_to_tensor"):
            pending.extend(dataflow.operands(bound))
    return False


def _loop(node: Node, inputs: Operands) -> Any:
    """Import the body once for each iteration."""
    body = node.attributes["body"]
    most, going = known(inputs[0]), known(inputs[1])
    if inputs[0] is not None and most is None:
        raise ValueError("its number of iterations is computed, which is not supported")
    if inputs[1] is not None and going is None:
        raise ValueError(_COMPUTED_END)
    goes = going is None or bool(going.item())
    state = list(inputs)[2:]
    made: list[list[Value]] = [[] for _ in body.output[1 + len(state) :]]
    step = 0
    while goes and (most is None or step < most.item()):
        count = constant(np.full(_scalar_shape(body, 0), step, "int64"))
        results = node.body(body, [count, constant(np.ones(_scalar_shape(body, 1), bool)), *state])
        after = known(results[0])
        if after is None:
            raise ValueError(_COMPUTED_END)
        goes, step = bool(after.item()), step + 1
        state = results[1 : 1 + len(state)]
        for parts, part in zip(made, results[1 + len(state) :], strict=True):
            parts.append(part)
    declared = body.output[1 + len(state) :]
    return [*state, *(_stacked(parts, 0, value) for parts, value in zip(made, declared, strict=True))]


_COMPUTED_END = "whether it goes on is computed, which is not supported"


def _scalar_shape(body: onnx.GraphProto, place: int) -> tuple[int, ...]:
    """Return the shape in which a body wants its counter or condition: some declare a vector of one."""
    declared = body.input[place].type.tensor_type
    return (1,) * len(declared.shape.dim) if declared.HasField("shape") else ()


def _stacked(parts: Sequence[Value], axis: int, declared: onnx.ValueInfoProto) -> Value:
    """Return what iterations made, along a new axis."""
    if not parts:
        kind = declared.type.tensor_type
        shape = [dim.dim_value for dim in kind.shape.dim]
        if not kind.HasField("shape") or not all(shape):
            raise ValueError(f"it has no iteration, and the shape of {declared.name!r} is not declared")
        shape.insert(axis, 0)
        return constant(np.zeros(shape, onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)))
    if any(isinstance(part, Tensors) for part in parts):
        raise ValueError("sequences can't be stacked")
    kinds = {(str(part.ty.dtype), ir.static_shape(part)) for part in parts}
    if len(kinds) > 1:
        raise ValueError(f"its iterations make {declared.name!r} in different shapes, which is not supported")
    rank = len(ir.static_shape(parts[0]))
    if not -rank - 1 <= axis <= rank:
        raise ValueError(f"axis {axis} is not one of {declared.name!r}")
    axis %= rank + 1
    if all(isinstance(part, GenericConst) for part in parts):
        return constant(np.stack(list(map(array, parts)), axis))
    if len(parts) == 1:
        return relax.op.expand_dims(parts[0], axis)
    if axis == rank:
        return relax.op.concat([relax.op.expand_dims(part, axis) for part in parts], axis)
    # Side by side along the axis behind the new one, they are in the same order: one reshape for all.
    shape = list(ir.static_shape(parts[0]))
    return relax.op.reshape(relax.op.concat(list(parts), axis), [*shape[:axis], len(parts), *shape[axis:]])


def _scan(node: Node, inputs: Operands) -> Any:
    """Import the body once for each slice of the inputs that are scanned."""
    scanned = int(node.attributes["num_scan_inputs"])
    if node.opset >= 9:
        return _scanned(node, list(inputs), scanned, "scan_input_directions")
    lengths, operands = inputs[0], list(inputs)[1:]
    batch, steps = ir.static_shape(operands[-scanned])[:2]
    own = known(lengths)
    if lengths is not None and (own is None or np.any(own != steps)):
        raise ValueError("sequence_lens shorter than the sequences are not supported")
    # Version 8 has a batch in front of everything, which its body does not see.
    each = []
    for item in range(batch):
        parts = [_bound(node, part_of(value, 0, item, item + 1, keep=False)) for value in operands]
        each.append([_bound(node, value) for value in _scanned(node, parts, scanned, "directions")])
    declared = node.attributes["body"].output
    return [_stacked(parts, 0, value) for parts, value in zip(zip(*each, strict=True), declared, strict=True)]


def _scanned(node: Node, inputs: list[Value], scanned: int, directions: str) -> list[Value]:
    body = node.attributes["body"]
    state, sequences = inputs[:-scanned], inputs[-scanned:]
    made: list[list[Value]] = [[] for _ in body.output[len(state) :]]
    axes = [
        _axis(axis, len(ir.static_shape(value)))
        for axis, value in zip(_list(node, "scan_input_axes", scanned), sequences, strict=True)
    ]
    lengths = {ir.static_shape(value)[axis] for axis, value in zip(axes, sequences, strict=True)}
    if len(lengths) > 1:
        raise ValueError(f"its inputs are scanned over different lengths, {sorted(lengths)}")
    backwards = _list(node, directions, scanned)
    slices = [_slices(node, value, axis) for value, axis in zip(sequences, axes, strict=True)]
    slices = [each[::-1] if back else each for each, back in zip(slices, backwards, strict=True)]
    for parts in zip(*slices, strict=True):
        results = node.body(body, [*state, *parts])
        state = results[: len(state)]
        for one, part in zip(made, results[len(state) :], strict=True):
            one.append(part)
    out_axes, out_back = (_list(node, f"scan_output_{what}", len(made)) for what in ("axes", "directions"))
    declared = body.output[len(state) :]
    stacks = zip(made, out_axes, out_back, declared, strict=True)
    return [*state, *(_stacked(one[::-1] if back else one, axis, value) for one, axis, back, value in stacks)]


def _slices(node: Node, value: Value, axis: int) -> list[Value]:
    """Return the slices of a tensor along an axis, without that axis."""
    shape = list(ir.static_shape(value))
    count = shape.pop(axis)
    if isinstance(value, GenericConst) or count < 2:
        return [_bound(node, part_of(value, axis, at, at + 1, keep=False)) for at in range(count)]
    pieces = node.emit(relax.op.split(value, count, axis))
    return [node.emit(relax.op.reshape(relax.TupleGetItem(pieces, at), shape)) for at in range(count)]


def _bound(node: Node, value: Value) -> Value:
    return value if isinstance(value, GenericConst) else node.emit(value)


def _axis(axis: int, rank: int) -> int:
    if not -rank <= axis < rank:
        raise ValueError(f"axis {axis} is none of {rank}")
    return axis % rank


def _list(node: Node, name: str, count: int) -> list[int]:
    values = list(node.attributes.get(name, [0] * count))
    if len(values) != count:
        raise ValueError(f"{name} has {len(values)} entries, {count} are wanted")
    return values


CONVERTERS: dict[str, Converter] = {
    "If": _if,
    "Loop": _loop,
    "Scan": _scan,
}
