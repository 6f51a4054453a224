"""What every schedule rule shares: finding the anchor, inlining around it, choosing knobs."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import TypeVar

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware

Choice = TypeVar("Choice")

# A parallel region costs some microseconds to enter and leave; kernels below this many scalar
# operations (about 20 µs on one core) stay on one thread.
PARALLEL_MIN_OPS = 400_000

_NOTE = "nnfuze."


def choose(sch: s_tir.Schedule, candidates: Sequence[Choice], tunable: bool, name: str = "knob") -> Choice:
    """Return the first candidate, or a sampled one that is recorded in the schedule's trace.

    Candidates are ordered by the hardware model, best first. Rules compute with the chosen value in
    Python, so another decision means running the rule again, not replaying a mutated trace. What was chosen
    is noted under ``name``, or under the names of its fields if it is a dataclass.
    """
    chosen = candidates[0]
    if tunable and len(candidates) > 1:
        probability = 1.0 / len(candidates)
        index = sch.sample_categorical(list(range(len(candidates))), [probability] * len(candidates))
        chosen = candidates[int(sch.get(index))]
    if dataclasses.is_dataclass(chosen) and not isinstance(chosen, type):
        note(sch, **dataclasses.asdict(chosen))
    else:
        note(sch, **{name: chosen})
    return chosen


def note(sch: s_tir.Schedule, **facts: object) -> None:
    """Note how ``main`` is scheduled, in its outermost block: so tuning records keep it, too."""
    outermost = root(sch)
    if outermost is not None:
        for name, value in facts.items():
            sch.annotate(outermost, f"{_NOTE}{name}", value if isinstance(value, int) else str(value))


def statements(mod: tvm.IRModule) -> list[tirx.Stmt]:
    """Return every loop and block of a module: while the caller keeps them, no schedule changes ``mod``.

    A TVM schedule mutates in place what nothing else refers to, but does not ask who refers to the sequence around
    it: with a note in the outermost block, the nests of a kernel that has several are still those of the original.
    """
    found: list[tirx.Stmt] = []
    for func in mod.functions.values():
        if isinstance(func, tirx.PrimFunc):
            tvm_ffi.structural_walk(func.body, [(tirx.For, found.append), (s_tir.SBlock, found.append)])
    return found


def take_notes(func: tirx.PrimFunc) -> tuple[tirx.PrimFunc, dict[str, int | str]]:
    """Return a scheduled kernel without what was noted in it, and the notes in the order they were made."""
    body = func.body
    if not isinstance(body, s_tir.SBlockRealize):
        return func, {}
    block = body.block
    found = {str(key): value for key, value in block.annotations.items()}
    notes = {
        key.removeprefix(_NOTE): str(value) if isinstance(value, str) else int(value)
        for key, value in found.items()
        if key.startswith(_NOTE)
    }
    rest = {key: value for key, value in found.items() if not key.startswith(_NOTE)}
    parts = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init)
    bare = s_tir.SBlock(*parts, block.alloc_buffers, block.match_buffers, rest)
    return func.with_body(s_tir.SBlockRealize(body.iter_values, body.predicate, bare)), notes


def with_buffers(func: tirx.PrimFunc, body: s_tir.SBlockRealize, added: Sequence[tirx.Var]) -> tirx.PrimFunc:
    """Return a scheduled kernel with another body, whose outermost block allocates more buffers."""
    block = body.block
    parts = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init)
    outermost = s_tir.SBlock(*parts, [*block.alloc_buffers, *added], block.match_buffers, block.annotations)
    return func.with_body(s_tir.SBlockRealize(body.iter_values, body.predicate, outermost))


def root(sch: s_tir.Schedule) -> SBlockRV | None:
    """Return the outermost block of ``main``; a function that was written as plain loops has none."""
    body = sch.mod["main"].body
    if not isinstance(body, s_tir.SBlockRealize):
        return None
    return sch.get_sblock(body.block.name_hint, func_name="main")


def blocks(sch: s_tir.Schedule) -> list[SBlockRV]:
    """Return all leaf blocks of ``main`` in program order (the root block left out)."""
    outermost = root(sch)
    return [] if outermost is None else list(sch.get_child_blocks(outermost))


def has_one_output(sch: s_tir.Schedule) -> bool:
    """Tell whether one block alone writes what ``main`` returns."""
    outermost = root(sch)
    return outermost is not None and len(sch.get_output_blocks(outermost)) == 1


def iter_kinds(sch: s_tir.Schedule, block: SBlockRV) -> str:
    """Return one letter per block iterator: ``S`` spatial, ``R`` reduction, ``O`` other."""
    letters = {tirx.IterVar.DataPar: "S", tirx.IterVar.CommReduce: "R"}
    return "".join(letters.get(it.iter_type, "O") for it in sch.get(block).iter_vars)


def extents(sch: s_tir.Schedule, block: SBlockRV) -> list[int]:
    """Return the static extents of a block's iterators."""
    return [int(it.dom.extent) for it in sch.get(block).iter_vars]


