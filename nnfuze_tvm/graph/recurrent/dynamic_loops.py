"""The loops of a recurrent layer whose hidden states become 8-bit codes by their own range in each step.

The range is that of all sequences, zero included, so all of them take a step before any takes the next.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from nnfuze_tvm.graph.recurrent.integer_loops import ROUND, IntegerLoops
from nnfuze_tvm.graph.recurrent.loops import alloc, serial
from nnfuze_tvm.graph.recurrent.tile import Held, Spot

_LARGEST = 255


class DynamicLoops(IntegerLoops):
    """Writes the body of one kernel.

    Codes of 0 to 255 are held as they are, or less 128 where the type has a sign and 8 bits.
    """

    def write(self, packed: bool) -> None:
        """Write everything, as `Loops` does."""
        s, lanes = self.sizes, self.tile.lanes
        self.offset = -128 if self.held_type == "int8" else 0
        self.codes = alloc((s.batch, self.width), self.held_type)
        # What one unit of the codes stands for, and what a sum has per unit of its weights' sum that it should not.
        self.unit, self.excess = alloc((1,), "float32"), alloc((1,), "int32")
        self.extremes = [alloc((lanes,), "float32") for _ in range(2)]
        super().write(packed)

    def _direction(self, direction: int) -> None:
        rows = self.tile.rows
        with serial(self.sizes.batch) as row:
            self._begin(direction, row)
        with serial(self.sizes.steps) as step:
            self._quantize(step % 2)
            with serial(self.sizes.batch // rows) as chunk:
                self._step(direction, chunk * rows, step)
        with serial(self.sizes.batch) as row:
            self._end(direction, row)

    def _vectors(self, body: Any) -> None:
        """Write ``body(sequence, place)`` for all vectors of states; a sequence's last may overlap the one before."""
        hidden, lanes = self.sizes.hidden, self.tile.lanes
        with serial(self.sizes.batch) as row, serial(-(-hidden // lanes)) as vector:
            start = vector * lanes
            if hidden % lanes:
                start = tirx.min(start, tirx.IntImm("int64", hidden - lanes))
            body(row, self._ramp(start))

    def _quantize(self, old: Any) -> None:
        m, none = self.math, tirx.const(0.0, "float32")
        for extreme in self.extremes:
            T.buffer_store(extreme, m.number(0.0), [self._place(0)])

        def extend(row: Any, place: Any) -> None:
            value = T.bind(self.state[old, 0, row, place])
            for extreme, further in zip(self.extremes, (tirx.min, tirx.max), strict=True):
                T.buffer_store(extreme, further(extreme[self._place(0)], value), [self._place(0)])

        self._vectors(extend)
        low, high = none, none
        for lane in range(self.tile.lanes):
            own = [extreme[tirx.IntImm("int64", lane)] for extreme in self.extremes]
            low, high = T.bind(tirx.min(low, own[0])), T.bind(tirx.max(high, own[1]))
        span = T.bind((high - low) / tirx.const(_LARGEST, "float32"))
        # All zero: any scale will do but zero.
        unit = T.bind(tirx.Select(span == none, tirx.const(1.0, "float32"), span))
        most = tirx.const(_LARGEST, "float32")
        zero = T.bind(tirx.nearbyint(tirx.max(none, tirx.min(most, none - low / unit))))
        T.buffer_store(self.unit, unit, [0])
        T.buffer_store(self.excess, tirx.Cast("int32", zero) + tirx.const(self.offset, "int32"), [0])
        lowest, highest = (T.bind(self._wide(bound)) for bound in (none - zero, most - zero))
        integers, held = (self._typed(kind) for kind in ("int32", self.held_type))

        def round_(row: Any, place: Any) -> None:
            scaled = self.state[old, 0, row, place] / self._wide(unit)
            near = tirx.max(lowest, tirx.min(highest, scaled)) + m.number(ROUND)
            code = tirx.reinterpret(integers, near) + self._wide(self.excess[0])
            T.buffer_store(self.codes, tirx.Cast(held, code), [row, place])

        self._vectors(round_)

    def _typed(self, kind: str) -> str:
        return kind if self.tile.lanes == 1 else f"{kind}x{self.tile.lanes}"

    def _multiplied(self, old: Any) -> Held:
        return self.codes, []

    def _none(self, spot: Spot, gate: int, vector: int) -> Any:
        totals = self.buffers["totals"][self._column(spot, gate, vector)]
        return totals * self._wide(tirx.const(0, "int32") - self.excess[0])

    def _scale(self, spot: Spot, gate: int, vector: int) -> Any:
        return super()._scale(spot, gate, vector) * self._wide(self.unit[0])
