"""Kernels without reductions: arithmetic, broadcasts, quantization, and changes of layout.

Everything is inlined into the block that writes the result. Its loops are fused and the innermost one is
vectorized along the contiguous writes. A transpose reads with a stride, so its loops are tiled: a tile of the axis
that is contiguous in the data × the axis that is contiguous in the result stays in L1.
"""

from __future__ import annotations

from math import gcd, prod

import tvm
import tvm_ffi
from tvm import s_tir, sym, tirx
from tvm.ir import TensorLoad
from tvm.s_tir.schedule import LoopRV, SBlockRV

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import blocks, extents, has_one_output, iter_kinds, uses
from nnfuze_tvm.schedules.knobs import choose
from nnfuze_tvm.schedules.loops import PARALLEL_MIN_OPS, divisors
from nnfuze_tvm.schedules.rewrites import overlap, transposes
from nnfuze_tvm.schedules.rule import Rule

# A square of as many rows and columns is transposed in registers.
_SQUARE = 8
# More copies of the innermost loop than this are no longer worth their code.
_UNROLLED_SEGMENTS = 16


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a kernel of spatial blocks with one result, or of parts of one; see `Rule` for the contract."""
    everything = blocks(sch)
    if not everything or any(set(iter_kinds(sch, block)) != {"S"} for block in everything):
        return False
    parts = len(everything) > 1 and _are_parts(sch, everything)
    if not parts and not has_one_output(sch):
        return False
    if any(len(sch.get_loops(block)) != len(iter_kinds(sch, block)) for block in everything):
        return False
    if parts:
        for block in everything:
            _schedule(sch, block, hw, tunable=False)
        return True
    for block in everything[:-1]:
        try:
            sch.compute_inline(block)
        except tvm.s_tir.ScheduleError:
            continue
    for block in blocks(sch):
        _schedule(sch, block, hw, tunable)
    return True


def _are_parts(sch: s_tir.Schedule, everything: list[SBlockRV]) -> bool:
    """Tell whether every block writes a part of the only result, and reads no other's."""
    result = sch.mod["main"].params[-1]
    nodes = [sch.get(block) for block in everything]
    return all(
        len(node.writes) == 1
        and node.writes[0].source.same_as(result)
        and not any(region.source.same_as(result) for region in node.reads)
        for node in nodes
    )


def _schedule(sch: s_tir.Schedule, block: SBlockRV, hw: Hardware, tunable: bool) -> None:
    loops = sch.get_loops(block)
    shape = extents(sch, block)
    body = sch.get(block)
    work = prod(shape)
    lanes = hw.lanes(str(body.writes[0].source.dtype))
    strided = _strided_axis(body, shape)
    source = _square_source(body, shape, strided, hw) if strided is not None else None
    if strided is not None and source is not None:
        rows = choose(sch, [d for d in (2 * _SQUARE, _SQUARE) if shape[strided] >= d], tunable, "rows")
        outermost = _transpose_squares(sch, loops, strided, rows, source)
        if hw.cores > 1 and work >= PARALLEL_MIN_OPS:
            sch.parallel(outermost)
        return
    if strided is not None:
        rows = choose(sch, [d for d in (16, 8, 32, 4) if shape[strided] >= d] or [1], tunable, "rows")
        loops = _tile_transpose(sch, loops, strided, rows, shape)
    elif _is_flat(body, shape):
        count = _side_by_side(shape, lanes)
        loops = [*loops[:-count], sch.fuse(*loops[-count:])] if count > 1 else loops
    extent = int(sch.get(loops[-1]).extent)
    outer = list(loops)
    boundaries = _boundaries(body)
    segment = gcd(extent, *boundaries)
    if boundaries:
        # Lanes on both sides of a boundary would make a vector a scalar loop. Unrolling the segments between
        # boundaries decides the conditions at compile time; LLVM vectorizes what is left.
        if segment > 1 and 1 < extent // segment <= _UNROLLED_SEGMENTS:
            outer[-1], _ = sch.split(loops[-1], [None, segment])
            sch.unroll(outer[-1])
        outer = outer[:-1]
    else:
        widths = [w for w in divisors(extent, lanes) if w > 1]
        if widths:
            width = choose(sch, widths[:2], tunable, "lanes")
            outer[-1], lane = sch.split(loops[-1], [None, width])
            sch.vectorize(lane)
    if strided is not None:
        outer = loops[:-2]
    if outer and hw.cores > 1 and work >= PARALLEL_MIN_OPS:
        sch.parallel(sch.fuse(*outer) if len(outer) > 1 else outer[0])


