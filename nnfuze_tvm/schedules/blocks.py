"""The blocks of a kernel: their iterators, the one that a rule is about, and what is inlined around it."""

from __future__ import annotations

from collections.abc import Sequence

import tvm
import tvm_ffi
from tvm import s_tir, tirx
from tvm.s_tir.schedule import SBlockRV

from nnfuze_tvm.graph.contraction import BY_ROWS, NARROW_PRODUCTS, NO_PRODUCTS, Narrow


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


def uses(expr: tirx.PrimExpr, var: tirx.Var) -> bool:
    """Tell whether an index expression or a comparison of some (sums, products, quotients) depends on a variable."""
    if isinstance(expr, tirx.Var):
        return bool(expr.same_as(var))
    return any(uses(getattr(expr, side), var) for side in ("a", "b") if hasattr(expr, side))


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


def single_anchor(sch: s_tir.Schedule, cropped: bool = False) -> SBlockRV | None:
    """Return the only reduction block, if the kernel is a chain around it that writes one buffer.

    All other blocks are then spatial, and the last one, if it isn't the reduction itself, runs over the
    reduction's spatial iterators, so that ``inline_around`` and computing the reduction inside it are legal; where
    the kernel may be ``cropped``, also over the first channels only.
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
    kept = extents(sch, last)
    if cropped and kept and spatial and kept[-1] < spatial[-1]:
        spatial[-1] = kept[-1]
    return anchor if reductions[0] == len(everything) - 1 or kept == spatial else None


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


def with_buffers(func: tirx.PrimFunc, body: s_tir.SBlockRealize, added: Sequence[tirx.Var]) -> tirx.PrimFunc:
    """Return a scheduled kernel with another body, whose outermost block allocates more buffers."""
    block = body.block
    parts = (block.iter_vars, block.reads, block.writes, block.name_hint, block.body, block.init)
    outermost = s_tir.SBlock(*parts, [*block.alloc_buffers, *added], block.match_buffers, block.annotations)
    return func.with_body(s_tir.SBlockRealize(body.iter_values, body.predicate, outermost))


def is_padding(sch: s_tir.Schedule, block: SBlockRV) -> bool:
    """Tell whether a block puts zeros around its data, or changes their dtype; else it is worth no copy."""
    node = sch.get(block)
    if "pad" in node.name_hint and str(node.reads[0].source.dtype) != str(node.writes[0].source.dtype):
        return True
    shapes = [[int(extent) for extent in region.source.ty.shape] for region in (*node.reads, *node.writes)]
    return "pad" in node.name_hint and any(shape != shapes[-1] for shape in shapes)


def weights_follow(sch: s_tir.Schedule, anchor: SBlockRV, order: tuple[int, ...]) -> bool:
    """Tell whether a block reads two buffers, the second at the block's iterators in this order."""
    node = sch.get(anchor)
    if len(node.reads) != 2 or len(node.reads[1].region) != len(order):
        return False
    return all(index.min.same_as(node.iter_vars[i].var) for index, i in zip(node.reads[1].region, order, strict=True))


def layout_free(sch: s_tir.Schedule) -> list[tirx.Var]:
    """Return the parameters of ``main`` that are constants of the graph."""
    func = sch.mod["main"]
    return [func.params[int(i)] for i in func.attrs.get("layout_free_buffers", [])]


def narrow_products(sch: s_tir.Schedule) -> Narrow:
    """Return how many products with the constants of ``main`` may be added in int16 (`graph.contraction`)."""
    return Narrow(*map(int, sch.mod["main"].attrs.get(NARROW_PRODUCTS, NO_PRODUCTS)))


def goes_by_rows(sch: s_tir.Schedule) -> bool:
    """Tell whether tiles of ``main`` shall end where a row of the image does."""
    return BY_ROWS in sch.mod["main"].attrs
