"""Recurrent layers: the loops of all steps, written anew with the register tile that fits the machine.

No schedule primitive moves loops within a recurrence, whose steps wait for each other; so the kernel's body is
replaced by the same loops for vectors (`graph.recurrent.loops`), over weights that are packed in the order in which
they are read.
"""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.graph.recurrent.form import Form, Sizes
from nnfuze_tvm.graph.recurrent.integer_loops import ONE_BY_ONE, Dots
from nnfuze_tvm.graph.recurrent.kernel import ATTRIBUTE, prim_func
from nnfuze_tvm.graph.recurrent.tile import Tile
from nnfuze_tvm.schedules.blocks import layout_free, root
from nnfuze_tvm.schedules.intrinsics import bytes_are_fast, signed_dots, step_of
from nnfuze_tvm.schedules.intrinsics import dots as known_dots
from nnfuze_tvm.schedules.knobs import record_knobs
from nnfuze_tvm.schedules.loops import divisors
from nnfuze_tvm.schedules.rule import Rule

# Registers that hold no sums: the number that all multiply, and weights on their way, or products.
_OTHERS = {True: 4, False: 6}
# LLVM makes many pairs of products before it adds any.
_OTHERS_OF_PAIRS = 22
# Sums that a core can have on their way at once: fewer wait for each other.
_IN_FLIGHT = 8
# Products per sum in one iteration. Without fused multiply-adds LLVM's scheduler would spill the sums of more.
_UNROLLED = {True: 4, False: 1}


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Write the loops of a recurrent layer for vectors; see `Rule` for the contract. There is nothing to sample."""
    func = sch.mod["main"]
    outermost = root(sch)
    if outermost is None or ATTRIBUTE not in func.attrs:
        return False
    form = Form.of(func.attrs[ATTRIBUTE])
    shapes = [[int(extent) for extent in param.ty.shape] for param in func.params]
    sizes = Sizes.of(shapes[0], shapes[2], str(func.params[0].ty.dtype))
    packed = "weights" in {param.name for param in layout_free(sch)}
    dots = best_dots(sizes, hw, form.codes_in) if form.integer and packed else ONE_BY_ONE
    tile = best_tile(form, sizes, hw, dots)
    new = prim_func(form, sizes, tile, packed, func.params, dots)
    sch.state.replace(sch.get_sref(outermost), new.body.block)
    record_knobs(sch, lanes=tile.lanes, vectors=tile.vectors, rows=tile.rows, unroll=tile.unroll)
    return True


def best_dots(sizes: Sizes, hw: Hardware, weights: str = "int8") -> Dots:
    """Return how a machine multiplies states in 8 bits best: by the longest vectors that a layer fills."""
    signed = hw.isa == "arm" or not bytes_are_fast(hw.features)
    # x86 multiplies bytes with a sign by bytes without one; where it adds them without saturation, those may be any.
    shift = 0 if signed else 128
    if weights == "int16":
        known = known_dots(hw.features, weights, weights)
    else:
        known = known_dots(hw.features, "int8" if signed else "uint8", weights)
        known += signed_dots(hw.features) if signed else []
    fit = [dot for dot in known if dot.lanes <= min(sizes.hidden, hw.lanes("int32")) and dot.rows == 1]
    if not fit:
        return ONE_BY_ONE
    dot = max(fit, key=lambda dot: (dot.depth, dot.lanes))
    return Dots(dot.lanes, dot.depth, dot.steps, dot.data, shift, dot.paired, step_of(dot), dot.multiplies)


def best_tile(form: Form, sizes: Sizes, hw: Hardware, dots: Dots = ONE_BY_ONE) -> Tile:
    """Return the tile that takes the fewest cycles by what it loads and by how long its sums wait for each other."""
    # The sums of each pass: a candidate that waits for its gates has one of its own.
    passes = (2, 1) if form.waits else (form.gates,)
    fused = (hw.isa == "arm" or "fma" in hw.features) and dots.instructions == 1
    most = hw.registers - (_OTHERS_OF_PAIRS if dots.paired else _OTHERS[fused])
    lanes = hw.lanes(sizes.dtype)
    while lanes > sizes.hidden:
        lanes //= 2
    if dots.depth > 1:
        lanes = dots.lanes
    unroll = next(iter(divisors(-(-sizes.hidden // (dots.depth * dots.steps)), _UNROLLED[fused])))

    def cycles(tile: Tile) -> int:
        each = 0
        for gates in passes:
            sums, loads = tile.rows * gates * tile.vectors, gates * tile.vectors + tile.rows
            each += max(sums, loads, _IN_FLIGHT)
        return each * -(-sizes.hidden // tile.units) * (sizes.batch // tile.rows)

    tiles = [
        Tile(lanes, vectors, rows, unroll)
        for rows in divisors(sizes.batch, most)
        for vectors in range(1, most + 1)
        if rows * passes[0] * vectors <= most and vectors * lanes <= sizes.hidden
    ]
    return min(tiles, key=cycles) if tiles else Tile(lanes, 1, 1, unroll)


RULE = Rule("recurrence", apply, order=5)