def _is_flat(body: s_tir.SBlock, shape: list[int]) -> bool:
    """Tell whether every access runs over the whole iteration space in the same order (no broadcast)."""
    variables = [it.var for it, extent in zip(body.iter_vars, shape, strict=True) if extent > 1]
    for region in (*body.reads, *body.writes):
        used = [r.min for r in region.region if not isinstance(r.min, tirx.IntImm)]
        if region.region and all(isinstance(r.min, tirx.IntImm) for r in region.region) and not variables:
            continue
        if len(used) < len(variables):
            return False
        used = [e for e in used if any(uses(e, v) for v in variables)]
        if len(used) != len(variables) or not all(e.same_as(v) for e, v in zip(used, variables, strict=True)):
            return False
        if prod(int(d) for d in region.source.shape) != prod(shape):
            return False
    return True


def _side_by_side(shape: list[int], lanes: int) -> int:
    """Return how many of a flat kernel's loops, counted from the last, to fuse: all, if TVM sees a vector in them.

    It may not where whole vectors make a row of few channels: of ``f % 768 % 3`` it makes ``f % 3``, which it does not
    put together with ``f % 768 // 3`` again, and the vector is loaded number by number.
    """
    width = divisors(prod(shape), lanes)[0]
    for count in range(len(shape), 0, -1):
        extents = shape[len(shape) - count :]
        if prod(extents) % width == 0 and _is_contiguous(extents, width):
            return count
    return len(shape)


