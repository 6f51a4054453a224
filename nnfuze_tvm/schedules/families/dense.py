"""Dense layers and (batched) matrix products with a row-major right-hand side, floats and int8."""

from __future__ import annotations

from tvm import s_tir

from nnfuze_tvm.devices.hardware import Hardware
from nnfuze_tvm.schedules.blocks import iter_kinds, single_anchor, weights_follow
from nnfuze_tvm.schedules.contraction import schedule
from nnfuze_tvm.schedules.rule import Rule

# Per kind of the iterators, which of them index the right-hand side: rows are the reduction, columns the output's.
_WEIGHTS: dict[str, list[tuple[int, ...]]] = {
    "SSR": [(2, 1)],
    "SSSR": [(0, 3, 2), (3, 2)],
    "SSSSR": [(0, 1, 4, 3), (4, 3)],
}


def apply(sch: s_tir.Schedule, hw: Hardware, tunable: bool) -> bool:
    """Schedule a matrix product; see `Rule` for the contract."""
    block = single_anchor(sch, cropped=True)
    if block is None:
        return False
    orders = _WEIGHTS.get(iter_kinds(sch, block), [])
    if not any(weights_follow(sch, block, order) for order in orders):
        return False
    return schedule(sch, block, hw, tunable, pixel_axes=1, groups=1)


RULE = Rule("dense", apply, order=40)
