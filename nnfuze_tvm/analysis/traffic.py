"""How many bytes each level of a machine's memory has to deliver for one call of a scheduled kernel: an estimate.

The kernel is lowered to a tree of loops with the loads and stores of its buffers, and two questions are asked of it.

How many loads reach L1? A load is repeated by every loop around it, except by a loop that does not change its address
while the value stays in a register: the same weights for several unrolled pixels, the same pixel for several vectors of
channels. A cache starts a fixed number of loads per cycle, however narrow they are, so each counts as a whole vector.
Buffers that are small enough to live in registers do not count.

How many bytes does a cache of a given size miss? A loop whose data fits into the cache fetches each byte once. So does
one whose single iterations fit: what an iteration shares with the next one is still there. Of any other loop each
iteration fetches its data anew. Conflicts, cache lines that are only partly used, and prefetching do not occur in this
model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any

import tvm
import tvm_ffi
from tvm import sym, tirx
from tvm.ir import TensorLoad
from tvm.target import Target

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.ir import nbytes
from nnfuze_tvm.schedules.loops import MIDDLE, STACK_BYTES, USUAL, plain

# The smallest and the largest value of an index; None where that isn't known.
_Range = tuple[int, int] | None
# A range per dimension of a buffer.
_Box = list[_Range]


@dataclass(frozen=True)
class Access:
    """A load or a store: the buffer, its shape, bytes per element, and an index per dimension."""

    buffer: Any
    shape: tuple[int, ...]
    itemsize: int
    indices: tuple[Any, ...]


@dataclass
class Loop:
    """A loop, or one factor of a loop that was fused from several.

    Attributes
    ----------
    var : tirx.Var or None
        What it counts; None for the kernel as a whole.
    extent : int
        Iterations.
    span : int
        Values of ``var`` that one iteration stands for: above 1 in all but the innermost factor of a fused loop.
    kind : str
        ``serial``, ``unrolled`` or ``vectorized``.
    body : list of Loop or Access
        In order of execution.
    """

    var: Any
    extent: int
    span: int
    kind: str
    body: list[Loop | Access] = field(default_factory=list)


def loop_tree(func: tirx.PrimFunc, target: Target) -> Loop:
    """Return the loops of a scheduled kernel around its loads and stores of memory."""
    body = plain(func, target).body
    root = Loop(None, 1, 1, "serial")
    buffers = [node.buffer for node in _find(body, tirx.AllocBuffer)]
    in_registers = {buffer for buffer in buffers if nbytes(_shape(buffer), str(buffer.dtype)) <= STACK_BYTES}
    bound = {node.var: node.value for node in _find(body, tirx.Bind)}
    _collect(body, root.body, in_registers, bound, {})
    return root


def l1_bytes(root: Loop, hw: Hardware) -> int:
    """Return the bytes that L1 has to deliver or to take: every load and store that is left, as whole vectors."""
    return sum(_times(access, around, hw) for access, around in _accesses(root, ())) * hw.vector_bytes


def missed_bytes(root: Loop, cache: int) -> int:
    """Return the bytes that a cache has to fetch from what is behind it, at least, if the kernel ran before.

    What is fetched in a run, less what may still be there from the run before.
    """
    return max(0, _fetched(root, cache) - cache)


def _find(node: Any, kind: Any) -> list[Any]:
    found: list[Any] = []
    tvm_ffi.structural_walk(node, (kind, found.append))
    return found


def _shape(buffer: Any) -> tuple[int, ...]:
    return tuple(int(dim) for dim in buffer.shape)


def _collect(
    stmt: Any, into: list[Loop | Access], in_registers: set[Any], bound: Mapping[Any, Any], middle: Mapping[Any, Any]
) -> None:
    """Add what a statement does to ``into``; ``middle`` are the loops around it, each in its middle iteration."""
    if isinstance(stmt, tirx.SeqStmt):
        for part in stmt.seq:
            _collect(part, into, in_registers, bound, middle)
    elif isinstance(stmt, tirx.For):
        usual = stmt.annotations.get(USUAL, 1)
        extent = int(stmt.extent if isinstance(stmt.extent, tirx.IntImm) else usual)
        kinds = {tirx.ForKind.UNROLLED: "unrolled", tirx.ForKind.VECTORIZED: "vectorized"}
        spans = [*_factors(stmt, extent), 1]
        for whole, span in zip([extent, *spans], spans, strict=False):
            into.append(loop := Loop(stmt.loop_var, whole // span, span, kinds.get(stmt.kind, "serial")))
            into = loop.body
        middle = {**middle, stmt.loop_var: tirx.IntImm(stmt.loop_var.ty.dtype, extent // 2)}
        if MIDDLE in stmt.annotations:
            # Where it begins is a number in memory, which code in the loop goes by.
            start = tirx.IntImm(stmt.loop_var.ty.dtype, int(stmt.annotations[MIDDLE]))
            body = tvm_ffi.structural_map(
                stmt.body, (TensorLoad, lambda load: start if load.source in in_registers and _counts(load) else load)
            )
            stmt = tirx.For(stmt.loop_var, stmt.min, stmt.extent, stmt.kind, body)
        _collect(stmt.body, into, in_registers, bound, middle)
    elif hasattr(stmt, "body"):
        _collect(stmt.body, into, in_registers, bound, middle)
    elif isinstance(stmt, tirx.IfThenElse):
        _loads(stmt.condition, into, in_registers, bound)
        holds = None
        if stmt.else_case is not None:
            # Where the first and the last iteration have code of their own, the others stand for all.
            condition = tvm_ffi.structural_map(stmt.condition, (tirx.Var, lambda var: middle.get(var, var)))
            simple = sym.Analyzer().simplify(condition)
            holds = bool(simple) if isinstance(simple, tirx.IntImm) else None
        if holds is not False:
            _collect(stmt.then_case, into, in_registers, bound, middle)
        if stmt.else_case is not None and holds is not True:
            _collect(stmt.else_case, into, in_registers, bound, middle)
    elif not _is_prefetch(stmt):
        _loads(stmt, into, in_registers, bound)
        if isinstance(stmt, tirx.BufferStore):
            _access(stmt.buffer, stmt.indices, into, in_registers, bound)


def _counts(load: Any) -> bool:
    return str(load.source.dtype) == "int64"


def _is_prefetch(stmt: Any) -> bool:
    """Tell whether a statement only fetches earlier what is loaded anyway."""
    call = stmt.value if isinstance(stmt, tirx.Evaluate) else None
    return isinstance(call, tvm.ir.Call) and getattr(call.op, "name", "") == "tirx.prefetch"


def _loads(node: Any, into: list[Loop | Access], in_registers: set[Any], bound: Mapping[Any, Any]) -> None:
    for load in _find(node, TensorLoad):
        _access(load.source, load.indices, into, in_registers, bound)


def _access(
    buffer: Any, indices: Sequence[Any], into: list[Loop | Access], in_registers: set[Any], bound: Mapping[Any, Any]
) -> None:
    if buffer not in in_registers:
        itemsize = nbytes((), str(buffer.dtype))
        into.append(Access(buffer, _shape(buffer), itemsize, tuple(bound.get(index, index) for index in indices)))


def _factors(loop: tirx.For, extent: int) -> list[int]:
    """Return the spans that a fused loop is taken apart at, largest first: what its variable is divided by."""
    points = set()
    for node in [*_find(loop.body, tirx.FloorDiv), *_find(loop.body, tirx.FloorMod)]:
        divisor, scale, base = node.b, 1, node.a
        if isinstance(base, tirx.FloorDiv) and isinstance(base.b, tirx.IntImm):
            scale, base = int(base.b), base.a
        if isinstance(base, tirx.FloorMod):
            base = base.a
        if isinstance(divisor, tirx.IntImm) and base.same_as(loop.loop_var):
            points.add(int(divisor) * scale)
    spans: list[int] = []
    for point in sorted(points, reverse=True):
        if 1 < point < extent and (spans[-1] if spans else extent) % point == 0:
            spans.append(point)
    return spans


def _accesses(loop: Loop, around: tuple[Loop, ...]) -> Iterator[tuple[Access, tuple[Loop, ...]]]:
    for item in loop.body:
        if isinstance(item, Access):
            yield item, (*around, loop)
        else:
            yield from _accesses(item, (*around, loop))


def _times(access: Access, around: Sequence[Loop], hw: Hardware) -> int:
    """Return how many vector loads (or stores) one call of the kernel makes of an access."""
    used = {var for index in access.indices for var in _find(index, tvm.ir.Var)}
    straight: list[Loop] = []  # the innermost loops that become straight-line code, innermost first
    for loop in reversed(around):
        if loop.kind == "serial":
            break
        straight.append(loop)
    # In straight-line code the same address is loaded once.
    lanes = max((int(ramp.lanes) for index in access.indices for ramp in _find(index, tirx.Ramp)), default=1)
    addresses = lanes * prod(loop.extent for loop in straight if loop.var in used)
    box = [_range(index, {loop.var: (0, loop.extent - 1) for loop in straight}) for index in access.indices]
    addresses = min(addresses, _volume({None: (access, box)}) // access.itemsize)
    for loop in straight:
        if loop.kind == "vectorized" and _unit_stride(access, loop):
            lanes *= loop.extent
    count = -(-addresses // max(1, min(lanes, hw.vector_bytes // access.itemsize)))
    kept = True  # in registers, so far as the loops that were looked at
    for loop in reversed(around[: len(around) - len(straight)]):
        if loop.var in used:
            count, kept = count * loop.extent, False
        elif not kept or count > hw.registers // 2:
            count *= loop.extent
    return count


def _unit_stride(access: Access, loop: Loop) -> bool:
    ranges = [_range(index, {loop.var: (0, loop.extent - 1)}) for index in access.indices]
    *outer, last = [r[1] - r[0] if r else -1 for r in ranges] or [0]
    return last == loop.extent - 1 and not any(outer)


def _footprint(item: Loop | Access) -> int:
    """Return the bytes that a loop touches in all its iterations, the loops around it standing still."""
    return _volume(_boxes(item, {}))


def _fetched(item: Loop | Access, cache: int) -> int:
    whole = _footprint(item)
    if isinstance(item, Access) or whole <= cache:
        return whole
    once: dict[Any, tuple[Access, _Box]] = {}
    for part in item.body:
        _merge(once, _boxes(part, {}))
    if item.var is not None and _volume(once) <= cache:
        return whole
    return item.extent * sum(_fetched(part, cache) for part in item.body)


def _boxes(item: Loop | Access, free: Mapping[Any, tuple[int, int]]) -> dict[Any, tuple[Access, _Box]]:
    """Return what is touched of each buffer while the loops in ``free``, and those inside ``item``, run."""
    if isinstance(item, Access):
        return {item.buffer: (item, [_range(index, free) for index in item.indices])}
    found: dict[Any, tuple[Access, _Box]] = {}
    inside = {item.var: (0, item.extent * item.span - 1), **free}
    for part in item.body:
        _merge(found, _boxes(part, inside))
    return found


def _merge(into: dict[Any, tuple[Access, _Box]], other: Mapping[Any, tuple[Access, _Box]]) -> None:
    for buffer, (access, box) in other.items():
        if buffer in into:
            pairs = zip(into[buffer][1], box, strict=True)
            box = [(min(a[0], b[0]), max(a[1], b[1])) if a and b else None for a, b in pairs]
        into[buffer] = access, box


def _volume(boxes: Mapping[Any, tuple[Access, _Box]]) -> int:
    total = 0
    for access, box in boxes.values():
        dims = [
            dim if found is None else max(0, min(found[1], dim - 1) - max(found[0], 0) + 1)
            for found, dim in zip(box, access.shape, strict=True)
        ]
        total += prod(dims) * access.itemsize
    return total


def _range(index: Any, free: Mapping[Any, tuple[int, int]]) -> _Range:
    """Return the smallest and largest value of an index; Vars that aren't free are 0."""
    if isinstance(index, tirx.IntImm):
        return int(index), int(index)
    if isinstance(index, tvm.ir.Var):
        return free.get(index, (0, 0))
    if isinstance(index, tirx.Cast):
        return _range(index.value, free)
    if isinstance(index, tirx.Ramp):
        base, stride = _range(index.base, free), _range(index.stride, free)
        return (base[0], base[1] + (int(index.lanes) - 1) * stride[1]) if base and stride else None
    if not hasattr(index, "a") or not hasattr(index, "b"):
        return None
    left, right = _range(index.a, free), _range(index.b, free)
    if left is None or right is None:
        return None
    if isinstance(index, tirx.Add):
        return left[0] + right[0], left[1] + right[1]
    if isinstance(index, tirx.Sub):
        return left[0] - right[1], left[1] - right[0]
    if isinstance(index, tirx.Mul):
        ends = [a * b for a in left for b in right]
        return min(ends), max(ends)
    if isinstance(index, tirx.Min | tirx.Max):
        pick = min if isinstance(index, tirx.Min) else max
        return pick(left[0], right[0]), pick(left[1], right[1])
    if isinstance(index, tirx.FloorDiv | tirx.FloorMod) and right[0] == right[1] > 0:
        low, high = left[0] // right[0], left[1] // right[0]
        if isinstance(index, tirx.FloorDiv):
            return low, high
        return (left[0] % right[0], left[1] % right[0]) if low == high else (0, right[0] - 1)
    return None