def _is_contiguous(shape: list[int], width: int) -> bool:
    """Tell whether TVM finds that ``width`` steps of a loop over all of a shape are neighbours in memory."""
    analyzer = sym.Analyzer()
    step, lane = (tirx.Var(name, "int64") for name in ("step", "lane"))
    analyzer.bind(step, tvm.ir.Range(0, prod(shape) // width))
    analyzer.bind(lane, tvm.ir.Range(0, width))
    place, inner = tirx.IntImm("int64", 0), prod(shape)
    for n, size in enumerate(shape):
        digit = step * width + lane if n == 0 else tirx.floormod(step * width + lane, inner)
        inner //= size
        place = place * size + analyzer.simplify(tirx.floordiv(digit, inner))
    return bool(analyzer.can_prove_equal(analyzer.simplify(place), step * width + lane))


def _strided_axis(body: s_tir.SBlock, shape: list[int]) -> int | None:
    """Return the iterator that is contiguous in the data of a transpose, if it isn't the result's last."""
    last = len(shape) - 1
    if body.writes[0].region and not uses(body.writes[0].region[-1].min, body.iter_vars[last].var):
        return None
    for region in body.reads:
        if not region.region or prod(int(d) for d in region.source.shape) < prod(shape):
            continue
        index = region.region[-1].min
        if uses(index, body.iter_vars[last].var):
            # Channels that are spread over space: neighbours in the result are some of the channels apart.
            axes = [axis for axis in range(last) if shape[axis] > 1 and _is_unit(index, body.iter_vars[axis].var)]
            if axes and not _is_unit(index, body.iter_vars[last].var):
                return axes[-1]
            continue
        for axis in range(last):
            if shape[axis] > 1 and uses(index, body.iter_vars[axis].var):
                if any(uses(r.min, body.iter_vars[last].var) for r in region.region[:-1]):
                    return axis
    return None


def _is_unit(index: tirx.PrimExpr, var: tirx.Var) -> bool:
    """Tell whether an index grows by one with a variable."""
    linear = sym.detect_linear_equation(index, [var])
    return len(linear) == 2 and isinstance(linear[0], tirx.IntImm) and int(linear[0]) == 1


def _square_source(body: s_tir.SBlock, shape: list[int], strided: int, hw: Hardware) -> str | None:
    """Return the buffer that a transpose reads, if it is one that can be loaded by squares."""
    if "avx2" not in hw.features or shape[strided] < _SQUARE or shape[-1] < _SQUARE:
        return None
    axis = body.iter_vars[strided].var
    loads = _loads(body)
    along = [load for load in loads if any(uses(index, axis) for index in load.indices)]
    # Two loads of one buffer, of what was joined of its parts, are two squares.
    if len(along) != 1 or sum(load.source.same_as(along[0].source) for load in loads) > 1:
        return None
    *outer, last = along[0].indices
    side_by_side = not any(uses(index, axis) for index in outer) and _is_unit(last, axis)
    return str(along[0].source.name) if side_by_side and _is_inside(along[0], body) else None


def _loads(body: s_tir.SBlock) -> list[TensorLoad]:
    """Return what a block loads, each load once."""
    found: list[TensorLoad] = []

    def collect(load: TensorLoad) -> None:
        if not any(tvm_ffi.structural_equal(load, other) for other in found):
            found.append(load)

    tvm_ffi.structural_walk(body.body, (TensorLoad, collect))
    return found


def _is_inside(load: TensorLoad, body: s_tir.SBlock) -> bool:
    """Tell whether a load could be without the conditions around it: a square is loaded without."""
    analyzer = sym.Analyzer()
    for it in body.iter_vars:
        analyzer.bind(it.var, it.dom)
    bounds = [analyzer.const_int_bound(index) for index in load.indices]
    return all(
        bound.min_value >= 0 and bound.max_value < int(extent)
        for bound, extent in zip(bounds, load.source.shape, strict=True)
    )


def _transpose_squares(sch: s_tir.Schedule, loops: list[LoopRV], strided: int, rows: int, source: str) -> LoopRV:
    """Tile a transpose by squares that a rewrite transposes in registers; return the outermost loop over tiles."""
    extents = [int(sch.get(loops[axis]).extent) for axis in (strided, -1)]
    # Whole cache lines of the result are written at once: rows may be apart by what makes them share few of L1's sets.
    columns = 2 * _SQUARE if extents[1] >= 2 * _SQUARE else _SQUARE
    # Without conditions: the last tile will overlap the one before.
    row_outer, row = sch.split(loops[strided], [None, rows], disable_predication=True)
    column_outer, column = sch.split(loops[-1], [None, columns], disable_predication=True)
    (row_squares, row), (column_squares, column) = (sch.split(loop, [None, _SQUARE]) for loop in (row, column))
    inside = (row_squares, column_squares, row, column)
    sch.reorder(*loops[:strided], row_outer, *loops[strided + 1 : -1], column_outer, *inside)
    for loop, size, extent in ((row_outer, rows, extents[0]), (column_outer, columns, extents[1])):
        if extent % size:
            overlap.mark(sch, loop, extent)
    transposes.mark(sch, row, source)
    return row_outer


def _tile_transpose(
    sch: s_tir.Schedule, loops: list[LoopRV], strided: int, rows: int, shape: list[int]
) -> list[LoopRV]:
    """Tile the two axes of a transpose; return the loops, the tile's two last."""
    columns = next((d for d in (16, 8, 32) if shape[-1] % d == 0), divisors(shape[-1], 32)[0])
    row_outer, row = sch.split(loops[strided], [None, rows])
    column_outer, column = sch.split(loops[-1], [None, columns])
    outer = [*loops[:strided], row_outer, *loops[strided + 1 : -1], column_outer]
    sch.reorder(*outer, row, column)
    return [*outer, row, column]


def _boundaries(body: s_tir.SBlock) -> list[int]:
    """Return the constants that conditions compare the last iterator with (a concatenation's parts, a pad)."""
    constants: list[int] = []
    last = body.iter_vars[-1].var

    def collect(node: object) -> None:
        if isinstance(node, (tirx.LT, tirx.LE, tirx.GT, tirx.GE, tirx.EQ, tirx.NE)):
            if uses(node.a, last) or uses(node.b, last):
                constants.extend(_constants(node))
        for field in ("a", "b", "args", "value", "condition", "true_value", "false_value", "indices", "body"):
            child = getattr(node, field, None)
            if child is None:
                continue
            if isinstance(child, (list, tuple)) or type(child).__name__ == "Array":
                for item in child:
                    collect(item)
            else:
                collect(child)

    collect(body.body)
    return constants


def _constants(node: tirx.PrimExpr) -> list[int]:
    if isinstance(node, tirx.IntImm):
        return [int(node)]
    return [c for side in ("a", "b") if hasattr(node, side) for c in _constants(getattr(node, side))]


RULE = Rule("elementwise", apply, order=90)
