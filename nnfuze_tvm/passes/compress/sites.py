"""Which layers of a network can be fitted to what they gave before, to what, and in which order."""

from __future__ import annotations

import heapq
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from tvm import relax
from tvm.ir import Call, GenericConst, Var

from nnfuze_tvm.graph import ops
from nnfuze_tvm.graph.constants import array
from nnfuze_tvm.graph.dataflow import Value, bindings, op_name, operands, output_fields, readers
from nnfuze_tvm.graph.ir import static_shape


@dataclass(frozen=True)
class Site:
    """A layer that is fitted.

    Attributes
    ----------
    layer : Var
        Its result.
    call : Call
        Its call.
    end : Var
        Its result with its bias.
    bias : tuple, optional
        The place of the bias among the operands of that sum, and the bias.
    total, other : Var and Value, optional
        The sum of that and another tensor, and the other tensor.
    """

    layer: Var
    call: Call
    end: Var
    bias: tuple[int, GenericConst] | None = None
    total: Var | None = None
    other: Value | None = None


def sites_of(func: relax.Function, same: Mapping[str, Var]) -> dict[Var, Site]:
    """Return the layers that can be fitted: of real numbers, with weights that nothing else reads.

    Parameters
    ----------
    func : relax.Function
        A straight-line function.
    same : mapping of str to Var
        By the names of Vars of ``func``: the Var that held the same before, as far as there is one.
    """
    made = {b.var: b.value for b in bindings(func)}
    read_by = readers(func)
    returned = {leaf for out in output_fields(func) for leaf in operands(out)}
    layers = {
        var: value
        for var, value in made.items()
        if var.name in same
        and (operator := ops.of(value)) is not None
        and operator.rows is not None
        and ops.layer(value) is not None
        and str(value.ty.dtype) == str(value.args[1].ty.dtype) == str(value.args[0].ty.dtype) == "float32"
    }
    uses = Counter(_content(call.args[1]) for call in layers.values())

    def sum_behind(var: Var) -> tuple[Var, int] | None:
        """Return the sum that alone reads a Var, and the place of the other operand."""
        after = read_by.get(var, [])
        if len(after) != 1 or var in returned or op_name(made[after[0]]) != "add" or after[0].name not in same:
            return None
        args = made[after[0]].args
        return None if args[0].same_as(args[1]) else (after[0], 0 if args[1].same_as(var) else 1)

    def site(var: Var, call: Call) -> Site:
        found = Site(var, call, var)
        behind = sum_behind(var)
        if behind is not None and _is_bias(made[behind[0]].args[behind[1]], var, call):
            found = Site(var, call, behind[0], (behind[1], made[behind[0]].args[behind[1]]))
            behind = sum_behind(behind[0])
        if behind is None or static_shape(made[behind[0]].args[behind[1]]) != static_shape(var):
            return found
        return Site(var, call, found.end, found.bias, behind[0], made[behind[0]].args[behind[1]])

    found = {var: site(var, call) for var, call in layers.items() if uses[_content(call.args[1])] == 1}
    ends = {each.end: each for each in found.values()}
    return {var: _alone(each, ends) for var, each in found.items()}


def _alone(site: Site, ends: Mapping[Var, Site]) -> Site:
    """Return a site that makes up for nothing where the other operand is a layer with more weights, which does."""
    other = ends.get(site.other)
    if other is None or _size(other) < _size(site) or (_size(other) == _size(site) and site.end.name < other.end.name):
        return site
    return Site(site.layer, site.call, site.end, site.bias)


def _size(site: Site) -> int:
    return math.prod(static_shape(site.call.args[1]))


def _content(weight: GenericConst) -> tuple[tuple[int, ...], int]:
    return static_shape(weight), hash(array(weight).tobytes())


def _is_bias(value: Value, var: Var, call: Call) -> bool:
    """Tell whether an operand is one constant per channel of a layer's result."""
    layer = ops.layer(call)
    assert layer is not None
    shape = static_shape(var)
    wanted = [size if axis == layer.result else 1 for axis, size in enumerate(shape)]
    return (
        isinstance(value, GenericConst) and [1] * (len(shape) - array(value).ndim) + list(array(value).shape) == wanted
    )


def ordered(func: relax.Function, sites: Mapping[Var, Site]) -> Iterator[relax.VarBinding]:
    """Return what a function binds, a layer if possible after the tensor that is added to it."""
    order = bindings(func)
    place = {b.var: n for n, b in enumerate(order)}
    reads = [{leaf for leaf in operands(b.value) if leaf in place} for b in order]
    read_by: dict[Value, list[int]] = {}
    for n, leaves in enumerate(reads):
        for leaf in leaves:
            read_by.setdefault(leaf, []).append(n)
    others = {site.other: place[site.layer] for site in sites.values() if site.other in place}
    waits = set(others.values())
    missing = [len(leaves) for leaves in reads]
    ready = [(n in waits, n) for n, count in enumerate(missing) if not count]
    heapq.heapify(ready)
    done = set[int]()
    while ready:
        _, n = heapq.heappop(ready)
        if n in done:
            continue
        done.add(n)
        yield order[n]
        for reader in read_by.get(order[n].var, []):
            missing[reader] -= 1
            if not missing[reader]:
                heapq.heappush(ready, (reader in waits, reader))
        freed = others.get(order[n].var)
        if freed is not None:
            waits.discard(freed)
            if not missing[freed]:
                heapq.heappush(ready, (False, freed))


def has_one_matrix(value: Value) -> bool:
    """Tell whether a layer has constant weights in float32, one matrix for all of its channels."""
    operator, layer = ops.of(value), ops.layer(value)
    return (
        operator is not None
        and operator.rows is not None
        and layer is not None
        and layer.filters.groups == 1
        and str(value.args[1].ty.dtype) == str(value.ty.dtype) == "float32"
    )
