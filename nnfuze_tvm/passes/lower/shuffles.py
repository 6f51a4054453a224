"""A reshape, a transpose and a reshape in one kernel whose indices are simple."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import tvm
from tvm import relax, te, tirx
from tvm.ir import Var
from tvm.ir.transform import PassContext, module_pass

from nnfuze_tvm.graph.dataflow import (
    Emitter,
    Value,
    bindings,
    op_name,
    operands,
    output_fields,
    substitute,
    with_rewritten,
)
from nnfuze_tvm.graph.ir import static_shape


@module_pass(opt_level=0, name="Shuffles")
class Shuffles:
    """Compute a reshape that splits axes, a transpose, and a reshape that joins axes as one PrimFunc.

    So channels are spread over space, or shuffled. One by one, TVM's operators know nothing of the others' extents, and
    what is left when they are fused are long sums of quotients and remainders, which no vector is loaded by.
    """

    def transform_module(self, mod: tvm.IRModule, _: PassContext) -> tvm.IRModule:
        """Rewrite every Relax function of ``mod``."""
        return with_rewritten(mod, _rewrite)


def _rewrite(func: relax.Function, builder: relax.BlockBuilder) -> relax.Function:
    bound = {binding.var: binding.value for binding in bindings(func)}
    uses: dict[Value, list[str]] = {}
    for value in bound.values():
        for leaf in operands(value):
            uses.setdefault(leaf, []).append(op_name(value))
    for leaf in output_fields(func):
        uses.setdefault(leaf, []).append("")
    emitter = Emitter()
    values: dict[Value, Value] = {}
    for binding in bindings(func):
        value = binding.value
        found = _chain(value, bound, uses, moved=set(uses.get(binding.var, [])) <= {"permute_dims", "strided_slice"})
        if found is not None:
            source, split, axes = found
            value = _shuffle(builder, values.get(source, source), split, axes, static_shape(binding.var))
        else:
            value = substitute(value, values)
        values[binding.var] = emitter.emit(value, binding.var.name)
    return emitter.finish(func.params, [substitute(out, values) for out in output_fields(func)], func.attrs)


def _chain(
    value: Value, bound: dict[Value, Value], uses: dict[Value, list[str]], moved: bool
) -> tuple[Var, tuple[int, ...], tuple[int, ...]] | None:
    """Return of a last reshape what the first one reads, its result's shape, and the order of axes in between.

    Without a transpose it is a view, which costs nothing but where its result is ``moved`` again.
    """
    first = transpose = _only_source(value, "reshape", bound, uses)
    split, axes = value.args[0] if first is not None else None, None
    if op_name(transpose) == "permute_dims":
        first, split = _only_source(transpose, "permute_dims", bound, uses), transpose.args[0]
        axes = transpose.attrs.axes or range(len(static_shape(split)))[::-1]
    elif not moved:
        return None
    if first is None or op_name(first) != "reshape" or not isinstance(first.args[0], Var):
        return None
    shape, source = static_shape(split), first.args[0]
    axes = tuple(range(len(shape)) if axes is None else (int(axis) % len(shape) for axis in axes))
    # The first reshape splits, and the last one joins.
    if _parts(shape, static_shape(source)) is None:
        return None
    return (source, shape, axes) if _parts([shape[axis] for axis in axes], static_shape(value)) is not None else None


def _only_source(value: Value, name: str, bound: dict[Value, Value], uses: dict[Value, list[str]]) -> Value:
    """Return what an operator of this name reads, if nothing else does."""
    if op_name(value) != name or len(uses.get(value.args[0], [])) != 1:
        return None
    return bound.get(value.args[0])


def _parts(fine: Sequence[int], coarse: Sequence[int]) -> list[list[int]] | None:
    """Return which axes of a shape make up each axis of one with fewer, or None if they don't."""
    found: list[list[int]] = []
    place = 0
    for extent in coarse:
        own: list[int] = []
        while place < len(fine) and (prod(fine[i] for i in own) < extent or (fine[place] == 1 and extent != 1)):
            own.append(place)
            place += 1
        if extent == 1 and place < len(fine) and fine[place] == 1:
            own, place = [place], place + 1
        if prod(fine[i] for i in own) != extent:
            return None
        found.append(own)
    return found if place == len(fine) else None


def _shuffle(
    builder: relax.BlockBuilder, source: Value, split: Sequence[int], axes: Sequence[int], shape: Sequence[int]
) -> Value:
    into, from_ = _parts([split[axis] for axis in axes], shape), _parts(split, static_shape(source))
    assert into is not None and from_ is not None

    def shuffle(data: te.Tensor) -> te.Tensor:
        def element(*index: tirx.Expr) -> tirx.Expr:
            digits: dict[int, tirx.Expr] = {}
            for at, places in zip(index, into, strict=True):
                extents = [split[axes[place]] for place in places]
                for n, place in enumerate(places):
                    inner = prod(extents[n + 1 :])
                    digit = tirx.indexdiv(at, inner) if inner > 1 else at
                    digits[axes[place]] = tirx.indexmod(digit, extents[n]) if n else digit
            return data(*(_joined([digits[i] for i in own], [split[i] for i in own]) for own in from_))

        return te.compute(tuple(shape), element, name="shuffle")

    return builder.call_te(shuffle, source, primfunc_name_hint="shuffle")


def _joined(digits: list[tirx.Expr], extents: list[int]) -> tirx.Expr:
    total: tirx.Expr = tirx.const(0, "int64")
    for digit, extent in zip(digits, extents, strict=True):
        total = total * extent + digit
    return total