def is_reduction(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether a block reduces over any iterator."""
    return "R" in iter_kinds(sch, block)


def inline_spatial(sch: s_tir.Schedule, keep: Sequence[SBlockRV]) -> None:
    """Inline every spatial block into its consumer, or into its producer where it has none.

    Blocks in ``keep`` stay, and what can't be inlined stays, too.
    """
    kept = {sch.get(block).name_hint for block in keep}
    for block in blocks(sch):
        if sch.get(block).name_hint in kept or is_reduction(sch, block):
            continue
        try:
            sch.compute_inline(block)
        except tvm.s_tir.ScheduleError:
            continue


def single_anchor(sch: s_tir.Schedule) -> SBlockRV | None:
    """Return the only reduction block, if the kernel is a chain around it that writes one buffer.

    All other blocks are then spatial, and the last one, if it isn't the reduction itself, runs over the
    reduction's spatial iterators, so that ``inline_around`` and computing the reduction inside it are legal.
    """
    everything = blocks(sch)
    kinds = [iter_kinds(sch, block) for block in everything]
    reductions = [i for i, kind in enumerate(kinds) if "R" in kind]
    if len(reductions) != 1 or any("O" in kind or not kind for kind in kinds):
        return None
    if not has_one_output(sch):
        return None
    anchor, last = everything[reductions[0]], everything[-1]
    if len(sch.get(anchor).writes) != 1:
        return None
    spatial = [e for e, kind in zip(extents(sch, anchor), kinds[reductions[0]], strict=True) if kind == "S"]
    if reductions[0] != len(everything) - 1 and extents(sch, last) != spatial:
        return None
    return anchor


def inline_around(sch: s_tir.Schedule, anchor: SBlockRV, keep: Sequence[SBlockRV] = ()) -> SBlockRV:
    """Inline all blocks before the anchor into it and all after it into the last one; return the last one.

    An anchor that is itself the last block gets a copy of its result as the last one. Blocks in ``keep`` stay.
    """
    kept = {sch.get(block).name_hint for block in keep}
    names = [sch.get(block).name_hint for block in blocks(sch)]
    position = names.index(sch.get(anchor).name_hint)
    last = position + 1 == len(names)
    out = sch.cache_write(anchor, 0, "global") if last else sch.get_sblock(names[-1])
    for name in names[:position] + names[position + 1 : -1]:
        if name not in kept:
            sch.compute_inline(sch.get_sblock(name))
    return out


def uses(expr: tirx.PrimExpr, var: tirx.Var) -> bool:
    """Tell whether an index expression (sums, products, quotients) depends on a variable."""
    if isinstance(expr, tirx.Var):
        return bool(expr.same_as(var))
    return any(uses(getattr(expr, side), var) for side in ("a", "b") if hasattr(expr, side))


def divisors(n: int, at_most: int) -> list[int]:
    """Return the divisors of ``n`` up to ``at_most``, largest first."""
    return [d for d in range(min(n, at_most), 0, -1) if n % d == 0]


def vectorize_inner(sch: s_tir.Schedule, loop: LoopRV, dtype: str, hw: Hardware, vectors: int = 1) -> LoopRV:
    """Split ``loop`` into chunks of up to ``vectors`` registers, vectorize the lanes, return the outer loop."""
    extent = int(sch.get(loop).extent)
    lanes = hw.lanes(dtype)
    width = next((d for d in divisors(extent, lanes * vectors) if d % lanes == 0), None)
    if width is None:
        width = next(iter(divisors(extent, lanes)))
    if width == 1:
        return loop
    outer, inner = sch.split(loop, [None, width])
    sch.vectorize(inner)
    return outer
