"""How one fused kernel becomes loops: a rule per operator family (`families`), tried in the order of ``RULES``."""

from __future__ import annotations

from tvm import s_tir, tirx
from tvm.target import Target

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.families import RULES
from nnfuze_tvm.schedules.intrinsics.words import multiply_words
from nnfuze_tvm.schedules.knobs import record_knobs
from nnfuze_tvm.schedules.rewrites.bias import start_from_bias
from nnfuze_tvm.schedules.rewrites.extremes import keep_nan
from nnfuze_tvm.schedules.rewrites.narrow_sums import sum_narrowly
from nnfuze_tvm.schedules.rewrites.overlap import overlap_tiles
from nnfuze_tvm.schedules.rewrites.partial_sums import sum_in_parts
from nnfuze_tvm.schedules.rewrites.peel import peel_loops
from nnfuze_tvm.schedules.rewrites.prefetch import prefetch_weights
from nnfuze_tvm.schedules.rewrites.products import round_products
from nnfuze_tvm.schedules.rewrites.row_pairs import pair_rows
from nnfuze_tvm.schedules.rewrites.short_rows import keep_to_short_rows
from nnfuze_tvm.schedules.rewrites.squares import vectorize_squares
from nnfuze_tvm.schedules.rewrites.tails import cut_tails
from nnfuze_tvm.schedules.rewrites.transposes import transpose_squares


def apply(sch: s_tir.Schedule, target: Target, tunable: bool = False) -> str:
    """Schedule the PrimFunc ``main`` of ``sch`` in place by the first rule that takes it.

    Parameters
    ----------
    sch : tvm.s_tir.Schedule
        A schedule of a module with one PrimFunc, ``main``.
    target : tvm.target.Target
        The CPU that the kernel is for.
    tunable : bool
        Sample the knobs (recorded in the trace) instead of taking the hardware model's.

    Returns
    -------
    str
        The rule's name.
    """
    hw = Hardware.of(target)
    for rule in RULES:
        if rule.apply(sch, hw, tunable):
            record_knobs(sch, rule=rule.name)
            return rule.name
    raise AssertionError("the fallback rule takes every kernel")


def apply_rewrites(func: tirx.PrimFunc) -> tirx.PrimFunc:
    """Return a scheduled kernel as it can be compiled: what rules mark and no schedule primitive can express."""
    passes = (
        keep_nan,
        overlap_tiles,
        cut_tails,
        prefetch_weights,
        vectorize_squares,
        transpose_squares,
        start_from_bias,
        peel_loops,
        pair_rows,
        sum_narrowly,
        multiply_words,
        sum_in_parts,
        keep_to_short_rows,
        round_products,
    )
    for step in passes:
        func = step(func)
    return func
